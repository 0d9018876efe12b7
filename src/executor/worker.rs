//! A worker: takes tasks from the queue and runs their attempts, one after the other.
//!
//! A burst of tasks shares its workers, and that is why a bounded queue costs less than a
//! `tokio::spawn` for each.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Sleep;

use super::Shared;
use super::attempt;
use super::queue::{self, Next, Wake};
use super::report::UnfinishedState;
use super::running::Slot;
use crate::clock::{Clock, Tick};
use crate::sync::Arc;
use crate::task::Node;

/// How long an idle worker stays parked. It costs a few hundred bytes; starting one costs a spawn.
const IDLE: Duration = Duration::from_secs(10);

/// After so many tasks in one go a worker lets others of its thread go first. Sixteen make the yield
/// invisible in the cost of a task (a sixteenth of about 200 instructions).
const FAIR: u32 = 16;

struct Worker {
    shared: Arc<Shared>,
    me: queue::Worker,
    slot: Arc<Slot>,
    /// What runs now: here and not in a future of its own, so that the drop below finds it.
    current: Option<Node>,
    /// It has been polled: its runtime was there.
    begun: bool,
    ended: bool,
}

/// Starts a worker where the executor runs.
pub(super) fn start(shared: &Arc<Shared>, me: queue::Worker) {
    let Some(runtime) = shared.usable_runtime() else {
        // What is queued stays queued until the executor is used where there is one.
        shared.queue.abandon(&me);
        return;
    };
    let slot = shared.slots.add();
    let worker = Worker {
        shared: shared.clone(),
        me,
        slot: slot.clone(),
        current: None,
        begun: false,
        ended: false,
    };
    slot.set_abort(runtime.spawn(worker.run()).abort_handle());
    // A drain that gave up before the handle was there could not use it.
    if shared.drain.is_abandoned() {
        slot.abort();
    }
    shared.resume_timer();
}

impl Worker {
    async fn run(mut self) {
        self.begun = true;
        let mut alarm = Alarm::default();
        let mut in_a_row = 0;
        loop {
            let next = poll_fn(|cx| self.poll_next(&mut alarm, cx)).await;
            match next {
                None => return,
                Some(Next::YieldFirst) => {
                    in_a_row = 0;
                    tokio::task::yield_now().await;
                }
                Some(Next::Run(node)) => {
                    self.run_task(node, &mut alarm).await;
                    in_a_row += 1;
                    // With nothing in its hands: what a runtime drops here is still queued.
                    if in_a_row == FAIR {
                        in_a_row = 0;
                        tokio::task::yield_now().await;
                    }
                }
            }
        }
    }

    async fn run_task(&mut self, mut node: Node, alarm: &mut Alarm) {
        // By the drain's second invariant: taken before the queue was emptied, started after it.
        if self.shared.drain.is_abandoned() {
            let state = UnfinishedState::unstarted(&node);
            self.shared.cancel(node, state);
            return;
        }
        if self.shared.is_too_late(&node) {
            self.shared.give_up(node);
            return;
        }
        if let Some(outcome) = attempt::admit(&mut node) {
            self.shared.settle(node, outcome, None, &self.slot);
            return;
        }
        let mut begun = attempt::begin(&self.shared, &node, &self.slot);
        let node = self.current.insert(node);
        let outcome = attempt::run(&self.shared, node, &mut begun, &self.slot, alarm).await;
        if let Some(node) = self.current.take() {
            self.shared.settle(node, outcome, Some(begun), &self.slot);
        }
    }

    fn poll_next(&mut self, alarm: &mut Alarm, cx: &mut Context<'_>) -> Poll<Option<Next<Node>>> {
        let (next, wake) = self.shared.queue.poll_next(&mut self.me, cx.waker());
        self.shared.wake(wake);
        if let Poll::Ready(next) = next {
            alarm.idle_until = None;
            return Poll::Ready(Some(next));
        }
        ready!(alarm.poll_idle(&self.shared.clock, cx));
        if self.shared.queue.expire(&self.me) {
            self.ended = true;
            return Poll::Ready(None);
        }
        // Told in this very moment: the waker has been called, the next poll takes what there is.
        Poll::Pending
    }
}

impl Drop for Worker {
    /// The end of a worker's own time, or of its runtime. In the latter case what it ran is lost with
    /// the runtime: it is counted, and its place is free.
    fn drop(&mut self) {
        self.shared.slots.remove(&self.slot);
        if let Some(node) = self.current.take() {
            self.shared.interrupted(node, &self.slot);
        }
        if self.ended {
            return;
        }
        match self.shared.queue.leave(&self.me) {
            // The runtime is ending, or there is none; a new worker would end at once and come here
            // again. What is queued stays queued until the executor is used where there is a runtime.
            // A panic of our own is no such end, unless somebody else's unwinding brought us here.
            Wake::Start(worker) if !self.begun || !std::thread::panicking() => {
                self.shared.queue.abandon(&worker);
                self.shared.tell_if_stranded();
            }
            wake => self.shared.wake(wake),
        }
    }
}

/// One timer per worker, for the timeouts of its attempts and for its own idle time.
///
/// It is moved only when it is too late for what it is wanted for: armed for an attempt that has ended
/// since, it goes off early and is then set again. So attempts that end in time, which is nearly all
/// of them, do not touch the runtime's timer wheel.
#[derive(Default)]
pub(super) struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    /// When the timer goes off, if it is armed.
    at: Option<Tick>,
    idle_until: Option<Tick>,
}

impl Alarm {
    pub(super) fn poll_until(
        &mut self,
        clock: &Clock,
        deadline: Tick,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            let at = match self.at {
                Some(at) if at <= deadline => at,
                _ => {
                    self.set(clock, deadline);
                    deadline
                }
            };
            match &mut self.sleep {
                Some(sleep) => ready!(sleep.as_mut().poll(cx)),
                None => return Poll::Pending,
            }
            self.at = None;
            if at >= deadline {
                return Poll::Ready(());
            }
        }
    }

    /// Ready when the worker has been idle for a while: between once and twice [`IDLE`], because a
    /// timer left over from an attempt is waited for first.
    fn poll_idle(&mut self, clock: &Clock, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match (self.at, self.idle_until) {
                (Some(at), _) => {
                    ready!(self.poll_until(clock, at, cx));
                    if self.idle_until == Some(at) {
                        return Poll::Ready(());
                    }
                }
                (None, _) => {
                    let until = clock.now().saturating_add(IDLE);
                    self.idle_until = Some(until);
                    self.set(clock, until);
                }
            }
        }
    }

    fn set(&mut self, clock: &Clock, at: Tick) {
        let instant = clock.instant(at);
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().reset(instant),
            None => self.sleep = Some(Box::pin(tokio::time::sleep_until(instant))),
        }
        self.at = Some(at);
    }
}
