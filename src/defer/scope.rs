//! What a layer gives to the requests that pass it.

use std::time::Duration;

use super::sweep::Sweep;
use crate::executor::{Executor, Source};
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
        let sweep = Arc::new(Sweep::new(max_hold));
        let source: Weak<Sweep> = Arc::downgrade(&sweep);
        executor.shared().attach(source as Weak<dyn Source>);
        Self {
            executor,
            max_tasks,
            sweep,
            #[cfg(feature = "test-util")]
            test: None,
        }
    }
}
