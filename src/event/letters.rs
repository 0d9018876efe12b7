//! Deliveries that failed for good, in a store: looked at, replayed when the bug is fixed, discarded.

use std::fmt;
use std::time::Duration;

use super::hub::Hub;
use super::store::{Cursor, Filter, Group, Listed, Replay, State, StoreError, StoreFuture};
use crate::clock;
use crate::sync::Arc;

/// The dead letters of a store; see [`Events::dead_letters`](super::Events::dead_letters).
#[derive(Clone, Debug)]
pub struct DeliveryLetters {
    hub: Arc<Hub>,
}

/// Dead letters, and deliveries that are parked, are asked for in pages of this many.
const PAGE: usize = 500;

impl DeliveryLetters {
    pub(super) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }

    /// Dead letters that match, by event and subscriber, at most `limit` after `after`
    /// ([`Listed::cursor`] of the last one before).
    ///
    /// # Errors
    ///
    /// When the store cannot be read, or there is none.
    pub async fn list(
        &self,
        filter: &Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        self.page(State::Discarded, filter, after, limit).await
    }

    /// Deliveries that nobody here can run: of an unknown subscriber or event, or with a payload that
    /// does not decode. They run when the code is back.
    ///
    /// # Errors
    ///
    /// When the store cannot be read, or there is none.
    pub async fn parked(
        &self,
        filter: &Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        self.page(State::Parked, filter, after, limit).await
    }

    async fn page(
        &self,
        state: State,
        filter: &Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let store = self.hub.store()?;
        store.list(state, filter.clone(), after, limit).await
    }

    /// Dead letters that match, grouped by subscriber and error, the largest groups first.
    ///
    /// # Errors
    ///
    /// When the store cannot be read, or there is none.
    pub async fn group(&self, filter: &Filter, limit: usize) -> Result<Vec<Group>, StoreError> {
        self.hub.store()?.group(filter.clone(), limit).await
    }

    /// Replays what matches, under a name: under one name each delivery is replayed at most once, so
    /// that a replay which was cut short is called again with the same name and goes on.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::event::{Events, store::Filter};
    /// # #[derive(Clone)] struct App;
    /// # async fn repair(events: Events<App>) -> Result<(), tower_defer::event::store::StoreError> {
    /// let failed = Filter { subscriber: Some("welcome-email".into()), ..Filter::default() };
    /// let replayed = events
    ///     .dead_letters()
    ///     .replay("smtp-outage-2026-11", failed)
    ///     .per_second(50)
    ///     .run()
    ///     .await?;
    /// println!("{replayed} deliveries start again");
    /// # Ok(()) }
    /// ```
    pub fn replay(&self, name: &str, filter: Filter) -> ReplayLetters {
        ReplayLetters {
            hub: self.hub.clone(),
            name: name.to_owned(),
            filter,
            per_second: None,
        }
    }

    /// Discards what matches: it becomes history. Returns how many.
    ///
    /// # Errors
    ///
    /// When it could not be made durable, or there is no store; what was discarded before stays so.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends it; what was discarded stays so.
    pub async fn discard(&self, filter: &Filter) -> Result<u64, StoreError> {
        let store = self.hub.store()?;
        let step = |now_ms| store.discard(filter.clone(), PAGE, now_ms);
        in_pages(step).await
    }

    /// Discards [parked](Self::parked) deliveries that match: code that nobody will bring back. They become
    /// history, so that they are not given to the subscriber again. Returns how many.
    ///
    /// # Errors
    ///
    /// When it could not be made durable, or there is no store; what was discarded before stays so.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends it; what was discarded stays so.
    pub async fn discard_parked(&self, filter: &Filter) -> Result<u64, StoreError> {
        let store = self.hub.store()?;
        let step = |now_ms| store.discard_parked(filter.clone(), PAGE, now_ms);
        in_pages(step).await
    }
}

/// Until a step finds less than it might.
async fn in_pages<'a>(step: impl Fn(i64) -> StoreFuture<'a, u64>) -> Result<u64, StoreError> {
    let mut all = 0;
    loop {
        let done = step(clock::unix_ms(clock::wall_now())).await?;
        all += done;
        if done < PAGE as u64 {
            return Ok(all);
        }
    }
}

/// A replay, before it is [run](ReplayLetters::run).
#[must_use = "nothing is replayed until it is run"]
pub struct ReplayLetters {
    hub: Arc<Hub>,
    name: String,
    filter: Filter,
    per_second: Option<u32>,
}

impl ReplayLetters {
    /// No faster than this; at least 1. Default: as fast as the store takes it. The deliveries are
    /// bounded by the executor in any case; this spares whoever they call.
    pub fn per_second(mut self, deliveries: u32) -> Self {
        self.per_second = Some(deliveries.max(1));
        self
    }

    /// Replays. Returns how many, in this call.
    ///
    /// # Errors
    ///
    /// When it could not be made durable, or there is no store. What was replayed before stays so:
    /// call it again under the same name.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends it; called again under the same name, it goes on.
    pub async fn run(self) -> Result<u64, StoreError> {
        let store = self.hub.store()?;
        // In tenths of a second, so that a rate is not a burst once a second.
        let (step, pause) = match self.per_second {
            None => (PAGE, Duration::ZERO),
            Some(rate) if rate >= 10 => (rate as usize / 10, Duration::from_millis(100)),
            Some(rate) => (1, Duration::from_secs(1) / rate),
        };
        let mut all = 0;
        loop {
            let replay = Replay {
                name: self.name.clone(),
                filter: self.filter.clone(),
                limit: step,
            };
            let now_ms = clock::unix_ms(clock::wall_now());
            let replayed = store.replay(replay, now_ms).await?;
            all += replayed;
            if replayed < step as u64 {
                return Ok(all);
            }
            tokio::time::sleep(pause).await;
        }
    }
}

impl fmt::Debug for ReplayLetters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayLetters")
            .field("name", &self.name)
            .field("filter", &self.filter)
            .field("per_second", &self.per_second)
            .finish_non_exhaustive()
    }
}
