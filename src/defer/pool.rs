//! Collectors of requests that are over, for the next requests of their thread.
//!
//! Most requests defer nothing, and for them the collector is what the layer costs: making and dropping
//! one was 260 of their 1,360 instructions.
//!
//! One that was used is emptied where it lies: made anew as a whole, it cost 80 instructions more.
//!
//! Invariant: what is kept is as new: nobody has touched it, or all of it was replaced. It has no scope, so
//! that it holds no executor.

use super::gate::Gate;
use super::seen::Seen;
use super::sweep::Progress;
use super::{Collector, Scope};
use crate::pool::Pool;
use crate::sync::{Arc, AtomicBool, OnceLock};

thread_local! {
    static POOL: Pool<Collector> = const { Pool::new() };
}

impl Collector {
    pub(crate) fn open(scope: Arc<Scope>) -> Arc<Self> {
        scope.executor.shared().request_opened();
        if let Some(mut pooled) = POOL.try_with(Pool::take).ok().flatten() {
            if let Some(collector) = Arc::get_mut(&mut pooled) {
                collector.scope = Some(scope);
                return pooled;
            }
            unreachable!("nobody has a collector of the pool");
        }
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

    /// The handler has answered. If nobody has touched the collector, and nobody will, the request is over,
    /// and the next one may have it.
    #[inline]
    pub(super) fn reuse_untouched(mut this: Arc<Self>) -> Option<Arc<Self>> {
        // Being the only one is asked first, and orders what another thread registered before it let go.
        let Some(collector) = Arc::get_mut(&mut this).filter(|only| only.is_untouched()) else {
            return Some(this);
        };
        #[cfg(feature = "test-util")]
        {
            collector.limit = OnceLock::new();
        }
        let scope = collector.scope.take();
        if let Some(scope) = &scope {
            // As `close`, for what has neither been answered nor joined.
            scope.executor.shared().request_answered(false);
        }
        put(this);
        // Last: with it the executor may end.
        drop(scope);
        None
    }

    /// Somebody has let go of it. If that was the last one, it is made anew for another request.
    pub(super) fn reuse_if_last(mut this: Arc<Self>) {
        let Some(collector) = Arc::get_mut(&mut this) else {
            return;
        };
        let scope = collector.scope.take();
        collector.gate.renew();
        if collector.response.get().is_some() {
            collector.response = OnceLock::new();
        }
        collector.joined = AtomicBool::new(false);
        collector.answered = AtomicBool::new(false);
        collector.closed = AtomicBool::new(false);
        collector.progress = Progress::new();
        collector.seen = Seen::new();
        #[cfg(feature = "test-util")]
        {
            collector.limit = OnceLock::new();
        }
        put(this);
        drop(scope);
    }
}

/// Nothing of the user's is dropped here: it is as new.
#[inline]
fn put(collector: Arc<Collector>) {
    // An error: the thread is ending.
    let _ = POOL.try_with(|pool| pool.put(collector));
}
