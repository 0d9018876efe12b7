//! Capture mode of the test kit: tasks that were released and are not to run.

use super::Shared;
use crate::observe;
use crate::sync::{Arc, Mutex};
use crate::task::{Fifo, Node};

/// None: everything runs.
#[derive(Debug, Default)]
pub(crate) struct Held(Mutex<Option<Fifo<Node>>>);

impl Held {
    pub(crate) fn hold(&self) {
        self.0.lock().get_or_insert_with(Fifo::new);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.lock().is_some()
    }

    /// Gives the task back where it may run.
    pub(super) fn keep(&self, node: Node) -> Option<Node> {
        match &mut *self.0.lock() {
            Some(held) => {
                held.push(node);
                None
            }
            None => Some(node),
        }
    }

    pub(super) fn keep_all(&self, mut tasks: Fifo<Node>) -> Fifo<Node> {
        let mut free = Fifo::new();
        while let Some(node) = tasks.pop() {
            if let Some(node) = self.keep(node) {
                free.push(node);
            }
        }
        free
    }

    pub(super) fn remove(&self, is_it: impl FnMut(&Node) -> bool) -> Option<Node> {
        self.0.lock().as_mut()?.remove(is_it)
    }

    pub(super) fn take_all(&self) -> Fifo<Node> {
        match &mut *self.0.lock() {
            Some(held) => std::mem::replace(held, Fifo::new()),
            None => Fifo::new(),
        }
    }
}

impl Shared {
    /// Runs what is held, and from now on everything.
    pub(crate) fn run_held(self: &Arc<Self>) {
        let held = self.held.0.lock().take();
        if let Some(held) = held {
            self.enqueue_due(held);
        }
    }

    /// Drops what is held: it holds its request, which holds the executor.
    pub(crate) fn drop_held(&self) {
        let mut held = self.held.take_all();
        while let Some(node) = held.pop() {
            let is_lent = node.is_lent();
            observe::panic_in_drop(node.drop_quietly());
            // The place of what is lent is its keeper's.
            if !is_lent {
                self.give_back();
            }
        }
    }

    /// Has what waits for a retry tried at once.
    pub(crate) fn retry_now(self: &Arc<Self>) {
        let now = self.clock.now();
        let mut waiting = self.waiting.take_all();
        let mut due = Fifo::new();
        while let Some(mut node) = waiting.pop() {
            node.settings_mut().due_at = now;
            due.push(node);
        }
        if !due.is_empty() {
            self.enqueue_due(due);
        }
    }
}
