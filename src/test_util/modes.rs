//! [`TestDefer`]: a layer that captures, or one that runs everything inline.

use std::future::Future;
use std::panic::Location;
use std::pin::{Pin, pin};
use std::time::Duration;

use super::guard::{self, guarded};
use super::{Log, Report, TaskRecord};
use crate::defer::{Collector, Defer};
use crate::executor::Executor;
use crate::middleware::DeferLayer;
use crate::response::ResponseInfo;
use crate::sync::{Arc, Mutex};

/// What a layer of the kit does otherwise.
#[derive(Debug)]
pub(crate) struct TestScope {
    pub(super) log: Arc<Log>,
    mode: Mode,
    /// The request that passed a probe. It refers to this, so it is taken out.
    collector: Mutex<Option<Arc<Collector>>>,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Capture,
    Inline {
        limit: Duration,
        made_at: &'static Location<'static>,
    },
    /// The layer of [`Client`](super::Client), outside the application: it gives the application's own
    /// layer a request to join, and is not seen where there is none.
    Probe,
}

/// The handle that a probe gives to the application's own layer.
#[derive(Clone)]
pub(crate) struct Probe(pub(crate) Defer);

impl TestScope {
    pub(super) fn probe(log: Arc<Log>) -> Self {
        Self::new(log, Mode::Probe)
    }

    fn new(log: Arc<Log>, mode: Mode) -> Self {
        let collector = Mutex::default();
        Self {
            log,
            mode,
            collector,
        }
    }

    /// Listens to this executor, too.
    pub(crate) fn attach(&self, executor: &Executor) {
        self.log.attach(executor);
    }

    /// Whether this is a probe, which then remembers the request.
    pub(crate) fn probes(&self, collector: &Arc<Collector>) -> bool {
        let probe = matches!(self.mode, Mode::Probe);
        if probe {
            *self.collector.lock() = Some(collector.clone());
        }
        probe
    }

    pub(super) fn probed(&self) -> Option<Arc<Collector>> {
        self.collector.lock().take()
    }

    /// Inline mode: what to wait for before the response is returned.
    pub(crate) fn inline(&self) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        let Mode::Inline { limit, made_at } = self.mode else {
            return None;
        };
        let log = self.log.clone();
        Some(Box::pin(async move {
            guarded(&log, limit, made_at, finish(&log, false)).await;
        }))
    }
}

/// Waits until everything that may run has ended.
pub(super) async fn finish(log: &Log, backoff: bool) {
    loop {
        let mut changed = pin!(log.changed.notified());
        changed.as_mut().enable();
        let executors = log.executors();
        if executors
            .iter()
            .all(|executor| executor.shared().is_quiet())
        {
            return;
        }
        if !backoff {
            let shared = executors.iter().map(Executor::shared);
            shared.for_each(|shared| shared.retry_now());
        }
        changed.await;
    }
}

/// A layer for the application under test, and what its requests deferred. The layer's settings can be
/// changed as usual; give it another executor and it is an ordinary layer.
///
/// The assertions are those of [`Report`], on everything that was deferred so far.
#[derive(Debug)]
pub struct TestDefer {
    log: Arc<Log>,
    layer: DeferLayer,
    limit: Duration,
}

impl TestDefer {
    /// Nothing runs: tasks are recorded when they are registered, with or without the response having
    /// been read.
    #[must_use]
    pub fn capture() -> Self {
        Self::new(Log::new(true), Mode::Capture)
    }

    /// A response is returned when the tasks of its request have ended. Their conditions see it as
    /// [`Complete`](crate::End::Complete), because it has no end yet; its body is not read.
    #[track_caller]
    #[must_use]
    pub fn inline() -> Self {
        let mode = Mode::Inline {
            limit: guard::LIMIT,
            made_at: Location::caller(),
        };
        Self::new(Log::new(false), mode)
    }

    fn new(log: Arc<Log>, mode: Mode) -> Self {
        let executor = Executor::new();
        log.attach(&executor);
        let layer = DeferLayer::for_tests(executor, TestScope::new(log.clone(), mode));
        let limit = guard::LIMIT;
        Self { log, layer, limit }
    }

    /// The layer, for the application.
    pub fn layer(&self) -> DeferLayer {
        self.layer.clone()
    }

    /// The layer's executor, for an application that submits to it without a request.
    #[must_use]
    pub fn executor(&self) -> &Executor {
        self.layer.get_executor()
    }

    /// Runs what was captured so far, and what that defers, to its end; conditions are asked with the
    /// responses that there were. A task whose response has not been read or dropped is not released
    /// yet, and not run. Afterwards nothing runs again.
    ///
    /// # Panics
    ///
    /// When a task has not ended after ten seconds of real time.
    #[track_caller]
    pub fn run_captured(&self) -> impl Future<Output = Report> {
        let caller = Location::caller();
        async move {
            let executors = self.log.executors();
            let shared = || executors.iter().map(Executor::shared);
            shared().for_each(|shared| shared.run_held());
            let released = finish_released(&self.log);
            guarded(&self.log, self.limit, caller, released).await;
            shared().for_each(|shared| shared.held.hold());
            self.report()
        }
    }

    /// Everything that was deferred so far.
    pub fn report(&self) -> Report {
        self.log.report(None::<ResponseInfo>)
    }

    /// Forgets what was deferred so far: for the next part of a test.
    pub fn clear(&self) {
        self.log.clear();
    }

    /// See [`Report::assert_deferred`].
    #[track_caller]
    pub fn assert_deferred(&self, name: &str) {
        self.report().assert_deferred(name);
    }

    /// See [`Report::assert_deferred_times`].
    #[track_caller]
    pub fn assert_deferred_times(&self, name: &str, times: usize) {
        self.report().assert_deferred_times(name, times);
    }

    /// See [`Report::assert_deferred_where`].
    #[track_caller]
    pub fn assert_deferred_where(&self, name: &str, holds: impl Fn(&TaskRecord) -> bool) {
        self.report().assert_deferred_where(name, holds);
    }

    /// See [`Report::assert_not_deferred`].
    #[track_caller]
    pub fn assert_not_deferred(&self, name: &str) {
        self.report().assert_not_deferred(name);
    }

    /// See [`Report::assert_count`].
    #[track_caller]
    pub fn assert_count(&self, count: usize) {
        self.report().assert_count(count);
    }

    /// See [`Report::assert_nothing_deferred`].
    #[track_caller]
    pub fn assert_nothing_deferred(&self) {
        self.report().assert_nothing_deferred();
    }
}

/// As [`finish`], but does not wait for tasks whose response is still in the test's hands.
async fn finish_released(log: &Log) {
    loop {
        let mut changed = pin!(log.changed.notified());
        changed.as_mut().enable();
        let executors = log.executors();
        let busy = |executor: &&Executor| {
            let now = executor.snapshot();
            now.queued + now.waiting > 0 || now.outstanding > now.collected
        };
        if !executors.iter().any(|executor| busy(&executor)) {
            return;
        }
        let shared = executors.iter().map(Executor::shared);
        shared.for_each(|shared| shared.retry_now());
        changed.await;
    }
}

impl Drop for TestDefer {
    /// What is held refers to its executor, and would never be freed.
    fn drop(&mut self) {
        let executors = self.log.executors();
        executors.iter().for_each(|e| e.shared().drop_held());
    }
}
