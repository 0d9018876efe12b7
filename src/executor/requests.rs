//! The requests that may still register a task: how many, for who waits for the executor to be quiet,
//! and the means to have them release what they hold.
//!
//! It knows no request: whoever has one says here when it opens, is answered and closes.

use super::Shared;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering, Weak};

#[derive(Default)]
pub(crate) struct Requests {
    /// Requests whose handler has not answered.
    handlers: AtomicUsize,
    /// Responses under way from which a task may still be registered.
    responses: AtomicUsize,
    sources: Mutex<Vec<Weak<dyn Source>>>,
}

/// What holds tasks that are not released yet; a drain can ask for them.
pub(crate) trait Source: Send + Sync {
    /// Releases what it holds for this executor, without waiting for the responses; with `handlers`,
    /// gives up the tasks of requests whose handler has not answered yet.
    fn release_now(&self, executor: &Shared, handlers: bool);

    /// Somebody waits for the executor to be quiet: what this runs for it may have ended with a runtime.
    fn resume(self: Arc<Self>) {}
}

impl Shared {
    pub(crate) fn request_opened(&self) {
        self.requests.handlers.fetch_add(1, Ordering::SeqCst);
    }

    /// The handler has answered (or there will be no answer). `open`: tasks may still be registered
    /// until [`response_closed`](Self::response_closed).
    pub(crate) fn request_answered(&self, open: bool) {
        if open {
            // Before the other, so that a drain never sees neither.
            self.requests.responses.fetch_add(1, Ordering::SeqCst);
        }
        if self.requests.handlers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.tell_if_quiet();
        }
    }

    pub(crate) fn response_closed(&self) {
        if self.requests.responses.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.tell_if_quiet();
        }
    }

    /// Requests that may still register a task: those whose handler has not answered, and those whose
    /// response is under way.
    pub(super) fn open_requests(&self) -> (usize, usize) {
        (
            self.requests.handlers.load(Ordering::SeqCst),
            self.requests.responses.load(Ordering::SeqCst),
        )
    }

    pub(crate) fn attach(&self, source: Weak<dyn Source>) {
        let mut sources = self.requests.sources.lock();
        sources.retain(|old| old.strong_count() > 0);
        if !sources.iter().any(|old| Weak::ptr_eq(old, &source)) {
            sources.push(source);
        }
    }

    /// Releases what requests still hold.
    pub(crate) fn release_sources(&self, handlers: bool) {
        let release = |source: Arc<dyn Source>| source.release_now(self, handlers);
        self.sources().into_iter().for_each(release);
    }

    pub(super) fn resume_sources(&self) {
        self.sources().into_iter().for_each(Source::resume);
    }

    fn sources(&self) -> Vec<Arc<dyn Source>> {
        let sources = self.requests.sources.lock();
        sources.iter().filter_map(Weak::upgrade).collect()
    }
}
