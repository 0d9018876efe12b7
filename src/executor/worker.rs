//! A worker: takes tasks from the queue and runs their attempts, one after the other.
//!
//! A burst of tasks shares its workers, and that is why a bounded queue costs less than a
//! `tokio::spawn` for each.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::yield_now;

use super::Shared;
use super::alarm::Alarm;
use super::attempt::{self, Begun, Deadline, Outcome};
use super::queue::{self, Next, Wake};
use super::report::UnfinishedState;
use super::running::Slot;
use crate::observe;
use crate::response::ResponseInfo;
use crate::sync::Arc;
use crate::task::{Kind, Node};

/// A worker as the runtime has it. Written out, because the future of an `async fn` keeps what it is given
/// twice, and its state behind both. When a task has waited for 5 ms, its worker is not in the processor's
/// cache any more, and the first look at each line of it takes 100 ns: the line of that state was 61 of
/// 5,056 samples of a server's CPU.
#[pin_project]
#[repr(C)]
struct Run<Y, M> {
    /// So often others of its thread go first.
    turns: u32,
    worker: Worker,
    #[pin]
    turn: Option<Y>,
    new_turn: M,
}

/// What a poll looks at first stands first.
#[repr(C)]
struct Worker {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    /// What has begun and waits: here and not in a future of its own, so that the drop below finds
    /// it. A task that is ready at once is begun, polled and settled within one poll of its worker: no
    /// future, and no state of one, is made for it (440 of its 1,726 instructions).
    current: Option<(Node, Begun)>,
    me: queue::Worker,
    alarm: Alarm,
    /// It has been polled: its runtime was there.
    polled: bool,
    ended: bool,
}

/// Why a worker stops.
enum Turn {
    /// Others of its thread go first, so many times.
    Yield(u32),
    End,
}

/// Starts a worker where the executor runs.
#[cold]
pub(super) fn start(shared: &Arc<Shared>, me: queue::Worker) {
    let Some(runtime) = shared.usable_runtime() else {
        // What is queued stays queued until the executor is used where there is one.
        shared.queue.abandon(&me);
        return;
    };
    let slot = shared.slots.add(shared.limit);
    let worker = Worker {
        shared: shared.clone(),
        slot: slot.clone(),
        current: None,
        me,
        alarm: Alarm::default(),
        polled: false,
        ended: false,
    };
    let run = Run {
        turns: 0,
        worker,
        turn: None,
        new_turn: yield_now,
    };
    slot.set_abort(runtime.spawn(run).abort_handle());
    // A drain that gave up before the handle was there could not use it.
    if shared.drain.is_abandoned() {
        slot.abort();
    }
    shared.resume_timer();
}

impl<Y: Future<Output = ()>, M: Fn() -> Y> Future for Run<Y, M> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        this.worker.polled = true;
        loop {
            while *this.turns > 0 {
                if this.turn.is_none() {
                    this.turn.set(Some((this.new_turn)()));
                }
                if let Some(turn) = this.turn.as_mut().as_pin_mut() {
                    ready!(turn.poll(cx));
                }
                this.turn.set(None);
                *this.turns -= 1;
            }
            match ready!(this.worker.poll(cx)) {
                Turn::Yield(turns) => *this.turns = turns,
                Turn::End => return Poll::Ready(()),
            }
        }
    }
}

impl Worker {
    /// Runs one task after the other, until one waits or there is none.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        if let Some((mut node, mut begun)) = self.current.take() {
            if begun.is_plain {
                ready!(self.run_plain(node, begun.deadline, cx));
            } else {
                let polled = attempt::poll_once(&mut node, &mut begun, cx);
                ready!(self.attempted(node, begun, polled, cx));
            }
        }
        loop {
            match self.shared.queue.next(&mut self.me, cx.waker()) {
                Next::Run(node, others) => {
                    if others {
                        self.shared.tell_another();
                    }
                    ready!(self.begin(node, cx));
                }
                Next::YieldFirst => return Poll::Ready(Turn::Yield(yields())),
                Next::YieldOnce => return Poll::Ready(Turn::Yield(1)),
                // The watch retires it, and it needs no timer for that: 500 of 3,900 instructions of a task
                // that comes alone.
                Next::Park => return Poll::Pending,
                Next::End => {
                    self.ended = true;
                    return Poll::Ready(Turn::End);
                }
            }
        }
    }

    /// The short way of nearly every task: nothing was set for it, nobody listens, and it ends well in
    /// its first poll. It does what [`begin_with_care`](Self::begin_with_care) does, without asking for
    /// what such a task cannot have.
    #[inline(always)]
    fn begin(&mut self, node: Node, cx: &mut Context<'_>) -> Poll<()> {
        let refused = node.response().is_some_and(ResponseInfo::is_failure);
        let about = node.body().about();
        if refused
            || node.settings().is_some()
            || about.kind != Kind::Async
            || observe::attempts_are_seen()
            || self.shared.drain.is_abandoned()
        {
            return self.begin_with_care(node, cx);
        }
        attempt::begin_plain(&self.shared, &node, about.name, &self.slot);
        self.run_plain(node, None, cx)
    }

    /// A poll of a plain task. Until it has to wait, there is no [`Begun`] to be made or dropped: 19 of 616
    /// instructions.
    #[inline(always)]
    fn run_plain(
        &mut self,
        mut node: Node,
        deadline: Option<Deadline>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        match attempt::poll_plain(&mut node, cx) {
            None if !self.slot.end_plain() => self.shared.completed(node),
            None => self.shared.ended_after_all(node, Outcome::Completed),
            Some(Ok(Poll::Pending)) => return self.wait(node, Begun::plain(deadline), cx),
            Some(polled) => return self.did_not_complete(node, deadline, polled, cx),
        }
        Poll::Ready(())
    }

    #[inline(never)]
    fn did_not_complete(
        &mut self,
        mut node: Node,
        deadline: Option<Deadline>,
        polled: attempt::Polled,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        match polled {
            Ok(Poll::Ready(Err(error))) if self.slot.end_plain() => {
                self.shared.ended_after_all(node, Outcome::Failed(error));
            }
            Ok(Poll::Ready(Err(error))) => self.shared.failed_with(node, error),
            polled => {
                let polled = attempt::outcome(&mut node, polled);
                return self.attempted(node, Begun::plain(deadline), polled, cx);
            }
        }
        Poll::Ready(())
    }

    #[inline(never)]
    fn begin_with_care(&mut self, mut node: Node, cx: &mut Context<'_>) -> Poll<()> {
        // By the drain's second invariant: taken before the queue was emptied, started after it.
        if self.shared.drain.is_abandoned() {
            let state = UnfinishedState::unstarted(&node);
            self.shared.cancel(node, state);
            return Poll::Ready(());
        }
        // A drain takes no new attempt from a store. Asked second: the first is nearly always false.
        if node.is_lent() && self.shared.drain.has_begun() {
            self.shared.cancel(node, UnfinishedState::NeverStarted);
            return Poll::Ready(());
        }
        if !node.is_lent() && self.shared.is_too_late(&node) {
            self.shared.give_up(node);
            return Poll::Ready(());
        }
        if let Some(outcome) = attempt::admit(&self.shared, &mut node, &self.slot) {
            self.shared.settle(node, outcome, None, &self.slot);
            return Poll::Ready(());
        }
        let mut begun = attempt::begin(&self.shared, &node, &self.slot);
        let polled = attempt::poll_once(&mut node, &mut begun, cx);
        self.attempted(node, begun, polled, cx)
    }

    /// After a poll of the user's code, which is the only one that the worker's drop cannot find the
    /// task in: it does not unwind.
    #[inline]
    fn attempted(
        &mut self,
        node: Node,
        mut begun: Begun,
        polled: Poll<Outcome>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        match polled {
            Poll::Ready(outcome) => {
                self.shared
                    .settle(node, outcome, Some(&mut begun), &self.slot);
                Poll::Ready(())
            }
            Poll::Pending => self.wait(node, begun, cx),
        }
    }

    #[inline(never)]
    fn wait(&mut self, mut node: Node, mut begun: Begun, cx: &mut Context<'_>) -> Poll<()> {
        let (deadline, now) = attempt::deadline(&self.shared, &node, &mut begun, &self.slot);
        if self
            .alarm
            .poll_until(&self.shared.clock, deadline, now, cx)
            .is_pending()
        {
            self.current = Some((node, begun));
            return Poll::Pending;
        }
        let outcome = attempt::time_out(&mut node, &begun);
        self.shared
            .settle(node, outcome, Some(&mut begun), &self.slot);
        Poll::Ready(())
    }
}

/// How often a worker lets others of its thread go first. A current-thread runtime takes its tasks in
/// turn, but of those that yield in the same turn it takes the last one first, and a connection that has used up
/// its turn yields: so twice. A multi-thread one polls the task that was woken last before the others of
/// its thread, and now and then that is the worker: with one yield a task began before the response's
/// last write in 24 of 2,800 HTTP/2 requests to such a runtime of one thread, with three in none (what
/// `cargo bench --bench last_byte -- 200 h2` calls overtaken).
fn yields() -> u32 {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => 2,
        _ => 3,
    }
}

impl Drop for Worker {
    /// The end of a worker's own time, or of its runtime. In the latter case what it ran is lost with
    /// the runtime: it is counted, and its place is free.
    fn drop(&mut self) {
        if let Some((node, _)) = self.current.take() {
            self.shared.interrupted(node, &self.slot);
        }
        // Not before: a drain at its deadline finds what is being interrupted in its slot.
        self.shared.slots.remove(&self.slot);
        if self.ended {
            return;
        }
        match self.shared.queue.leave(&self.me) {
            // The runtime is ending, or there is none; a new worker would end at once and come here
            // again. What is queued stays queued until the executor is used where there is a runtime.
            // A panic of our own is no such end, unless somebody else's unwinding brought us here.
            Wake::Start(worker) if !self.polled || !std::thread::panicking() => {
                self.shared.queue.abandon(&worker);
                self.shared.tell_if_stranded();
            }
            wake => self.shared.wake(wake),
        }
    }
}
