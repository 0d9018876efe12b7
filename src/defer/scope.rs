//! What a layer gives to the requests that pass it.

use std::time::Duration;

use super::sweep::Sweep;
use crate::executor::{Executor, Shared, Source};
use crate::sync::{Arc, Weak};

/// One per layer, shared by its requests.
#[derive(Debug)]
pub(crate) struct Scope {
    pub(crate) executor: Executor,
    pub(crate) max_tasks: usize,
    pub(crate) sweep: Arc<Sweep>,
    /// What its requests emit goes here.
    #[cfg(feature = "events")]
    pub(crate) events: Option<Arc<crate::event::Hub>>,
    #[cfg(feature = "test-util")]
    pub(crate) test: Option<Arc<crate::test_util::TestScope>>,
}

impl Scope {
    pub(crate) fn new(executor: Executor, max_tasks: usize, max_hold: Duration) -> Self {
        let scope = Self {
            executor,
            max_tasks,
            sweep: Arc::new(Sweep::new(max_hold)),
            #[cfg(feature = "events")]
            events: None,
            #[cfg(feature = "test-util")]
            test: None,
        };
        scope.attach_to(scope.executor.shared());
        scope
    }

    /// Deliveries run on the layer's executor, unless they have one; what their store has starts now,
    /// where there is a runtime, else with the first request that emits.
    #[cfg(feature = "events")]
    pub(crate) fn begin(&self) {
        if let Some(events) = &self.events {
            events.bind(&self.executor);
            if tokio::runtime::Handle::try_current().is_ok() {
                events.ensure_running();
            }
        }
    }

    /// A drain of this executor finds what the layer's requests hold.
    pub(super) fn attach_to(&self, executor: &Shared) {
        let source: Weak<Sweep> = Arc::downgrade(&self.sweep);
        executor.attach(source as Weak<dyn Source>);
    }
}
