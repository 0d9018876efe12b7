//! [`Events`]: who listens, and where events are kept: put together where the application is.

use std::fmt;
use std::panic::Location;
use std::time::SystemTime;

use super::hub::{Core, Hub, Prepared};
use super::letters::DeliveryLetters;
use super::store::{AddPast, Counts, EventId, Health, Keep, Store, StoreError};
use super::{Emitted, IntoEmit, IntoSubscriber, Recording};
use crate::clock;
use crate::executor::Executor;
use crate::observe;
use crate::sync::Arc;

/// What is done with an event that nobody listens to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unheard {
    /// It is accepted (and recorded, where there is a store), and a warning is logged, the first time
    /// and then once a minute: nearly always a subscriber was forgotten.
    #[default]
    Warn,
    /// It is refused, with [`EmitError::is_unheard`](super::EmitError::is_unheard).
    Error,
    /// It is accepted. A store keeps it for a later subscriber ([`Events::add_past`]).
    Allow,
}

/// Events, their subscribers, and the store that keeps them.
///
/// Give it to [`DeferLayer::events`](crate::DeferLayer::events); handlers then
/// [`emit`](crate::Defer::emit). Cheap to clone; clones are the same. Everything is set before the
/// first clone is made.
///
/// | setting | default | reason |
/// | --- | --- | --- |
/// | [`store`](Self::store) | none: deliveries are tasks, in memory | |
/// | [`executor`](Self::executor) | that of the layer | one bound for all that is deferred |
/// | [`unheard`](Self::unheard) | [`Unheard::Warn`] | it is nearly always a mistake |
/// | [`max_payload`](Self::max_payload) | 256 KiB | an event carries ids, not rows |
/// | [`keep`](Self::keep) | everything | nothing goes that nobody said may go |
/// | [`max_in_flight`](Self::max_in_flight) | 256 | enough to share a commit, and what a crash may repeat |
///
/// # Examples
///
/// See the [module](super).
pub struct Events<S> {
    state: S,
    hub: Arc<Hub>,
}

impl<S: Clone + Send + Sync + 'static> Events<S> {
    /// No subscribers yet. `state` is cloned for each attempt, as an axum state is for each request.
    #[must_use]
    pub fn new(state: S) -> Self {
        Self {
            state,
            hub: Arc::new(Hub::new()),
        }
    }

    /// Adds a subscriber: a plain `async fn(State, Event)`, or a [`Subscriber`](super::Subscriber) with
    /// settings. Its name is what a store, logs and metrics know it by: keep it when the function is
    /// renamed.
    ///
    /// # Panics
    ///
    /// When the name (or an alias) is taken, when two types of event have one name, and when these
    /// events have been cloned or given to a layer. All of that is found when the application starts,
    /// every time.
    #[must_use]
    #[track_caller]
    pub fn on<M, F: IntoSubscriber<S, M>>(mut self, name: &str, subscriber: F) -> Self {
        let location = Location::caller();
        let state = self.state.clone();
        let table = &mut self.core("on").table;
        table.add(state, name.into(), subscriber.into_subscriber(), location);
        self
    }

    /// Keeps events and deliveries in this store. Default: none, deliveries are tasks.
    ///
    /// One store serves one `Events` and its clones: a second one would park the first one's
    /// subscribers, which it does not know.
    ///
    /// # Panics
    ///
    /// When these events have been cloned or given to a layer.
    #[must_use]
    #[track_caller]
    pub fn store(mut self, store: impl Store) -> Self {
        self.core("store").store = Some(Arc::new(store));
        self
    }

    /// Where deliveries run. Default: on the executor of the layer that they are given to.
    ///
    /// At shutdown it is drained only if [`Shutdown::and`](crate::Shutdown::and) names it.
    #[must_use]
    pub fn executor(self, executor: &Executor) -> Self {
        self.hub.bind(executor);
        self
    }

    /// What is done with an event that nobody listens to. Default: [`Unheard::Warn`].
    ///
    /// # Panics
    ///
    /// When these events have been cloned or given to a layer.
    #[must_use]
    #[track_caller]
    pub fn unheard(mut self, unheard: Unheard) -> Self {
        self.core("unheard").unheard = unheard;
        self
    }

    /// How many bytes an event may have as JSON. Default: 256 KiB. It does not matter without a store.
    ///
    /// # Panics
    ///
    /// When these events have been cloned or given to a layer.
    #[must_use]
    #[track_caller]
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.core("max_payload").max_payload = bytes;
        self
    }

    /// For how long the store keeps finished events. Default: [`Keep::everything`], so that nothing goes
    /// that nobody said may go; the file grows then. It is applied when deliveries start, and once an
    /// hour; what goes is logged and counted ([`Counts::pruned`]).
    ///
    /// ```
    /// # use std::time::Duration;
    /// use tower_defer::event::{Events, store::{Keep, Memory}};
    ///
    /// const MONTH: Duration = Duration::from_secs(30 * 24 * 60 * 60);
    /// let events = Events::new(()).store(Memory::new()).keep(Keep::newer_than(MONTH));
    /// # let _ = events;
    /// ```
    ///
    /// # Panics
    ///
    /// When these events have been cloned or given to a layer.
    #[must_use]
    #[track_caller]
    pub fn keep(mut self, keep: Keep) -> Self {
        self.core("keep").keep = keep;
        self
    }

    /// How many deliveries the store may have lent to this process at once; at least 1. Default: 256,
    /// and never more than half of the executor's capacity, so that tasks find room beside them.
    /// Raise it above the executor's concurrency for subscribers that wait long. A delivery whose response
    /// is not out is not counted before it is, so that those of the requests which are being answered in a moment
    /// may come on top, also of what a crash repeats; but half of the capacity is the most in any case, so that open streams
    /// that have emitted something need a larger one, or all others wait for these.
    ///
    /// # Panics
    ///
    /// When these events have been cloned or given to a layer.
    #[must_use]
    #[track_caller]
    pub fn max_in_flight(mut self, deliveries: usize) -> Self {
        self.core("max_in_flight").window = Arc::new(super::room::Window::new(deliveries));
        self
    }

    #[track_caller]
    fn core(&mut self, what: &str) -> &mut Core {
        let core = Arc::get_mut(&mut self.hub).and_then(|hub| Arc::get_mut(&mut hub.core));
        match core {
            Some(core) => core,
            None => panic!(
                "`Events::{what}` comes too late: call it before these events are cloned, emit anything, or \
                 are given to a layer"
            ),
        }
    }
}

impl<S> Events<S> {
    /// Emits an event outside of a request. With a store it is recorded at once
    /// ([`Emitted::recorded`] waits for it); its deliveries start then. Its condition is not asked.
    #[track_caller]
    pub fn emit(&self, event: impl IntoEmit) -> Emitted {
        let location = Location::caller();
        match self.hub.prepare(event, location) {
            Ok(Prepared::Tasks(tasks)) => {
                let executor = self.hub.executor();
                let mut places = Vec::with_capacity(tasks.len());
                for task in tasks {
                    match executor.shared().admit() {
                        Ok(place) => places.push((task, place)),
                        Err(reason) => {
                            executor.shared().reject_for_good(task.into_node(), reason);
                            return Emitted::refused(super::EmitError::rejected(reason));
                        }
                    }
                }
                let handles = places
                    .into_iter()
                    .map(|(task, place)| executor.accept(task.into_node(), place))
                    .collect();
                Emitted::tasks(handles)
            }
            Ok(Prepared::Outgoing(outgoing, recorded)) => {
                Recording::unconditional(vec![*outgoing], None).go_on();
                Emitted::outgoing(recorded)
            }
            Err(error) => {
                observe::not_emitted(&error, location);
                Emitted::refused(error)
            }
        }
    }

    /// Starts the deliveries of what the store has, where that is not done by a layer: in a process
    /// that only runs deliveries, or before the first request. Call it within a runtime.
    pub fn start(&self) {
        self.hub.ensure_running();
    }

    /// Gives a subscriber the events of the past that it listens to, recorded at `since` or later: for
    /// one that was added later. What it has had already it does not get again. Returns how many
    /// deliveries were added.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: what was added before stays added, and it can be called again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the walk; what was added stays, and it can be called again.
    pub async fn add_past(&self, subscriber: &str, since: SystemTime) -> Result<u64, StoreError> {
        let store = self.hub.store()?;
        let Some(subscription) = self.hub.table.by_name(subscriber) else {
            return Err(StoreError::invalid("no subscriber has this name"));
        };
        let mut added = 0;
        for event in subscription.events() {
            let mut after: Option<EventId> = None;
            loop {
                let past = AddPast {
                    event_name: (*event).into(),
                    since_ms: clock::unix_ms(since),
                    subscriber: subscription.name.clone(),
                    aliases: subscription.aliases().to_vec(),
                    after,
                    limit: 1_000,
                };
                let walked = store
                    .add_past(past, clock::unix_ms(clock::wall_now()))
                    .await?;
                added += walked.added;
                match walked.next {
                    Some(next) => after = Some(next),
                    None => break,
                }
            }
        }
        Ok(added)
    }

    /// Deliveries that failed for good, in the store: list, group, replay, discard. Without a store
    /// they are the executor's [dead letters](crate::Executor::dead_letters).
    #[must_use]
    pub fn dead_letters(&self) -> DeliveryLetters {
        DeliveryLetters::new(self.hub.clone())
    }

    /// How many deliveries the store has in which state.
    ///
    /// # Errors
    ///
    /// When the store cannot be read, or there is none.
    pub async fn counts(&self) -> Result<Counts, StoreError> {
        self.hub.store()?.counts().await
    }

    /// How many events were recorded, could not be, or were skipped by their condition, since the start of
    /// this process. Without a store they are tasks: see [`Snapshot`](crate::Snapshot).
    #[must_use]
    pub fn emissions(&self) -> super::Emissions {
        self.hub.emissions.so_far()
    }

    /// How the store is; `None`: there is none. For a readiness probe.
    #[must_use]
    pub fn health(&self) -> Option<Health> {
        self.hub.store.as_ref().map(|store| store.health())
    }

    /// Closes the store: what is running is handed back, unconsumed, and the file is free for another
    /// process when this is ready. Afterwards nothing is recorded. Call it after the drain, where
    /// something else is to open the file while this process goes on; a process that ends need not.
    /// Without a store it does nothing.
    ///
    /// # Errors
    ///
    /// When what is running could not be handed back; it is recovered at the next open.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing: the store closes.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.hub.close().await
    }

    /// Has the store looked into now: after a transaction of the user's own committed with
    /// [`append_in`](Self::append_in).
    pub fn appended(&self) {
        self.hub.ensure_running();
        if let Some(store) = &self.hub.store {
            store.wakeups().notify_one();
        }
    }

    /// Records an event inside the user's own transaction, on the user's own connection to the file
    /// that the store has open: it is recorded if and when that transaction commits, with whatever
    /// else it did. Its deliveries are found within some seconds, or when
    /// [`appended`](Self::appended) is called after the commit.
    ///
    /// # Errors
    ///
    /// [`EmitError`](super::EmitError): the event, or what SQLite says. Roll the transaction back then.
    #[cfg(feature = "sqlite")]
    #[track_caller]
    pub fn append_in(
        &self,
        transaction: &rusqlite::Transaction<'_>,
        event: impl IntoEmit,
    ) -> Result<EventId, super::EmitError> {
        let location = Location::caller();
        let now_ms = clock::unix_ms(clock::wall_now());
        let event = self.hub.encode(event, location)?;
        super::store::Sqlite::append_in(transaction, &[event], now_ms)
            .map(|receipts| receipts[0].event)
            .map_err(super::EmitError::store)
    }

    pub(crate) fn into_hub(self) -> Arc<Hub> {
        self.hub
    }
}

impl<S: Clone> Clone for Events<S> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
            hub: self.hub.clone(),
        }
    }
}

impl<S> fmt::Debug for Events<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hub.core.fmt(f)
    }
}
