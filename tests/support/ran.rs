//! Which tasks ran, and what they were told of the response.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tower_defer::{Defer, DeferLayer, End, ResponseInfo, Task, When};

use super::eventually;

/// A record that tasks write themselves into.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ran(Arc<Mutex<Vec<Run>>>);

/// A task's name, and what it was told.
type Run = (String, Option<ResponseInfo>);

impl Ran {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A task that writes itself down.
    pub(crate) fn task(&self, name: &str) -> Task {
        let (ran, name) = (self.clone(), name.to_owned());
        Task::with_context(move |context| {
            let run = (name.clone(), context.response().cloned());
            ran.runs().push(run);
            async {}
        })
    }

    /// Six tasks, one for each condition.
    pub(crate) fn six(&self, defer: &Defer) {
        defer.run(self.task("default"));
        for (name, when) in [
            ("success", When::success()),
            ("complete", When::complete()),
            ("failure", When::failure()),
            ("aborted", When::aborted()),
            ("always", When::always()),
        ] {
            defer.run(self.task(name).when(when));
        }
    }

    /// The names of those that ran, each as often as it did, in the alphabet's order.
    pub(crate) fn names(&self) -> String {
        let mut names: Vec<_> = self.runs().iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names.join(" ")
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.runs().iter().any(|(it, _)| it == name)
    }

    /// What the first run of this name was told.
    ///
    /// # Panics
    ///
    /// If it has not run, or was told nothing.
    pub(crate) fn info(&self, name: &str) -> ResponseInfo {
        let found = self.runs().iter().find(|(it, _)| it == name).cloned();
        let (_, info) = found.unwrap_or_else(|| panic!("{name} has not run"));
        info.unwrap_or_else(|| panic!("{name} knows no response"))
    }

    /// How the response ended, and how many bytes it had.
    pub(crate) fn end(&self, name: &str) -> (End, u64) {
        let info = self.info(name);
        (info.end, info.bytes)
    }

    pub(crate) async fn awaits(&self, name: &str) {
        eventually(name, || self.has(name)).await;
    }

    fn runs(&self) -> MutexGuard<'_, Vec<Run>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until so many tasks have been accepted and all of them have come to their end.
pub(crate) async fn settled(layer: &DeferLayer, tasks: u64) {
    let executor = layer.get_executor();
    eventually("all tasks settle", || {
        let now = executor.snapshot();
        assert!(now.accepted <= tasks, "more than {tasks}: {now:?}");
        now.accepted == tasks && now.outstanding == 0
    })
    .await;
}

/// As [`settled`], and no request is open either: one that leaked would hold up every drain.
pub(crate) async fn quiet(layer: &DeferLayer, tasks: u64) {
    settled(layer, tasks).await;
    let executor = layer.get_executor();
    eventually("the end of all requests", || {
        executor.snapshot().open_requests == 0
    })
    .await;
}
