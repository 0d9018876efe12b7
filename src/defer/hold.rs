//! One holder of a collector: the response's future or body, or a chunk of it in the server's hands.
//! The last one that is dropped releases what was registered.

use std::fmt;

use super::Collector;
use crate::sync::Arc;

/// While there is one, nothing is released but by force.
pub(crate) struct Hold(Arc<Collector>);

impl Hold {
    /// The first one, which a new collector counts already.
    pub(crate) fn first(collector: Arc<Collector>) -> Self {
        Self(collector)
    }

    pub(crate) fn another(&self) -> Self {
        self.0.hold();
        Self(self.0.clone())
    }

    pub(crate) fn collector(&self) -> &Arc<Collector> {
        &self.0
    }

    /// A sign of life: the body was asked for a frame, and said whether there is one.
    pub(crate) fn asked(&self, idle: bool) {
        self.0.progress().asked(self.0.scope().sweep.now(), idle);
    }

    /// A sign of life: a chunk has left.
    pub(crate) fn taken(&self) {
        self.0.progress().taken(self.0.scope().sweep.now());
    }

    pub(crate) fn count_bytes(&self, bytes: u64) {
        self.0.progress().count(bytes);
    }
}

impl Hold {
    /// Nobody else holds it, so nothing is or will be registered, and nobody will ask for the response.
    /// Being the only one is asked first, and orders what another thread registered before it let go.
    #[inline]
    pub(crate) fn is_of_no_concern(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some_and(|collector| collector.is_untouched())
    }
}

impl Drop for Hold {
    #[inline]
    fn drop(&mut self) {
        // There is nothing to release. It saves 298 of 2,127 instructions of a request.
        if self.is_of_no_concern() {
            return;
        }
        self.0.let_go();
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.0).finish()
    }
}
