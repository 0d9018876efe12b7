//! What the parts of an executor share, and the way of a task into the queue.

use std::ops::Deref;
use std::sync::Weak;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::{Admission, NoPlace};
use super::blocking::BlockingLane;
use super::builder::{Config, Overflow};
use super::counters::Counters;
use super::dead_letters::Letters;
use super::dedicated::OwnRuntime;
use super::drain::Drain;
use super::place::Place;
use super::queue::{Queue, Wake};
use super::rejected::RejectReason;
use super::report::UnfinishedState;
use super::running::Slots;
use super::waiting::Waiting;
use super::watch::Watch;
use super::worker;
use crate::clock::{Clock, Tick};
use crate::observe;
use crate::retry::DiscardReason;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};
use crate::task::{Fifo, Kind, Node, Origin};

pub(crate) struct Shared {
    pub(crate) config: Config,
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
    complaints: observe::Complaints,
    /// That there is no usable runtime is said now and then, not for every task.
    pub(super) no_runtime: observe::Complaint,
    /// Requests whose handler has not answered.
    handlers: AtomicUsize,
    /// Responses under way from which a task may still be registered.
    responses: AtomicUsize,
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
    pub(super) own_runtime: OwnRuntime,
    sources: Mutex<Vec<Weak<dyn Source>>>,
}

/// What holds tasks that are not released yet; a drain can ask for them.
pub(crate) trait Source: Send + Sync {
    /// Releases what it holds, without waiting for the responses; with `handlers`, also the tasks of
    /// requests whose handler has not answered yet.
    fn release_now(&self, handlers: bool);
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
            handlers: AtomicUsize::new(0),
            responses: AtomicUsize::new(0),
            #[cfg(feature = "test-util")]
            held: super::held::Held::default(),
            #[cfg(feature = "test-util")]
            ears: crate::test_util::Ears::default(),
            #[cfg(feature = "metrics")]
            gauges: observe::Gauges::default(),
            watchers: AtomicUsize::new(0),
            quiet: Notify::new(),
            last_runtime: Mutex::new(None),
            own_runtime: OwnRuntime::default(),
            sources: Mutex::new(Vec::new()),
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
        blocking.or_else(|| self.queue.pop_oldest())
    }

    #[inline]
    pub(crate) fn try_admit(&self) -> Result<Place<&Self>, RejectReason> {
        self.admission.try_take()?;
        Ok(Place::new(self))
    }

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

    /// Gives a task its place, and its identity.
    #[inline]
    pub(crate) fn accept<H: Deref<Target = Self>>(&self, node: &mut Node, place: Place<H>) {
        place.keep();
        node.identify();
        self.counters.accepted.add(1);
        observe::accepted(self, node);
    }

    /// Hands accepted tasks over, with where they come from and the time, which the caller has read. It
    /// runs no code of the user's, and may be called from anywhere.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        mut tasks: Fifo<Node>,
        origin: &Arc<dyn Origin>,
        now: Tick,
    ) {
        if self.drain.is_abandoned() {
            // Not by way of the queue: a worker on another thread would take them from there.
            return self.cancel_all(tasks, UnfinishedState::NeverStarted);
        }
        let mut blocking = false;
        tasks.for_each_mut(|node| {
            blocking |= node.body().kind() == Kind::Blocking;
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
            self.wake(self.queue.push(tasks));
        }
        observe::changed(self);
        self.cancel_if_abandoned();
    }

    /// As [`enqueue`](Self::enqueue), for one.
    pub(crate) fn enqueue_one(self: &Arc<Self>, mut node: Node, origin: Option<Arc<dyn Origin>>) {
        let header = node.header_mut();
        header.queued_at = self.clock.now();
        if origin.is_some() {
            header.origin = origin;
        }
        #[cfg(feature = "test-util")]
        let Some(node) = self.held.keep(node) else {
            return observe::changed(self);
        };
        match node.body().kind() {
            Kind::Async | Kind::AsyncWithContext => self.wake(self.queue.push_one(node)),
            Kind::Blocking => self.push_blocking(node),
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
            match node.body().kind() {
                Kind::Async | Kind::AsyncWithContext => quick.push(node),
                Kind::Blocking => self.blocking.push_due(self, node),
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
            match node.body().kind() {
                Kind::Async | Kind::AsyncWithContext => quick.push(node),
                Kind::Blocking => self.push_blocking(node),
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
        if !matches!(wake, Wake::Nobody) {
            self.wake_one(wake);
        }
    }

    #[cold]
    fn wake_one(self: &Arc<Self>, wake: Wake) {
        match wake {
            Wake::Nobody => {}
            Wake::Unpark(waker) => waker.wake(),
            Wake::Start(worker) => worker::start(self, worker),
        }
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

    pub(crate) fn request_opened(&self) {
        self.handlers.fetch_add(1, Ordering::SeqCst);
    }

    /// The handler has answered (or there will be no answer). `open`: tasks may still be registered
    /// until [`response_closed`](Self::response_closed).
    pub(crate) fn request_answered(&self, open: bool) {
        if open {
            // Before the other, so that a drain never sees neither.
            self.responses.fetch_add(1, Ordering::SeqCst);
        }
        if self.handlers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.tell_if_quiet();
        }
    }

    pub(crate) fn response_closed(&self) {
        if self.responses.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.tell_if_quiet();
        }
    }

    /// Requests that may still register a task: those whose handler has not answered, and those whose
    /// response is under way.
    pub(super) fn open_requests(&self) -> (usize, usize) {
        (
            self.handlers.load(Ordering::SeqCst),
            self.responses.load(Ordering::SeqCst),
        )
    }

    /// The one who waits counts itself and then looks, the one who tells changes and then looks for
    /// watchers, all sequentially consistent: at least one of them sees the other.
    fn tell_if_quiet(&self) {
        if self.watchers.load(Ordering::SeqCst) > 0 {
            self.quiet.notify_waiters();
        }
    }

    pub(crate) fn attach(&self, source: Weak<dyn Source>) {
        let mut sources = self.sources.lock();
        sources.retain(|old| old.strong_count() > 0);
        sources.push(source);
    }

    /// Releases what requests still hold.
    pub(crate) fn release_sources(&self, handlers: bool) {
        let sources: Vec<_> = self
            .sources
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        sources
            .iter()
            .for_each(|source| source.release_now(handlers));
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
        let waiting = self.waiting.take_all();
        for mut tasks in [ready, due, blocking, blocking_due, waiting] {
            while let Some(node) = tasks.pop() {
                observe::panic_in_drop(node.drop_quietly());
            }
        }
        self.letters.clear();
    }
}
