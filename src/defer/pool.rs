//! Collectors of requests that are over, for the next requests of their thread.
//!
//! Most requests defer nothing, and for them the collector is what the layer costs: making and dropping
//! one was 260 of their 1,360 instructions.
//!
//! Invariant: what is kept is as new: nobody has touched it, or all of it was replaced. It has no scope, so
//! that it holds no executor.

use std::cell::RefCell;

use super::gate::Gate;
use super::seen::Seen;
use super::sweep::Progress;
use super::{Collector, Scope};
use crate::sync::{Arc, AtomicBool, OnceLock};

/// A thread keeps at most so many: 16 KiB.
const KEPT: usize = 64;

thread_local! {
    static POOL: RefCell<Vec<Arc<Collector>>> = const { RefCell::new(Vec::new()) };
}

impl Collector {
    pub(crate) fn open(scope: Arc<Scope>) -> Arc<Self> {
        scope.executor.shared().request_opened();
        if let Some(mut pooled) = take() {
            if let Some(collector) = Arc::get_mut(&mut pooled) {
                collector.scope = Some(scope);
                return pooled;
            }
            unreachable!("nobody has a collector of the pool");
        }
        Arc::new(Self::fresh(Some(scope)))
    }

    fn fresh(scope: Option<Arc<Scope>>) -> Self {
        Self {
            scope,
            gate: Gate::new(),
            response: OnceLock::new(),
            joined: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            progress: Progress::new(),
            seen: Seen::new(),
            #[cfg(feature = "test-util")]
            limit: OnceLock::new(),
        }
    }

    /// The request is over, and nobody has touched its collector: the next request may have it.
    pub(super) fn reuse(mut this: Arc<Self>) {
        let Some(collector) = Arc::get_mut(&mut this) else {
            return;
        };
        // As `close`, for what has neither been answered nor joined.
        let shared = collector.scope().executor.shared();
        shared.request_answered(false);
        #[cfg(feature = "test-util")]
        {
            collector.limit = OnceLock::new();
        }
        let scope = collector.scope.take();
        put(this);
        // Last: with it the executor may end.
        drop(scope);
    }

    /// Somebody has let go of it. If that was the last one, it is made anew for another request.
    #[inline(never)]
    pub(super) fn reuse_if_last(mut this: Arc<Self>) {
        if let Some(collector) = Arc::get_mut(&mut this) {
            let scope = collector.scope.take();
            *collector = Self::fresh(None);
            put(this);
            drop(scope);
        }
    }
}

#[inline]
fn take() -> Option<Arc<Collector>> {
    POOL.try_with(|pool| pool.try_borrow_mut().ok()?.pop())
        .ok()
        .flatten()
}

/// Nothing of the user's is dropped here: it is as new.
#[inline]
fn put(collector: Arc<Collector>) {
    // An error: the thread is ending.
    let _ = POOL.try_with(|pool| {
        if let Ok(mut pool) = pool.try_borrow_mut() {
            if pool.len() < KEPT {
                pool.push(collector);
            }
        }
    });
}
