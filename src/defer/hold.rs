//! One holder of a collector: the response's future or body, or a chunk of it in the server's hands.
//! The last one that goes releases what was registered.

use std::fmt;

use super::{Collector, Ending};
use crate::sync::Arc;

/// While there is one, nothing is released but by force. Empty where there is nothing to wait for: one
/// word, because futures and bodies are moved about often.
#[derive(Default)]
pub(crate) struct Hold(Option<Arc<Collector>>);

impl Hold {
    /// The first one, which a new collector counts already.
    pub(crate) fn first(collector: Arc<Collector>) -> Self {
        Self(Some(collector))
    }

    pub(crate) fn another(collector: &Arc<Collector>) -> Self {
        collector.hold();
        Self(Some(collector.clone()))
    }

    #[inline]
    pub(crate) fn collector(&self) -> Option<&Arc<Collector>> {
        self.0.as_ref()
    }

    /// There is an answer; whether that is of any concern. If not, the request is over, and this is empty:
    /// nobody else holds the collector, so nothing is or will be registered, and nobody will ask for the
    /// response.
    #[inline]
    pub(crate) fn answered(&mut self) -> bool {
        let Some(collector) = &mut self.0 else {
            return false;
        };
        let Some(untouched) = Collector::untouched(collector) else {
            return true;
        };
        let scope = untouched.take_scope();
        if let Some(collector) = self.0.take() {
            Collector::reuse_untouched(collector, scope);
        }
        false
    }

    /// There will be no answer.
    pub(crate) fn unanswered(&mut self, ending: Ending) {
        if let Some(collector) = self.0.take() {
            Collector::fail(collector, ending);
        }
    }

    /// Whoever gets the collector is the holder now, until [`Collector::finish`].
    #[inline]
    pub(crate) fn pass_on(&mut self) -> Option<Arc<Collector>> {
        self.0.take()
    }
}

impl Drop for Hold {
    #[inline]
    fn drop(&mut self) {
        if let Some(collector) = self.0.take() {
            Collector::let_go(collector);
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.0).finish()
    }
}
