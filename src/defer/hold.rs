//! One holder of a collector: the response's future or body, or a chunk of it in the server's hands.
//! The last one that is dropped releases what was registered.

use std::fmt;

use super::Collector;
use super::seen::Seen;
use crate::response::BodySeen;
use crate::sync::Arc;

/// While there is one, nothing is released but by force.
pub(crate) struct Hold(Option<Arc<Collector>>);

impl Hold {
    /// The first one, which a new collector counts already.
    pub(crate) fn first(collector: Arc<Collector>) -> Self {
        Self(Some(collector))
    }

    pub(crate) fn another(&self) -> Self {
        let collector = self.collector();
        collector.hold();
        Self(Some(collector.clone()))
    }

    #[inline]
    pub(crate) fn collector(&self) -> &Arc<Collector> {
        match &self.0 {
            Some(collector) => collector,
            None => unreachable!("only its end takes it"),
        }
    }

    /// A sign of life: the body was asked for a frame, and said whether there is one.
    pub(crate) fn asked(&self, idle: bool) {
        let collector = self.collector();
        collector
            .progress()
            .asked(collector.scope().sweep.now(), idle);
    }

    /// A sign of life: a chunk has left.
    pub(crate) fn taken(&self) {
        let collector = self.collector();
        collector.progress().taken(collector.scope().sweep.now());
    }

    /// So many bytes more; returns how many in all.
    pub(crate) fn count_bytes(&self, bytes: usize) -> u64 {
        self.collector().progress().count(bytes as u64)
    }

    /// What is seen of the body.
    pub(crate) fn seen(&self) -> &Seen {
        self.collector().seen()
    }

    pub(crate) fn seen_so_far(&self) -> BodySeen {
        let collector = self.collector();
        collector.seen().so_far(collector.progress().bytes())
    }
}

impl Hold {
    /// There is an answer. None, and the request is over, if that is of no concern: nobody else holds the
    /// collector, so nothing is or will be registered, and nobody will ask for the response.
    #[inline]
    pub(crate) fn answered(mut self) -> Option<Self> {
        if !self.is_of_no_concern() {
            return Some(self);
        }
        if let Some(collector) = self.0.take() {
            Collector::reuse(collector);
        }
        None
    }

    /// Being the only one is asked first, and orders what another thread registered before it let go.
    #[inline]
    fn is_of_no_concern(&mut self) -> bool {
        self.0
            .as_mut()
            .and_then(Arc::get_mut)
            .is_some_and(|collector| collector.is_untouched())
    }
}

impl Drop for Hold {
    #[inline]
    fn drop(&mut self) {
        // There is nothing to release. It saves 298 of 2,127 instructions of a request.
        if self.is_of_no_concern() {
            return;
        }
        if let Some(collector) = self.0.take() {
            collector.let_go();
            Collector::reuse_if_last(collector);
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.0).finish()
    }
}
