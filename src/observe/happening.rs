//! What happens to a task, told once to everyone who counts: the metrics and the test kit.

use std::time::Duration;

use crate::executor::{RejectReason, Shared};
use crate::response::End;
use crate::task::{Name, Node};

/// A transition. It borrows everything: where nobody counts, nothing is paid.
#[derive(Debug)]
#[cfg_attr(
    not(all(feature = "metrics", feature = "test-util")),
    expect(dead_code, reason = "each feature reads its part")
)]
pub(crate) enum Happening<'a> {
    Accepted(&'a Node),
    Rejected(&'a Node, RejectReason),
    /// The tasks of a response were released.
    Released(End),
    /// An attempt begins, after this wait.
    Began(&'a Name, Duration),
    AttemptEnded {
        name: &'a Name,
        outcome: &'static str,
        took: Duration,
    },
    /// What is said of its failed attempt stands in the task only later.
    Retrying {
        node: &'a Node,
        attempt: u32,
        error: &'a str,
    },
    /// The task is over.
    Ended {
        node: &'a Node,
        outcome: &'static str,
        reason: Option<&'static str>,
        error: Option<&'a str>,
    },
    /// It was counted as cancelled though its attempt goes on.
    Abandoned(&'a crate::executor::Running),
    Stuck(&'a Name),
    Replayed(&'a Node),
    DeadLetterLost(&'a str),
}

pub(crate) fn note(shared: &Shared, happening: Happening<'_>) {
    #[cfg(feature = "metrics")]
    super::metrics::note(shared, &happening);
    #[cfg(feature = "test-util")]
    shared.ears.note(&happening);
    let _ = (shared, happening);
}

/// The numbers of queued, running or waiting tasks may have changed.
pub(crate) fn changed(shared: &Shared) {
    #[cfg(feature = "metrics")]
    super::metrics::publish(shared);
    #[cfg(feature = "test-util")]
    shared.ears.changed();
    let _ = shared;
}

/// A task's place in the capacity is free.
pub(crate) fn place_freed(shared: &Shared) {
    #[cfg(feature = "test-util")]
    shared.ears.changed();
    let _ = shared;
}

/// The executor is dropped.
pub(crate) fn gone(shared: &Shared) {
    #[cfg(feature = "metrics")]
    super::metrics::retract(shared);
    let _ = shared;
}
