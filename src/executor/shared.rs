//! What the parts of an executor share, and the way of a task into the queue.

use std::ops::Deref;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::{Admission, NoPlace};
use super::blocking::BlockingLane;
use super::builder::{Config, Overflow};
use super::counters::Counters;
use super::dead_letters::{self, Letters};
use super::dedicated::OwnRuntime;
use super::drain::Drain;
use super::place::Place;
use super::queue::{Queue, Wake};
use super::rejected::RejectReason;
use super::report::UnfinishedState;
use super::requests::Requests;
use super::running::Slots;
use super::waiting::Waiting;
use super::watch::Watch;
use super::worker;
use crate::clock::{Clock, Tick};
use crate::observe;
use crate::retry::DiscardReason;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Mutex, Ordering};
use crate::task::{Fifo, Node, Origin};

pub(crate) struct Shared {
    pub(crate) config: Config,
    /// How long an attempt may take at most, of a task that says nothing of it.
    pub(super) limit: Duration,
    pub(crate) clock: Clock,
    pub(crate) admission: Admission,
    pub(crate) counters: Counters,
    pub(super) queue: Queue<Node>,
    pub(super) waiting: Waiting,
    pub(super) blocking: BlockingLane,
    pub(super) slots: Slots,
    pub(super) letters: Letters,
    pub(super) drain: Drain,
    pub(super) watch: Watch,
    pub(super) complaints: observe::Complaints,
    /// That there is no usable runtime is said now and then, not for every task.
    pub(super) no_runtime: observe::Complaint,
    pub(super) requests: Requests,
    #[cfg(feature = "test-util")]
    pub(crate) held: super::held::Held,
    #[cfg(feature = "test-util")]
    pub(crate) ears: crate::test_util::Ears,
    #[cfg(feature = "metrics")]
    pub(crate) gauges: observe::Gauges,
    /// Whoever waits for the executor to be quiet.
    pub(super) watchers: AtomicUsize,
    pub(super) quiet: Notify,
    /// The runtime seen last, for a release that happens outside of one.
    pub(super) last_runtime: Mutex<Option<Handle>>,
    /// There is one, and there will be: asked for each request that defers something.
    pub(super) knows_runtime: AtomicBool,
    pub(super) own_runtime: OwnRuntime,
}

impl Shared {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            clock: Clock::new(),
            admission: Admission::new(config.capacity),
            counters: Counters::default(),
            queue: Queue::new(config.concurrency),
            waiting: Waiting::new(config.budget),
            blocking: BlockingLane::new(config.blocking_concurrency),
            slots: Slots::default(),
            letters: Letters::new(config.dead_letters),
            drain: Drain::default(),
            watch: Watch::default(),
            complaints: observe::Complaints::default(),
            no_runtime: observe::Complaint::default(),
            requests: Requests::default(),
            #[cfg(feature = "test-util")]
            held: super::held::Held::default(),
            #[cfg(feature = "test-util")]
            ears: crate::test_util::Ears::default(),
            #[cfg(feature = "metrics")]
            gauges: observe::Gauges::default(),
            watchers: AtomicUsize::new(0),
            quiet: Notify::new(),
            last_runtime: Mutex::new(None),
            knows_runtime: AtomicBool::new(false),
            own_runtime: OwnRuntime::default(),
            limit: config.timeout.min(config.retry.age_limit()),
            config,
        }
    }

    /// Reserves a place by the policy of `run`.
    #[inline]
    pub(crate) fn admit(&self) -> Result<Place<&Self>, RejectReason> {
        match self.admission.try_take() {
            Ok(()) => Ok(Place::new(self)),
            Err(NoPlace::Full) if self.config.overflow == Overflow::DropOldest => {
                self.admit_instead()
            }
            Err(none) => Err(none.into()),
        }
    }

    #[cold]
    fn admit_instead(&self) -> Result<Place<&Self>, RejectReason> {
        if dead_letters::is_within_hook() {
            return Err(RejectReason::Full);
        }
        let oldest = self.pop_oldest().ok_or(RejectReason::Full)?;
        // Its place goes to the new task directly: given back, another could take it.
        self.discard(
            oldest,
            DiscardReason::Overflow,
            "made room for a newer task".into(),
        );
        observe::changed(self);
        Ok(Place::new(self))
    }

    /// The oldest task that has not started, of the queue or of the blocking lane.
    fn pop_oldest(&self) -> Option<Node> {
        let quick = self.queue.oldest(|node| node.header().queued_at);
        let blocking = self.blocking.pop_older(quick);
        // What a store lent would only come back from there.
        blocking.or_else(|| self.queue.pop_oldest(|node| !node.is_lent()))
    }

    #[inline]
    pub(crate) fn try_admit(&self) -> Result<Place<&Self>, RejectReason> {
        self.admission.try_take()?;
        Ok(Place::new(self))
    }

    /// As [`try_admit`](Self::try_admit), for who keeps the place.
    #[cfg(feature = "events")]
    pub(crate) fn try_place(self: &Arc<Self>) -> Option<Place> {
        self.admission.try_take().ok()?;
        Some(Place::new(self.clone()))
    }

    /// Accepts a task whose place is its keeper's.
    #[cfg(feature = "events")]
    pub(crate) fn accept_lent(&self, node: &mut Node) {
        node.identify();
        self.counters.accepted.add(1);
        observe::accepted(self, node);
    }

    /// Gives a task, which has its identity, its place.
    #[inline]
    pub(crate) fn accept<H: Deref<Target = Self>>(&self, node: &Node, place: Place<H>) {
        place.keep();
        self.counters.accepted.add(1);
        observe::accepted(self, node);
    }

    /// Hands accepted tasks over, with where they come from and the time, which the caller has read. It
    /// runs no code of the user's, and may be called from anywhere.
    #[inline]
    pub(crate) fn enqueue(self: &Arc<Self>, mut tasks: Fifo<Node>, origin: Arc<Origin>, now: Tick) {
        if self.drain.is_abandoned() {
            // Not by way of the queue: a worker on another thread would take them from there.
            return self.cancel_all(tasks, UnfinishedState::NeverStarted);
        }
        match tasks.take_only() {
            Some(mut node) => {
                node.header_mut().origin = Some(origin);
                self.enqueue_alone(node, now);
            }
            None => self.enqueue_all(tasks, &origin, now),
        }
    }

    #[inline(never)]
    fn enqueue_all(self: &Arc<Self>, mut tasks: Fifo<Node>, origin: &Arc<Origin>, now: Tick) {
        let mut blocking = false;
        tasks.for_each_mut(|node| {
            blocking |= node.is_blocking();
            #[cfg(feature = "events")]
            node.tell_released();
            let header = node.header_mut();
            header.queued_at = now;
            header.origin = Some(origin.clone());
        });
        #[cfg(feature = "test-util")]
        let mut tasks = self.held.keep_all(tasks);
        if blocking {
            tasks = self.sort(tasks);
        }
        if !tasks.is_empty() {
            self.wake(self.queue.push(tasks, origin.others_first));
        }
        observe::changed(self);
        self.cancel_if_abandoned();
    }

    /// As [`enqueue`](Self::enqueue), for one.
    #[inline]
    pub(crate) fn enqueue_one(self: &Arc<Self>, mut node: Node, origin: Option<Arc<Origin>>) {
        if origin.is_some() {
            node.header_mut().origin = origin;
        }
        self.enqueue_alone(node, self.clock.now());
    }

    /// In line: 21 of the 95 instructions in which a response's one task is handed over.
    #[inline(always)]
    fn enqueue_alone(self: &Arc<Self>, mut node: Node, now: Tick) {
        #[cfg(feature = "events")]
        node.tell_released();
        node.header_mut().queued_at = now;
        #[cfg(feature = "test-util")]
        let Some(node) = self.held.keep(node) else {
            return observe::changed(self);
        };
        if node.is_blocking() {
            self.push_blocking(node);
        } else {
            let origin = node.header().origin.as_ref();
            let others_first = origin.is_some_and(|origin| origin.others_first);
            self.wake(self.queue.push_one(node, others_first));
        }
        observe::changed(self);
        self.cancel_if_abandoned();
    }

    #[cold]
    fn push_blocking(self: &Arc<Self>, node: Node) {
        // Its thread has no runtime; a retry will need one for its timer.
        self.see_runtime();
        self.blocking.push(self, node);
    }

    /// Hands tasks over whose retry is due.
    pub(super) fn enqueue_due(self: &Arc<Self>, mut tasks: Fifo<Node>) {
        if self.drain.is_abandoned() {
            return self.cancel_all(tasks, UnfinishedState::Waiting);
        }
        let mut quick = Fifo::new();
        while let Some(node) = tasks.pop() {
            if node.is_blocking() {
                self.blocking.push_due(self, node);
            } else {
                quick.push(node);
            }
        }
        if !quick.is_empty() {
            self.wake(self.queue.push_due(quick));
        }
        observe::changed(self);
        self.cancel_if_abandoned();
    }

    /// Blocking tasks have a lane of their own; the others are returned.
    fn sort(self: &Arc<Self>, mut tasks: Fifo<Node>) -> Fifo<Node> {
        let mut quick = Fifo::new();
        while let Some(node) = tasks.pop() {
            if node.is_blocking() {
                self.push_blocking(node);
            } else {
                quick.push(node);
            }
        }
        quick
    }

    /// After a push: a drain that gave up before it saw a queue without these, one that gives up
    /// after it takes them.
    fn cancel_if_abandoned(&self) {
        if self.drain.is_abandoned() {
            self.cancel_queued();
        }
    }

    /// Does what the queue decided.
    #[inline]
    pub(super) fn wake(self: &Arc<Self>, wake: Wake) {
        if let Wake::Nobody = wake {
            return;
        }
        self.wake_one(wake);
    }

    /// Out of line: of a burst it is one task that wakes.
    #[cold]
    #[inline(never)]
    fn wake_one(self: &Arc<Self>, wake: Wake) {
        match wake {
            Wake::Nobody => {}
            Wake::Unpark(waker) => waker.wake(),
            Wake::Start(worker) => worker::start(self, worker),
        }
    }

    /// A worker leaves tasks behind.
    #[cold]
    pub(super) fn tell_another(self: &Arc<Self>) {
        self.wake(self.queue.poke());
    }

    /// A task reached its end: its place is free.
    #[inline]
    pub(super) fn give_back(&self) {
        observe::changed(self);
        if self.admission.give_back() {
            self.tell_if_quiet();
        }
        observe::place_freed(self);
    }

    /// Whoever waited for a place does so no more.
    pub(super) fn leave_line(&self, ticket: u64) {
        if self.admission.cancel(ticket) {
            self.tell_if_quiet();
        }
    }

    /// The one who waits counts itself and then looks, the one who tells changes and then looks for
    /// watchers, all sequentially consistent: at least one of them sees the other.
    pub(super) fn tell_if_quiet(&self) {
        if self.watchers.load(Ordering::SeqCst) > 0 {
            self.quiet.notify_waiters();
        }
    }

    /// Removes a queued task; whether there was one.
    pub(super) fn take_queued(&self, mut is_it: impl FnMut(&Node) -> bool) -> Option<Node> {
        #[cfg(feature = "test-util")]
        if let Some(held) = self.held.remove(&mut is_it) {
            return Some(held);
        }
        self.queue
            .remove(&mut is_it)
            .or_else(|| self.blocking.remove(is_it))
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor")
            .field("concurrency", &self.config.concurrency)
            .field("capacity", &self.config.capacity)
            .field("taken", &self.admission.taken())
            .finish_non_exhaustive()
    }
}

impl Drop for Shared {
    /// The last handle is gone. What is still queued has no runtime left that would run it. What the
    /// tasks captured is the user's, and its drop may panic.
    fn drop(&mut self) {
        let taken = self.admission.taken();
        if taken > 0 {
            observe::lost_with_executor(taken);
        }
        observe::gone(self);
        let (ready, due) = self.queue.take_all();
        let (blocking, blocking_due) = self.blocking.take_all();
        for mut tasks in [ready, due, blocking, blocking_due] {
            while let Some(node) = tasks.pop() {
                observe::panic_in_drop(node.drop_quietly());
            }
        }
        self.waiting
            .clear(|node| observe::panic_in_drop(node.drop_quietly()));
        self.letters.clear();
    }
}
