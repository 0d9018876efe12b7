//! What the parts of an executor share, and the way of a task into the queue.

use std::sync::Weak;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::{Admission, NoPlace};
use super::blocking::BlockingLane;
use super::builder::{Config, Overflow};
use super::counters::Counters;
use super::dead_letters::Letters;
use super::drain::Drain;
use super::queue::{Queue, Wake};
use super::rejected::RejectReason;
use super::running::Slots;
use super::waiting::Waiting;
use super::watch::Watch;
use super::worker;
use crate::clock::Clock;
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
    complaint: observe::Complaint,
    #[cfg(feature = "test-util")]
    pub(crate) held: super::held::Held,
    #[cfg(feature = "test-util")]
    pub(crate) ears: crate::test_util::Ears,
    #[cfg(feature = "metrics")]
    pub(crate) gauges: observe::Gauges,
    /// Requests that may still register a task.
    open_requests: AtomicUsize,
    /// Whoever waits for the executor to be quiet.
    pub(super) watchers: AtomicUsize,
    pub(super) quiet: Notify,
    /// The runtime seen last, for a release that happens outside of one.
    last_runtime: Mutex<Option<Handle>>,
    sources: Mutex<Vec<Weak<dyn Source>>>,
}

/// What holds tasks that are not released yet; a drain can ask for them.
pub(crate) trait Source: Send + Sync {
    /// Releases what it holds now, without waiting for the response.
    fn release_now(&self);
}

/// A reserved place in the capacity. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(Option<Arc<Shared>>);

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
            complaint: observe::Complaint::default(),
            #[cfg(feature = "test-util")]
            held: super::held::Held::default(),
            #[cfg(feature = "test-util")]
            ears: crate::test_util::Ears::default(),
            #[cfg(feature = "metrics")]
            gauges: observe::Gauges::default(),
            open_requests: AtomicUsize::new(0),
            watchers: AtomicUsize::new(0),
            quiet: Notify::new(),
            last_runtime: Mutex::new(None),
            sources: Mutex::new(Vec::new()),
            config,
        }
    }

    /// Reserves a place by the policy of `run`.
    pub(crate) fn admit(self: &Arc<Self>) -> Result<Place, RejectReason> {
        match self.try_admit() {
            Err(RejectReason::Full) if self.config.overflow == Overflow::DropOldest => {
                let Some(oldest) = self.queue.pop_oldest() else {
                    return Err(RejectReason::Full);
                };
                // Its place goes to the new task directly: given back, another could take it.
                self.discard(
                    oldest,
                    DiscardReason::Overflow,
                    "made room for a newer task".into(),
                );
                observe::changed(self);
                Ok(Place(Some(self.clone())))
            }
            result => result,
        }
    }

    pub(crate) fn try_admit(self: &Arc<Self>) -> Result<Place, RejectReason> {
        match self.admission.try_take() {
            Ok(()) => Ok(Place(Some(self.clone()))),
            Err(NoPlace::Full) => Err(RejectReason::Full),
            Err(NoPlace::Closed) => Err(RejectReason::Closed),
        }
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

    pub(crate) fn complaint_is_due(&self) -> bool {
        self.complaint.is_due(self.clock.now())
    }

    pub(crate) fn rejections(&self) -> u64 {
        let c = &self.counters;
        c.rejected_full.get() + c.rejected_request.get() + c.rejected_closed.get()
    }

    /// For the operator who asks what takes up all the room.
    pub(crate) fn what_fills_it(&self) -> String {
        let mut queued = Vec::new();
        self.queue.inspect(|_| (), |node| queued.push(node.name()));
        self.blocking.for_each(|node| queued.push(node.name()));
        let mut waiting = Vec::new();
        self.waiting.for_each(|node| waiting.push(node.name()));
        let running: Vec<_> = self.slots.running().into_iter().map(|r| r.name).collect();
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
        said.join("; ")
    }

    /// Gives a task its place, and its identity.
    pub(crate) fn accept(&self, node: &mut Node, place: Place) {
        place.keep();
        node.identify();
        self.counters.accepted.add(1);
        observe::accepted(self, node);
    }

    /// Hands accepted tasks over, with where they come from. It runs no code of the user's, and may be
    /// called from anywhere.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        mut tasks: Fifo<Node>,
        origin: Option<&Arc<dyn Origin>>,
    ) {
        let now = self.clock.now();
        let mut quick = Fifo::new();
        while let Some(mut node) = tasks.pop() {
            let header = node.header_mut();
            header.queued_at = now;
            if let Some(origin) = origin {
                header.origin = Some(origin.clone());
            }
            #[cfg(feature = "test-util")]
            let Some(node) = self.held.keep(node) else {
                continue;
            };
            self.sort(node, &mut quick);
        }
        if !quick.is_empty() {
            self.wake(self.queue.push(quick));
        }
        observe::changed(self);
        self.cancel_if_abandoned();
    }

    /// Hands tasks over whose retry is due.
    pub(super) fn enqueue_due(self: &Arc<Self>, mut tasks: Fifo<Node>) {
        let mut quick = Fifo::new();
        while let Some(node) = tasks.pop() {
            self.sort(node, &mut quick);
        }
        if !quick.is_empty() {
            self.wake(self.queue.push_due(quick));
        }
        observe::changed(self);
        self.cancel_if_abandoned();
    }

    /// Blocking tasks have a lane of their own.
    fn sort(self: &Arc<Self>, node: Node, quick: &mut Fifo<Node>) {
        match node.body().kind() {
            Kind::Async | Kind::AsyncWithContext => quick.push(node),
            Kind::Blocking => self.blocking.push(self, node),
        }
    }

    /// After a push: a drain that gave up before it saw a queue without these, one that gives up
    /// after it takes them.
    fn cancel_if_abandoned(&self) {
        if self.drain.is_abandoned() {
            self.cancel_queued();
        }
    }

    /// Does what the queue decided.
    pub(super) fn wake(self: &Arc<Self>, wake: Wake) {
        match wake {
            Wake::Nobody => {}
            Wake::Unpark(waker) => waker.wake(),
            Wake::Start(worker) => worker::start(self, worker),
        }
    }

    /// Starts a task of the executor's own. Without a runtime there is nothing to run it.
    pub(crate) fn spawn(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> Option<tokio::task::AbortHandle> {
        let handle = self.runtime()?;
        Some(handle.spawn(future).abort_handle())
    }

    fn runtime(&self) -> Option<Handle> {
        if let Some(runtime) = &self.config.runtime {
            return Some(runtime.clone());
        }
        match Handle::try_current() {
            Ok(current) => {
                *self.last_runtime.lock() = Some(current.clone());
                Some(current)
            }
            Err(_) => self.last_runtime.lock().clone(),
        }
    }

    /// Remembers the caller's runtime, for a release that happens outside of one.
    pub(crate) fn remember_runtime(&self) {
        if self.config.runtime.is_none() && self.last_runtime.lock().is_none() {
            *self.last_runtime.lock() = Handle::try_current().ok();
        }
    }

    /// A task reached its end: its place is free.
    pub(super) fn give_back(&self) {
        observe::changed(self);
        if self.admission.give_back() {
            self.tell_if_quiet();
        }
        observe::place_freed(self);
    }

    pub(crate) fn request_opened(&self) {
        self.open_requests.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn request_closed(&self) {
        if self.open_requests.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.tell_if_quiet();
        }
    }

    pub(super) fn open_requests(&self) -> usize {
        self.open_requests.load(Ordering::SeqCst)
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
    pub(crate) fn release_sources(&self) {
        let sources: Vec<_> = self
            .sources
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        sources.iter().for_each(|source| source.release_now());
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
    /// The last handle is gone. What is still queued has no runtime left that would run it.
    fn drop(&mut self) {
        let taken = self.admission.taken();
        if taken > 0 {
            observe::lost_with_executor(taken);
        }
        observe::gone(self);
    }
}

impl Place {
    /// For a place that [`Reserve`](super::Reserve) took.
    pub(super) fn taken(shared: Arc<Shared>) -> Self {
        Self(Some(shared))
    }

    /// The task has it from now on.
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.give_back();
        }
    }
}
