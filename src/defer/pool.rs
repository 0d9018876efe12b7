//! Collectors of requests that are over, for the next requests of their thread.
//!
//! Most requests defer nothing, and for them the collector is what the layer costs: making and dropping
//! one was 260 of their 1,360 instructions.
//!
//! One that was used is emptied where it lies: made anew as a whole, it cost 80 instructions more.
//!
//! Invariant: what is kept is as new: nobody has touched it, or all of it was replaced. It has no scope, so
//! that it holds no executor.

use std::mem::ManuallyDrop;

use super::collector::Beside;
use super::gate::Gate;
use super::seen::Seen;
use super::sweep::Progress;
use super::{Collector, Scope};
use crate::pool::{Attendant, Pool};
use crate::sync::{Arc, AtomicBool, OnceLock};

thread_local! {
    static POOL: ManuallyDrop<Pool<Collector>> = const { Pool::new() };
    static ATTENDANT: Attendant = const { Attendant(|| POOL.with(|pool| pool.close())) };
}

impl Collector {
    pub(crate) fn open(scope: Arc<Scope>) -> Arc<Self> {
        scope.executor.shared().request_opened();
        if let Some(mut pooled) = POOL.with(|pool| pool.take()) {
            if let Some(collector) = Arc::get_mut(&mut pooled) {
                collector.scope = Some(scope);
                return pooled;
            }
            unreachable!("nobody has a collector of the pool");
        }
        Self::make(scope)
    }

    /// Out of line: what it needs the stack for, others need not.
    #[inline(never)]
    fn make(scope: Arc<Scope>) -> Arc<Self> {
        Arc::new(Self {
            scope: Some(scope),
            gate: Gate::new(),
            response: OnceLock::new(),
            joined: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            progress: Progress::new(),
            seen: Seen::new(),
            #[cfg(feature = "test-util")]
            limit: OnceLock::new(),
        })
    }

    /// All that an untouched collector has of its request.
    #[inline]
    pub(super) fn take_scope(&mut self) -> Option<Arc<Scope>> {
        #[cfg(feature = "test-util")]
        {
            self.limit = OnceLock::new();
        }
        self.scope.take()
    }

    /// The handler has answered, nobody has touched the collector, and nobody will: the request is over. The
    /// next one may have it without its scope, which was [taken](Self::take_scope).
    #[inline(never)]
    pub(super) fn reuse_untouched(this: Arc<Self>, scope: Option<Arc<Scope>>) {
        if let Some(scope) = &scope {
            // As `close`, for what has neither been answered nor joined.
            scope.executor.shared().request_answered(false);
        }
        put(this);
        // Last: with it the executor may end.
        drop(scope);
    }

    /// Somebody has let go of it. If that was the last one, it is made anew for another request.
    pub(super) fn reuse_if_last(mut this: Arc<Self>) {
        let Some(collector) = Arc::get_mut(&mut this) else {
            return;
        };
        let Self {
            scope,
            gate,
            response,
            joined,
            answered,
            closed,
            progress,
            seen,
            #[cfg(feature = "test-util")]
            limit,
        } = collector;
        let scope = scope.take();
        gate.renew(Beside::renew);
        if response.get().is_some() {
            *response = OnceLock::new();
        }
        *joined = AtomicBool::new(false);
        *answered = AtomicBool::new(false);
        *closed = AtomicBool::new(false);
        *progress = Progress::new();
        *seen = Seen::new();
        #[cfg(feature = "test-util")]
        {
            *limit = OnceLock::new();
        }
        put(this);
        drop(scope);
    }
}

/// Nothing of the user's is dropped here: it is as new.
#[inline]
fn put(collector: Arc<Collector>) {
    let attend = || ATTENDANT.try_with(|_| {}).is_ok();
    POOL.with(|pool| pool.put(collector, attend));
}
