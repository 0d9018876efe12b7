//! [`DeferLayer`]: the line that a user adds.

use std::time::Duration;

use tower_layer::Layer;

use super::DeferService;
use crate::defer::Scope;
use crate::executor::{DrainReport, Executor};
use crate::sync::Arc;

/// Puts a [`Defer`](crate::Defer) into the extensions of every request, and runs what is registered
/// there after the response is out.
///
/// It belongs outermost, so that nothing outside it holds the body back or sees its end first: in axum the
/// last `.layer(…)`, in tonic's `Server` and tower's `ServiceBuilder` the first. A second one further in
/// shares the collector of the first, so nothing starts before the outer body is out; tasks that are
/// registered under it run on its own executor.
///
/// Through axum's `Router::layer`, the tasks of a HEAD request are released when axum discards the body,
/// before the head is written. Around the finished router they are not; the README shows how.
///
/// Cheap to clone; clones share the executor. Keep one for the shutdown.
///
/// # The order of layers
///
/// Tasks start when whoever is *outside* this layer has let go of the last chunk of the body. That should
/// be the server, which lets go of a chunk when it is written:
///
/// ```text
///           ┌─ server ──────────────────────────────────────────────┐
///           │  ┌─ DeferLayer ────────────────────────────────────┐  │
///   request │  │  ┌─ CompressionLayer, TraceLayer, … ─────────┐  │  │
///  ─────────┼──┼──┼──►  handler                               │  │  │
///           │  │  └───────────┬───────────────────────────────┘  │  │
///           │  └──────────────┼──────────────────────────────────┘  │
///  ◄────────┼─────────────────┘ written: the tasks start            │
///  response └───────────────────────────────────────────────────────┘
/// ```
///
/// A layer outside it that makes new chunks from ours (compression, a body that is collected or
/// buffered, encryption) lets go of ours as soon as it has read them. The tasks start **early**, while
/// the client still waits:
///
/// ```text
///           ┌─ server ──────────────────────────────────────────────┐
///           │  ┌─ CompressionLayer ──────────────────────────────┐  │
///   request │  │  ┌─ DeferLayer ──────────────────────────────┐  │  │
///  ─────────┼──┼──┼──►  handler                               │  │  │
///           │  │  └───────────┬───────────────────────────────┘  │  │
///           │  │     read, compressed, dropped: the tasks start  │  │
///           │  └──────────────┬──────────────────────────────────┘  │
///  ◄────────┼─────────────────┘ written: too late                   │
///  response └───────────────────────────────────────────────────────┘
/// ```
///
/// With axum the line that is added last is outermost; with `tower::ServiceBuilder` it is the first.
/// Layers that pass the chunks on as they are (tracing, timeouts, request ids, header changes) may stand
/// on either side.
///
/// | setting | default | reason |
/// | --- | --- | --- |
/// | [`executor`](Self::executor) | one of its own, with the defaults of [`ExecutorBuilder`](crate::ExecutorBuilder) | |
/// | [`max_tasks_per_request`](Self::max_tasks_per_request) | 1,024 | one request cannot take the room of all |
/// | [`max_hold`](Self::max_hold) | 30 s | longer than a bad network's pause, short enough that a client cannot hold the work hostage |
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_defer::{DeferLayer, Executor};
///
/// let executor = Executor::builder().concurrency(16).build();
/// let layer = DeferLayer::new().executor(executor.clone()).max_hold(Duration::from_secs(10));
/// # let _ = layer;
/// ```
#[derive(Clone, Debug)]
#[must_use = "a layer does nothing until it is added to a service"]
pub struct DeferLayer {
    scope: Arc<Scope>,
    settings: Settings,
}

#[derive(Clone, Copy, Debug)]
struct Settings {
    max_tasks: usize,
    max_hold: Duration,
}

impl DeferLayer {
    /// A layer with an executor of its own and the defaults above.
    pub fn new() -> Self {
        let settings = Settings {
            max_tasks: 1024,
            max_hold: Duration::from_secs(30),
        };
        Self::with(Executor::new(), settings)
    }

    /// Runs the tasks on this executor, which may be shared with other layers. Default: one of its own.
    pub fn executor(self, executor: Executor) -> Self {
        let layer = Self::with(executor, self.settings);
        #[cfg(feature = "events")]
        let layer = layer.with_events(self.scope.events.clone());
        layer
    }

    /// Where [`Defer::emit`](crate::Defer::emit) goes: subscribers, and the store that keeps what they
    /// are to hear. Deliveries run on the layer's executor, unless the events have one of their own.
    ///
    /// With a store, what it still has is delivered from the moment when the layer is applied within a
    /// runtime, else from the first request.
    #[cfg(feature = "events")]
    pub fn events<S>(self, events: crate::event::Events<S>) -> Self {
        self.with_events(Some(events.into_hub()))
    }

    /// How many tasks a request may register; at least 1. Default: 1,024. What goes beyond is rejected with
    /// [`RejectReason::RequestLimit`](crate::RejectReason::RequestLimit).
    pub fn max_tasks_per_request(self, tasks: usize) -> Self {
        let settings = Settings {
            max_tasks: tasks.max(1),
            ..self.settings
        };
        self.set(settings)
    }

    /// How long a response may make no progress (no frame asked for, no chunk taken) before its tasks
    /// are released all the same, with [`End::Stalled`](crate::End::Stalled). Coarse: up to a quarter
    /// later. A stream that waits for its own next item is not stalled. Default: 30 s.
    pub fn max_hold(self, time: Duration) -> Self {
        let settings = Settings {
            max_hold: time,
            ..self.settings
        };
        self.set(settings)
    }

    /// The executor: for its snapshot, its dead letters, and tasks without a request.
    #[must_use]
    pub fn get_executor(&self) -> &Executor {
        &self.scope.executor
    }

    /// Shorthand for [`Executor::drain`], of this layer's executor, and of that on which its events are
    /// delivered where that is another one.
    ///
    /// # Cancel safety
    ///
    /// As [`Executor::drain`].
    pub async fn drain(&self, within: Duration) -> DrainReport {
        crate::shutdown::drain(&self.executors(), within).await
    }

    /// What is to be drained with this layer: its executor, and that of its events.
    pub(crate) fn executors(&self) -> Vec<Executor> {
        let executors = vec![self.scope.executor.clone()];
        #[cfg(feature = "events")]
        let executors = {
            let mut executors = executors;
            let events = self.scope.events.as_ref().and_then(|hub| hub.bound());
            let other = events.filter(|other| {
                let ours = self.scope.executor.shared();
                !Arc::ptr_eq(other.shared(), ours)
            });
            executors.extend(other.cloned());
            executors
        };
        executors
    }

    /// Where its events are kept.
    #[cfg(feature = "events")]
    pub(crate) fn hub(&self) -> Option<&Arc<crate::event::Hub>> {
        self.scope.events.as_ref()
    }

    fn with(executor: Executor, settings: Settings) -> Self {
        let scope = Scope::new(executor, settings.max_tasks, settings.max_hold);
        let scope = Arc::new(scope);
        Self { scope, settings }
    }

    /// As this one, with other settings.
    fn set(self, settings: Settings) -> Self {
        #[cfg(feature = "test-util")]
        let test = self.scope.test.clone();
        let layer = Self::with(self.scope.executor.clone(), settings);
        #[cfg(feature = "test-util")]
        let layer = layer.tested(test);
        #[cfg(feature = "events")]
        let layer = layer.with_events(self.scope.events.clone());
        layer
    }

    #[cfg(feature = "events")]
    fn with_events(self, events: Option<Arc<crate::event::Hub>>) -> Self {
        let (executor, settings) = (self.scope.executor.clone(), self.settings);
        let mut scope = Scope::new(executor, settings.max_tasks, settings.max_hold);
        scope.events = events;
        #[cfg(feature = "test-util")]
        {
            scope.test.clone_from(&self.scope.test);
        }
        let scope = Arc::new(scope);
        Self { scope, settings }
    }

    #[cfg(feature = "test-util")]
    fn tested(self, test: Option<Arc<crate::test_util::TestScope>>) -> Self {
        let (executor, settings) = (self.scope.executor.clone(), self.settings);
        let mut scope = Scope::new(executor, settings.max_tasks, settings.max_hold);
        scope.test = test;
        let scope = Arc::new(scope);
        Self { scope, settings }
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn for_tests(executor: Executor, test: crate::test_util::TestScope) -> Self {
        let layer = Self::new().executor(executor);
        layer.tested(Some(Arc::new(test)))
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn test_scope(&self) -> Option<&crate::test_util::TestScope> {
        self.scope.test.as_deref()
    }
}

impl Default for DeferLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for DeferLayer {
    type Service = DeferService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        #[cfg(feature = "events")]
        self.scope.begin();
        DeferService::new(inner, self.scope.clone())
    }
}
