//! Rejections: counted always, complained about now and then.

use std::collections::HashMap;
use std::time::Duration;

use tracing::{Level, debug, warn};

use super::events::{TARGET, enabled};
use super::happening::{Happening, note};
use crate::clock::Tick;
use crate::executor::{RejectReason, Shared};
use crate::sync::Mutex;
use crate::task::{Name, Node};

/// When the last complaint about rejected tasks was made: the first one is said, then one a minute.
#[derive(Debug, Default)]
pub(crate) struct Complaint(Mutex<Option<Tick>>);

impl Complaint {
    const EVERY: Duration = Duration::from_secs(60);

    pub(crate) fn is_due(&self, now: Tick) -> bool {
        let mut last = self.0.lock();
        let due = last.is_none_or(|last| now.since(last) >= Self::EVERY);
        if due {
            *last = Some(now);
        }
        due
    }
}

/// One for each reason: a request at its limit does not hide that the executor is full.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    full: Complaint,
    request_limit: Complaint,
    closed: Complaint,
}

impl Complaints {
    pub(crate) fn of(&self, reason: RejectReason) -> &Complaint {
        match reason {
            RejectReason::Full => &self.full,
            RejectReason::RequestLimit => &self.request_limit,
            RejectReason::Closed => &self.closed,
        }
    }
}

/// A task was not accepted. What fills the executor is looked up only when it is said.
pub(crate) fn rejected(shared: &Shared, node: &Node, reason: RejectReason) {
    note(shared, Happening::Rejected(node, reason));
    if !enabled(Level::WARN) {
        return;
    }
    if !shared.complaint_is_due(reason) {
        debug!( target: TARGET, { task.name = node.name().as_str(),
            reason = reason.as_str() }, "task rejected");
        return;
    }
    let filling = match reason {
        RejectReason::Full => shared.what_fills_it(),
        RejectReason::RequestLimit | RejectReason::Closed => String::new(),
    };
    warn!( target: TARGET, { task.name = node.name().as_str(),
        task.location = %node.header().location,
        reason = reason.as_str(),
        executor = shared.config.name.as_str(),
        capacity = shared.admission.capacity(),
        rejected_so_far = shared.rejections(),
        filling }, "task rejected (said at most once a minute)");
}

/// The commonest names, as `name × count`.
pub(crate) fn commonest(names: impl Iterator<Item = Name>) -> String {
    let mut counts: HashMap<Name, usize> = HashMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.as_str().cmp(b.0.as_str())));
    let shown: Vec<String> = counts
        .iter()
        .take(3)
        .map(|(name, count)| format!("{} × {count}", name.as_str()))
        .collect();
    shown.join(", ")
}
