//! The specification of [`Store`], as tests: one function for each numbered promise, over any
//! store.
//!
//! Not a benchmark, and not the fault tests: a disk that fails is each store's own matter.
//!
//! A store in another crate calls it like this:
//!
//! ```
//! use tower_defer::event::store::{Memory, conformance::Harness};
//!
//! struct InMemory;
//!
//! impl Harness for InMemory {
//!     type Store = Memory;
//!
//!     async fn open(&self) -> Memory {
//!         Memory::new()
//!     }
//!
//!     async fn crash(&self, store: &Memory) -> Memory {
//!         store.after_crash()
//!     }
//! }
//!
//! tower_defer::store_conformance!(in_memory, InMemory);
//! # fn main() {}
//! ```

mod hot;
mod keeping;
mod letters;

use std::future::Future;
use std::sync::Arc;

pub use self::hot::{
    promise_01_append_is_atomic, promise_02_append_is_idempotent,
    promise_03_claims_are_exclusive_and_in_due_order, promise_04_attempts_count_at_the_start,
    promise_05_settling_is_by_token, promise_06_retries_keep_due_time_and_error,
    promise_07_a_release_consumes_nothing, promise_08_deliveries_are_independent,
    promise_09_recovery_is_immediate, promise_10_crashes_count,
    promise_10_suspects_are_claimed_alone,
};
pub use self::keeping::{
    promise_15_a_subscriber_gets_the_past_once, promise_16_a_policy_prunes_step_by_step,
    promise_16_nothing_is_pruned_without_a_policy, promise_17_counts_tell_the_truth,
    promise_18_wakeups_are_hints, promise_19_a_closed_store_refuses, promise_20_texts_come_back,
};
pub use self::letters::{
    promise_11_dead_letters_stay, promise_12_replay_is_idempotent_by_name,
    promise_13_discard_takes_exactly_what_matches, promise_14_parked_deliveries_can_be_discarded,
    promise_14_parked_deliveries_wait,
};
use super::{Claimed, NewEvent, Settle, Settled, Start, Store};

/// How the suite gets its stores.
pub trait Harness: Send + Sync {
    /// The store under test.
    type Store: Store;

    /// A new store, empty.
    fn open(&self) -> impl Future<Output = Self::Store> + Send;

    /// What a new process finds after the one that had `store` open was killed now. The suite does
    /// not use `store` any more.
    fn crash(&self, store: &Self::Store) -> impl Future<Output = Self::Store> + Send;
}

/// Makes a module of tests, one for each promise, from a harness. Needs `tokio` with `macros` and
/// `rt` where it is called.
#[macro_export]
macro_rules! store_conformance {
    ($module:ident, $harness:expr) => {
        $crate::store_conformance!(@tests $module, $harness,
            promise_01_append_is_atomic
            promise_02_append_is_idempotent
            promise_03_claims_are_exclusive_and_in_due_order
            promise_04_attempts_count_at_the_start
            promise_05_settling_is_by_token
            promise_06_retries_keep_due_time_and_error
            promise_07_a_release_consumes_nothing
            promise_08_deliveries_are_independent
            promise_09_recovery_is_immediate
            promise_10_crashes_count
            promise_10_suspects_are_claimed_alone
            promise_11_dead_letters_stay
            promise_12_replay_is_idempotent_by_name
            promise_13_discard_takes_exactly_what_matches
            promise_14_parked_deliveries_can_be_discarded
            promise_14_parked_deliveries_wait
            promise_15_a_subscriber_gets_the_past_once
            promise_16_a_policy_prunes_step_by_step
            promise_16_nothing_is_pruned_without_a_policy
            promise_17_counts_tell_the_truth
            promise_18_wakeups_are_hints
            promise_19_a_closed_store_refuses
            promise_20_texts_come_back
        );
    };
    (@tests $module:ident, $harness:expr, $($promise:ident)*) => {
        mod $module {
            #[expect(unused_imports, reason = "a harness may be a path that needs none of them")]
            use super::*;
            $(
                #[tokio::test]
                async fn $promise() {
                    $crate::event::store::conformance::$promise(&$harness).await;
                }
            )*
        }
    };
}

/// An event for these subscribers, due at `due_ms`.
fn event(name: &str, subscribers: &[&str], due_ms: i64) -> NewEvent {
    subscribers.iter().fold(
        NewEvent::new(name, format!("{{\"of\":\"{name}\"}}")),
        |event, name| event.deliver(*name, Start::At(due_ms)),
    )
}

/// Appends one event for each of these subscribers.
async fn append(store: &impl Store, name: &str, subscribers: &[&str], now_ms: i64) {
    store
        .append(vec![event(name, subscribers, now_ms)], now_ms)
        .await
        .expect("append");
}

async fn claim(store: &impl Store, limit: usize, now_ms: i64) -> Vec<Claimed> {
    store.claim(limit, now_ms).await.expect("claim")
}

async fn settle(store: &impl Store, claimed: &Claimed, settle: Settle, now_ms: i64) -> Settled {
    let settled = store
        .settle(vec![(claimed.token.clone(), settle)], now_ms)
        .await;
    settled.expect("settle")[0]
}

fn discard(reason: &str, error: &str) -> Settle {
    Settle::Discard {
        reason: reason.into(),
        error: error.into(),
    }
}

fn names(claimed: &[Claimed]) -> Vec<(&str, Arc<str>)> {
    claimed
        .iter()
        .map(|c| (&*c.event.name, Arc::clone(c.token.subscriber())))
        .collect()
}
