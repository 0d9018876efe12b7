//! A task that was not accepted: counted, and explained now and then, so that the operator learns what
//! fills the capacity.
//!
//! What its caller gets is a [`Rejected`](super::Rejected).

use super::Shared;
use super::rejected::RejectReason;
use crate::observe;
use crate::task::Node;

impl Shared {
    /// Counts a task that was not accepted, and says so now and then.
    pub(crate) fn reject(&self, node: &Node, reason: RejectReason) {
        match reason {
            RejectReason::Full => self.counters.rejected_full.add(1),
            RejectReason::RequestLimit => self.counters.rejected_request.add(1),
            RejectReason::Closed => self.counters.rejected_closed.add(1),
        }
        observe::rejected(self, node, reason);
    }

    /// The same for a task that nobody gets back: its drop must not panic in the handler's face.
    pub(crate) fn reject_for_good(&self, node: Node, reason: RejectReason) {
        self.reject(&node, reason);
        observe::panic_in_drop(node.drop_quietly());
    }

    pub(crate) fn complaint_is_due(&self, reason: RejectReason) -> bool {
        self.complaints.of(reason).is_due(self.clock.now())
    }

    pub(crate) fn rejections(&self) -> u64 {
        let c = &self.counters;
        c.rejected_full.get() + c.rejected_request.get() + c.rejected_closed.get()
    }

    /// For the operator who asks what takes up all the room.
    pub(crate) fn what_fills_it(&self) -> String {
        let mut queued = Vec::new();
        self.queue.for_each(|node| queued.push(node.name()));
        self.blocking.for_each(|node| queued.push(node.name()));
        let mut waiting = Vec::new();
        self.waiting.for_each(|node| waiting.push(node.name()));
        let running: Vec<_> = self.slots.running().into_iter().map(|r| r.name).collect();
        let taken = self.admission.taken();
        let elsewhere = taken.saturating_sub(queued.len() + waiting.len() + running.len());
        let mut said = Vec::new();
        for (state, names) in [
            ("queued", queued),
            ("waiting", waiting),
            ("running", running),
        ] {
            if !names.is_empty() {
                let count = names.len();
                said.push(format!(
                    "{count} {state} ({})",
                    observe::commonest(names.into_iter())
                ));
            }
        }
        if elsewhere > 0 {
            said.push(format!(
                "{elsewhere} reserved or held by responses under way"
            ));
        }
        said.join("; ")
    }
}
