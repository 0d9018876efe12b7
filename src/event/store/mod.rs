//! The store room: where events and their deliveries are kept until every subscriber has them.
//!
//! [`Store`] is the contract, with its promises numbered; [`Memory`] is its readable reference;
//! `Sqlite` (feature `sqlite`) keeps the same promises across a crash; `conformance` (feature
//! `test-util`) holds every store to them.
//!
//! # What it is not
//!
//! Not a job queue: it starts nothing, knows no function, no runtime and no clock. Whoever runs
//! deliveries claims them here, runs them, and settles them here, and passes the time in. Not a
//! message broker either: there are no topics, offsets or consumer groups, only one delivery for
//! each subscriber of each event. And not a serializer: a payload is a text that the store hands
//! back as it came (JSON by convention, so that people can read it).
//!
//! # The life of a delivery
//!
//! ```text
//!            claim                    settle: Complete
//!  queued ----------> running --------------------------> (history)
//!    ^                 | | |  Retry            claim
//!    |                 | | +-------> retrying -------> running
//!    |      Release    | |
//!    +-----------------+ +--> parked (Park)   discarded (Discard, or the third crash)
//!    |                           |                |
//!    +---------- unpark ---------+---- replay ----+----- discard ---> (history)
//! ```

mod contract;
mod error;
mod grouping;
mod keep;
mod life;
mod memory;
mod query;
mod record;

#[cfg(feature = "sqlite")]
mod sqlite;

#[cfg(feature = "test-util")]
pub mod conformance;

pub use self::contract::{Store, StoreFuture};
pub use self::error::StoreError;
pub use self::grouping::error_group;
pub use self::keep::Keep;
pub use self::life::{CRASHED, DAMAGED, SUSPECT, Settle, State};
pub use self::memory::Memory;
pub use self::query::{
    AddPast, Counts, Cursor, Filter, Group, Health, Listed, Prune, Pruned, Replay, Trouble, Walked,
};
pub use self::record::{
    AttemptToken, Claimed, EventId, NewDelivery, NewEvent, Receipt, Settled, Start, StoredEvent,
};

#[cfg(feature = "sqlite")]
pub use self::sqlite::{Sqlite, SqliteOperator, SqliteOptions};
