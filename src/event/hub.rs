//! What the parts of the event room share: the table, the store, the executor, and what runs between
//! them.
//!
//! Two halves: users hold the [`Hub`], and what runs for them holds the [`Core`]. When the last hub is
//! gone, the core ends by itself, after what is lent has come back.

use std::collections::HashMap;
use std::ops::Deref;
use std::panic::Location;

use tokio::sync::{Notify, RwLock};

use super::claim::{Claim, Settlement};
use super::emissions::Tally;
use super::events::Unheard;
use super::outgoing::{Holder, Outgoing};
use super::room::{Room, Window};
use super::store::{AttemptToken, EventId, Keep, NewEvent, Store, StoreError, StoredEvent};
use super::table::{Subscription, Table};
use super::{EmitError, Event, IntoEmit, Recorded};
use crate::clock::{self, Clock};
use crate::executor::{Executor, Place, Shared, Source};
use crate::observe;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Mutex, OnceLock, Ordering, Weak};
use crate::task::{AttemptRecord, Lent, Node, Task};

/// What users hold, by way of `Events` and of the layer.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(super) core: Arc<Core>,
}

pub(crate) struct Core {
    pub(super) table: Table,
    pub(super) unheard: Unheard,
    pub(super) max_payload: usize,
    pub(super) keep: Keep,
    pub(super) store: Option<Arc<dyn Store>>,
    pub(super) executor: OnceLock<Executor>,
    pub(super) window: Arc<Window>,
    /// How attempts ended that is not written down yet.
    pub(super) ended: Mutex<Vec<Settlement>>,
    pub(super) settles: Notify,
    /// Held by recordings that leave deliveries to the courier, until it can know which requests these
    /// belong to.
    pub(super) recording: RwLock<()>,
    pub(super) unreleased: Mutex<Unreleased>,
    running: AtomicBool,
    ended_for_good: AtomicBool,
    pub(super) over: Notify,
    pub(super) trouble: Troubles,
    pub(super) emissions: Tally,
    unheard_told: observe::Complaint,
    clock: Clock,
}

/// Events whose response is not out, and who holds their deliveries until it is.
#[derive(Default)]
pub(super) struct Unreleased {
    holders: HashMap<EventId, Weak<dyn Holder>>,
    /// Looked through when there are more than this.
    sweep_at: usize,
}

/// That the store is in trouble is said when it begins, now and then, and when it is over.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    said: observe::Complaint,
    /// What is failing. How many, beside the lock: nearly always none.
    failing: Mutex<Vec<&'static str>>,
    count: AtomicUsize,
    clock: OnceLock<Clock>,
}

/// An emission that is ready to be handed over.
pub(crate) enum Prepared {
    /// Without a store: one task for each subscriber.
    Tasks(Vec<Task>),
    Outgoing(Box<Outgoing>, Recorded),
}

impl Hub {
    pub(super) fn new() -> Self {
        Self {
            core: Arc::new(Core {
                table: Table::default(),
                unheard: Unheard::default(),
                max_payload: 256 * 1024,
                keep: Keep::everything(),
                store: None,
                executor: OnceLock::new(),
                window: Arc::new(Window::new(256)),
                ended: Mutex::default(),
                settles: Notify::new(),
                recording: RwLock::new(()),
                unreleased: Mutex::default(),
                running: AtomicBool::new(false),
                ended_for_good: AtomicBool::new(false),
                over: Notify::new(),
                trouble: Troubles::default(),
                emissions: Tally::default(),
                unheard_told: observe::Complaint::default(),
                clock: Clock::new(),
            }),
        }
    }

    /// Takes an emission apart: what is needed to run it, or to record it.
    pub(crate) fn prepare<I: IntoEmit>(
        self: &Arc<Self>,
        emit: I,
        location: &'static Location<'static>,
    ) -> Result<Prepared, EmitError> {
        let emit = emit.into_emit();
        let listeners = self.listeners::<I::Event>(location)?;
        if self.store.is_none() {
            let event = Arc::new(emit.event);
            let tasks = listeners
                .iter()
                .map(|listener| listener.in_memory(event.clone()).when(emit.when.clone()))
                .collect();
            return Ok(Prepared::Tasks(tasks));
        }
        let when = emit.when.clone();
        let event = self.write(emit)?;
        let (outgoing, recorded) = Outgoing::new(self.clone(), event, listeners.to_vec(), when);
        Ok(Prepared::Outgoing(Box::new(outgoing), recorded))
    }

    /// The record of an emission, with its deliveries due at once.
    #[cfg(feature = "sqlite")]
    pub(super) fn encode<I: IntoEmit>(
        &self,
        emit: I,
        location: &'static Location<'static>,
    ) -> Result<NewEvent, EmitError> {
        let emit = emit.into_emit();
        let listeners = self.listeners::<I::Event>(location)?;
        let mut event = self.write(emit)?;
        for listener in listeners {
            let now_ms = clock::unix_ms(clock::wall_now());
            event = event.deliver(listener.name.clone(), super::store::Start::At(now_ms));
        }
        Ok(event)
    }

    /// As JSON, without deliveries.
    fn write<E: Event>(&self, emit: super::Emit<E>) -> Result<NewEvent, EmitError> {
        let payload = serde_json::to_string(&emit.event)
            .map_err(|error| EmitError::encode(E::NAME, error))?;
        if payload.len() > self.max_payload {
            return Err(EmitError::too_large(payload.len(), self.max_payload));
        }
        let mut event = NewEvent::new(E::NAME, payload);
        event.key = emit.key;
        Ok(event)
    }

    /// Who hears of it; that nobody does is treated as was asked for.
    fn listeners<E: Event>(
        &self,
        location: &'static Location<'static>,
    ) -> Result<&[Arc<Subscription>], EmitError> {
        let listeners = self
            .table
            .listeners::<E>()
            .map_err(|_| EmitError::ambiguous(E::NAME))?;
        if listeners.is_empty() {
            match self.unheard {
                Unheard::Allow => {}
                Unheard::Error => return Err(EmitError::unheard(E::NAME)),
                Unheard::Warn => {
                    if self.unheard_told.is_due(self.clock.now()) {
                        observe::unheard(E::NAME, location);
                    }
                }
            }
        }
        Ok(listeners)
    }
}

impl Core {
    /// Where deliveries run: what was chosen, else the executor of the first layer that asks, else one
    /// of its own.
    pub(crate) fn executor(&self) -> &Executor {
        self.executor.get_or_init(Executor::new)
    }

    /// Where they run, if that has been settled.
    pub(crate) fn bound(&self) -> Option<&Executor> {
        self.executor.get()
    }

    /// Has the store closed, in order: what is in its log goes into its file.
    pub(crate) async fn close(&self) -> Result<(), StoreError> {
        match &self.store {
            Some(store) => store.close().await,
            None => Ok(()),
        }
    }

    pub(crate) fn bind(&self, executor: &Executor) {
        let _ = self.executor.get_or_init(|| executor.clone());
    }

    /// The store, where there is one.
    pub(super) fn store(&self) -> Result<&Arc<dyn Store>, StoreError> {
        self.store.as_ref().ok_or_else(|| {
            StoreError::invalid("these events have no store: add `.store(…)`, or ask the executor")
        })
    }

    /// Sees to it that deliveries are claimed and settled, where there is a runtime.
    pub(crate) fn ensure_running(self: &Arc<Self>) {
        if self.store.is_none() || self.has_ended() && self.window.lent() == 0 {
            return;
        }
        // Tasks are to find room beside what is lent.
        let capacity = self.executor().shared().admission.capacity();
        self.window.at_most(capacity / 2);
        if self.running.swap(true, Ordering::SeqCst) {
            return;
        }
        let running = Running(self.clone());
        let source: Weak<Self> = Arc::downgrade(self);
        self.executor().shared().attach(source as Weak<dyn Source>);
        self.executor().shared().spawn(async move {
            let core = &running.0;
            tokio::join!(core.deliver(), core.settle_all(), core.prune());
        });
    }

    pub(super) fn is_over(&self) -> bool {
        self.ended_for_good.load(Ordering::SeqCst)
    }

    /// Nobody will run what is lent and has not started, or write down how anything ended: it goes back
    /// to the store when that is closed. In the executor's queue it would hold the store, and so the
    /// file, for as long as anything is queued there. Whoever is the later of the last user and the last
    /// runtime sees here that the other is gone.
    fn let_go_if_over(&self) {
        if !self.is_over() || self.running.load(Ordering::SeqCst) {
            return;
        }
        if let Some(executor) = self.executor.get() {
            executor.shared().hand_back_orphans();
        }
    }

    /// Room for one delivery in this process; `reserved`: a place in the executor to be used first.
    pub(super) fn try_room(&self, reserved: &mut Option<Place>) -> Option<Room> {
        let shared = self.executor().shared();
        if shared.is_draining() {
            return None;
        }
        self.window
            .try_take(|| reserved.take().or_else(|| shared.try_place()))
    }

    /// The task of one attempt that the store has lent.
    pub(super) fn lend(
        self: &Arc<Self>,
        subscription: &Arc<Subscription>,
        event: &Arc<StoredEvent>,
        token: AttemptToken,
        room: Room,
        before: Before,
    ) -> Node {
        let recorded = token.subscriber().clone();
        let mut node = subscription.stored(event.clone(), recorded);
        let claim = Claim::new(self.clone(), token, room);
        let settings = node.settings_mut();
        // Its event's condition was asked when it was recorded.
        settings.admitted = true;
        settings.attempts = before.attempts;
        if let Some(error) = before.last_error {
            settings.history.push(AttemptRecord {
                attempt: before.attempts,
                at: clock::wall_now(),
                error: error.into(),
            });
        }
        settings.lent = Some(Lent {
            keeper: Box::new(claim),
            age: before.age,
        });
        self.executor().shared().accept_lent(&mut node);
        node
    }
}

impl Source for Core {
    /// What requests hold is their collectors' affair.
    fn release_now(&self, _: &Shared, _: bool) {}

    /// What is lent is to be written down, in whatever runtime.
    fn resume(self: Arc<Self>) {
        self.ensure_running();
    }
}

/// What became of a delivery before this attempt.
#[derive(Default)]
pub(super) struct Before {
    pub(super) attempts: u32,
    pub(super) last_error: Option<String>,
    pub(super) age: std::time::Duration,
}

/// The courier and the settler, as long as their runtime lets them.
struct Running(Arc<Core>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::SeqCst);
        self.0.let_go_if_over();
    }
}

impl Unreleased {
    pub(super) fn add(&mut self, event: EventId, holder: &Arc<dyn Holder>) {
        if self.holders.len() >= self.sweep_at.max(64) {
            self.holders.retain(|_, holder| holder.strong_count() > 0);
            self.sweep_at = self.holders.len() * 2;
        }
        self.holders.insert(event, Arc::downgrade(holder));
    }

    /// Who holds this event's deliveries.
    pub(super) fn holder(&mut self, event: EventId) -> Option<Arc<dyn Holder>> {
        let holder = self.holders.get(&event)?.upgrade();
        if holder.is_none() {
            self.holders.remove(&event);
        }
        holder
    }
}

impl Troubles {
    pub(super) fn tell(&self, doing: &'static str, error: &StoreError) {
        let now = self.clock.get_or_init(Clock::new).now();
        let mut failing = self.failing.lock();
        let first = !failing.contains(&doing);
        if first {
            failing.push(doing);
        }
        self.count.store(failing.len(), Ordering::SeqCst);
        drop(failing);
        if self.said.is_due(now) || first {
            observe::store_failed(doing, error);
        }
    }

    pub(super) fn over(&self, doing: &'static str) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut failing = self.failing.lock();
        let before = failing.len();
        failing.retain(|other| *other != doing);
        let ended = failing.len() < before;
        self.count.store(failing.len(), Ordering::SeqCst);
        drop(failing);
        if ended {
            observe::store_works(doing);
        }
    }
}

impl Deref for Hub {
    type Target = Arc<Core>;

    fn deref(&self) -> &Arc<Core> {
        &self.core
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.core.ended_for_good.store(true, Ordering::SeqCst);
        self.core.over.notify_waiters();
        self.core.settles.notify_one();
        self.core.let_go_if_over();
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events")
            .field("subscribers", &self.table)
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}
