//! The timer: hands over the retries that are due. One for all of them, in one task of the runtime that lives
//! while there is something to wait for.

use super::Shared;
use super::waiting::Timer;
use crate::clock::Tick;
use crate::observe;
use crate::sync::Arc;
use crate::task::{AttemptRecord, Fifo, Node};

impl Shared {
    /// Puts a task aside until its next attempt; a drain gives it that attempt at once, as its last.
    pub(super) fn retry_at(self: &Arc<Self>, node: Node, failure: AttemptRecord, due: Tick) {
        match self.waiting.add(node, failure, due) {
            Timer::Leave => {}
            Timer::Tell => self.waiting.earlier.notify_one(),
            Timer::Start => self.start_timer(),
        }
        // After it was added: a drain that began before then finds it here, one that begins now, there.
        if self.drain.has_begun() {
            self.hurry();
        }
        observe::changed(self);
    }

    /// Gives everything that waits its next attempt now, as its last.
    pub(super) fn hurry(self: &Arc<Self>) {
        let now = self.clock.now();
        let mut waiting = self.waiting.take_all();
        let mut hurried = Fifo::new();
        while let Some(mut node) = waiting.pop() {
            let settings = node.settings_mut();
            settings.last_chance = true;
            settings.due_at = now;
            hurried.push(node);
        }
        self.enqueue_due(hurried);
    }

    /// A retry that outlived the timer's runtime goes on with another.
    pub(super) fn resume_timer(self: &Arc<Self>) {
        if self.waiting.resume() {
            self.start_timer();
        }
    }

    fn start_timer(self: &Arc<Self>) {
        let Some(runtime) = self.usable_runtime() else {
            self.waiting.timer_ended();
            return;
        };
        let timer = RunningTimer {
            shared: self.clone(),
            ended: false,
        };
        runtime.spawn(timer.run());
    }
}

/// Clears the mark when the runtime drops the timer, so that the next retry starts another.
struct RunningTimer {
    shared: Arc<Shared>,
    ended: bool,
}

impl RunningTimer {
    async fn run(mut self) {
        let shared = self.shared.clone();
        loop {
            let now = shared.clock.now();
            let due = shared.waiting.due(now, |node| shared.give_up_at(node));
            for (at, waiter) in due.too_late {
                shared.give_up(waiter.into_node(at));
            }
            let mut may_start = Fifo::new();
            for (at, waiter) in due.may_start {
                may_start.push(waiter.into_node(at));
            }
            if !may_start.is_empty() {
                shared.enqueue_due(may_start);
            }
            let Some(next) = due.next else {
                // `due` has cleared the mark, under its lock; a retry added since has its own timer.
                self.ended = true;
                return;
            };
            if next <= now {
                // There is more. Its timer would be ready at once, and what runs the tasks wait.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep_until(shared.clock.instant(next)) => {}
                () = shared.waiting.earlier.notified() => {}
            }
        }
    }
}

impl Drop for RunningTimer {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.waiting.timer_ended();
            self.shared.tell_if_stranded();
        }
    }
}
