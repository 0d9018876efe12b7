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
    #[cfg(feature = "test-util")]
    pub(crate) test: Option<Arc<crate::test_util::TestScope>>,
}

impl Scope {
    pub(crate) fn new(executor: Executor, max_tasks: usize, max_hold: Duration) -> Self {
        let scope = Self {
            executor,
            max_tasks,
            sweep: Arc::new(Sweep::new(max_hold)),
            #[cfg(feature = "test-util")]
            test: None,
        };
        scope.attach_to(scope.executor.shared());
        scope
    }

    /// A drain of this executor finds what the layer's requests hold.
    pub(super) fn attach_to(&self, executor: &Shared) {
        let source: Weak<Sweep> = Arc::downgrade(&self.sweep);
        executor.attach(source as Weak<dyn Source>);
    }
}
