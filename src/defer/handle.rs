//! [`Defer`]: what a handler holds.

use std::fmt;
use std::ops::Deref;
use std::panic::Location;

use http::Extensions;

use super::registration::DeferReserve;
use super::{Collector, MissingLayer};
use crate::executor::{Executor, Place, RejectReason, Rejected, Shared, TaskHandle, located};
use crate::response::ResponseInfo;
use crate::sync::Arc;
use crate::task::{IntoTask, Node, Task, TaskOutput};

/// The handle to defer work with, found in the extensions of a request that passed a
/// [`DeferLayer`](crate::DeferLayer).
///
/// What is registered runs when the response is out, and a clone of the handle never delays that.
/// Registered after it, through a clone, a task starts at once, with the recorded response as its
/// condition.
///
/// With the feature `axum` it is an extractor; elsewhere [`from_extensions`](Defer::from_extensions)
/// reads it.
#[derive(Clone)]
pub struct Defer {
    collector: Arc<Collector>,
    /// Another executor than that of the outermost layer.
    executor: Option<Executor>,
    /// Other events than those of the outermost layer.
    #[cfg(feature = "events")]
    events: Option<Arc<crate::event::Hub>>,
}

impl Defer {
    pub(crate) fn new(collector: Arc<Collector>) -> Self {
        Self {
            collector,
            executor: None,
            #[cfg(feature = "events")]
            events: None,
        }
    }

    /// The handle of a request that has passed a [`DeferLayer`](crate::DeferLayer).
    ///
    /// # Errors
    ///
    /// [`MissingLayer`], which says which line to add.
    ///
    /// # Examples
    ///
    /// ```
    /// use tower_defer::Defer;
    ///
    /// # fn handler<B>(request: http::Request<B>) -> Result<(), tower_defer::MissingLayer> {
    /// let defer = Defer::from_extensions(request.extensions())?;
    /// defer.run(|| async { println!("the response is out") });
    /// # Ok(()) }
    /// ```
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, MissingLayer> {
        extensions.get::<Self>().cloned().ok_or(MissingLayer(()))
    }

    /// Registers a task: a closure that makes a future, or a [`Task`] with settings. It runs after the
    /// response, on the executor, and is retried when it returns an error.
    ///
    /// Where there is no room, the executor's overflow policy decides; the handle says whether the
    /// task was accepted. One that was not is dropped, counted and logged: where that is not good
    /// enough, use [`try_run`](Self::try_run) or [`reserve`](Self::reserve).
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::Defer;
    /// # async fn start_trial(_: i64) -> Result<(), std::io::Error> { Ok(()) }
    /// # fn handler(defer: Defer) {
    /// let user = 17;
    /// defer.run(move || start_trial(user));
    /// # }
    /// ```
    #[track_caller]
    pub fn run(&self, task: impl IntoTask) -> TaskHandle {
        let node = located(task.into_task(), Location::caller());
        let executor = self.executor();
        // The limit is asked first: no other task makes room for one that it refuses.
        let admitted = self.within_limit().and_then(|()| executor.shared().admit());
        let registered = match admitted {
            Ok(place) => self.collector.register(executor, node, place),
            Err(reason) => Err((node, reason)),
        };
        registered.unwrap_or_else(|(node, reason)| {
            executor.shared().reject_for_good(node, reason);
            TaskHandle::rejected(reason)
        })
    }

    /// Registers a task that gives each of its attempts a clone of `state`.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::Defer;
    /// # #[derive(Clone)] struct App;
    /// # impl App { async fn welcome(&self, _: i64) -> Result<(), std::io::Error> { Ok(()) } }
    /// # fn handler(defer: Defer, app: App) {
    /// let user = 17;
    /// defer.run_with(app.clone(), move |app| async move { app.welcome(user).await });
    /// # }
    /// ```
    #[track_caller]
    pub fn run_with<S, F, Fut>(&self, state: S, attempt: F) -> TaskHandle
    where
        S: Clone + Send + 'static,
        F: Fn(S) -> Fut + Send + 'static,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        self.run(Task::with(state, attempt))
    }

    /// Registers a task, or gives it back where there is no room, whatever the overflow policy: the
    /// handler can still answer 503.
    ///
    /// # Examples
    ///
    /// With the feature `axum` a [`Rejected`] is such an answer (with an empty body), and `?` is enough:
    ///
    /// ```
    /// # use tower_defer::{Defer, Rejected};
    /// # async fn render(_: i64) {}
    /// async fn handler(defer: Defer) -> Result<&'static str, Rejected> {
    ///     defer.try_run(|| render(17))?;
    ///     Ok("soon")
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Rejected`], with the task and the reason.
    #[track_caller]
    pub fn try_run(&self, task: impl IntoTask) -> Result<TaskHandle, Rejected> {
        let node = located(task.into_task(), Location::caller());
        let executor = self.executor();
        let admitted = self
            .within_limit()
            .and_then(|()| executor.shared().try_admit());
        let registered = match admitted {
            Ok(place) => self.collector.register(executor, node, place),
            Err(reason) => Err((node, reason)),
        };
        registered.map_err(|(node, reason)| {
            executor.shared().reject(&node, reason);
            Rejected::new(Task::from_node(node), reason)
        })
    }

    /// Waits for room for one task and reserves it. Served in order. Put a timeout around it: the
    /// client is waiting.
    ///
    /// # Examples
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_defer::Defer;
    /// # async fn charge(_: i64) {}
    /// # async fn handler(defer: Defer) -> Result<(), Box<dyn std::error::Error>> {
    /// let room = tokio::time::timeout(Duration::from_millis(50), defer.reserve()).await??;
    /// // There is room: do what cannot be undone, and then …
    /// room.run(move || charge(17))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Closed`](crate::Closed) once the executor has been drained.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the line; a place that it had been given already goes to the next.
    pub fn reserve(&self) -> DeferReserve {
        DeferReserve::new(self.clone(), self.executor().reserve())
    }

    /// The same handle, for tasks that run on another executor: one per resource keeps a slow peer
    /// from holding up the rest.
    ///
    /// At shutdown it is drained only if it is named:
    /// [`Shutdown::new(&layer).and(&mailer)`](crate::Shutdown::and).
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::{Defer, Executor};
    /// # async fn render(_: i64) {}
    /// # fn handler(defer: Defer, mailer: Executor) {
    /// defer.on(&mailer).run(|| render(17));
    /// # }
    /// ```
    #[must_use]
    pub fn on(&self, executor: &Executor) -> Self {
        Self {
            collector: self.collector.clone(),
            executor: Some(executor.clone()),
            #[cfg(feature = "events")]
            events: self.events.clone(),
        }
    }

    /// What became of the response, once it is out; `None` until the release.
    pub fn response(&self) -> Option<&ResponseInfo> {
        self.collector.response()
    }

    pub(crate) fn register<H: Deref<Target = Shared>>(
        &self,
        node: Node,
        place: Place<H>,
    ) -> Result<TaskHandle, (Node, RejectReason)> {
        self.collector.register(self.executor(), node, place)
    }

    pub(super) fn within_limit(&self) -> Result<(), RejectReason> {
        if self.collector.is_at_limit() {
            return Err(RejectReason::RequestLimit);
        }
        Ok(())
    }

    /// For an inner layer: the same request, another executor and its own events.
    pub(crate) fn inner(&self, scope: &super::Scope) -> Self {
        self.collector.join(&scope.executor);
        let inner = self.on(&scope.executor);
        #[cfg(feature = "events")]
        let inner = Self {
            events: scope.events.clone().or(inner.events),
            ..inner
        };
        inner
    }

    /// Where its events go.
    #[cfg(feature = "events")]
    pub(super) fn events(&self) -> Option<&Arc<crate::event::Hub>> {
        self.events
            .as_ref()
            .or(self.collector.scope().events.as_ref())
    }

    #[cfg(feature = "events")]
    pub(super) fn collector(&self) -> &Arc<Collector> {
        &self.collector
    }

    /// For the application's own layer in a test: the same request, but its own limit.
    #[cfg(feature = "test-util")]
    pub(crate) fn inner_alone(&self, scope: &super::Scope) -> Self {
        self.collector.limit_to(scope.max_tasks);
        self.inner(scope)
    }

    pub(super) fn executor(&self) -> &Executor {
        self.executor
            .as_ref()
            .unwrap_or(&self.collector.scope().executor)
    }
}

impl fmt::Debug for Defer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Defer").field(&self.collector).finish()
    }
}
