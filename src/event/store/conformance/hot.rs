//! Promises 1 to 10: append, claim, settle, recover.

use std::collections::HashSet;

use super::{Harness, append, claim, discard, event, names, settle};
use crate::event::store::{
    CRASHED, Filter, NewEvent, SUSPECT, Settle, Settled, Start, State, Store,
};

/// Promise 1.
pub async fn promise_01_append_is_atomic(harness: &impl Harness) {
    let store = harness.open().await;
    let twice = event("bad", &["a", "a"], 0);
    let error = store
        .append(vec![event("good", &["a"], 0), twice], 1)
        .await
        .unwrap_err();
    assert!(error.is_invalid(), "{error}");
    assert_eq!(
        store.counts().await.unwrap().events,
        0,
        "half a batch was recorded"
    );

    let batch = vec![event("one", &["a", "b"], 1), event("two", &["a"], 1)];
    let receipts = store.append(batch, 1).await.unwrap();
    assert!(receipts[0].event < receipts[1].event);
    let store = harness.crash(&store).await;
    let claimed = claim(&store, 10, 1).await;
    assert_eq!(
        names(&claimed),
        [
            ("one", "a".into()),
            ("one", "b".into()),
            ("two", "a".into())
        ]
    );
    assert_eq!(claimed[0].event.id, receipts[0].event);
}

/// Promise 2.
pub async fn promise_02_append_is_idempotent(harness: &impl Harness) {
    let store = harness.open().await;
    let first = store
        .append(vec![event("one", &["a"], 1).key("k")], 1)
        .await
        .unwrap();
    assert!(!first[0].duplicate);
    let store = harness.crash(&store).await;
    let batch = vec![
        event("one", &["a", "b"], 2).key("k"),
        event("two", &["a"], 2).key("l"),
        event("two", &["a", "b"], 2).key("l"),
        event("of another name", &["a"], 2).key("k"),
        event("no key", &["a"], 2),
        event("no key", &["a"], 2),
    ];
    let receipts = store.append(batch, 2).await.unwrap();
    assert_eq!(
        receipts.iter().map(|r| r.duplicate).collect::<Vec<_>>(),
        [true, false, true, false, false, false]
    );
    assert_eq!(receipts[0].event, first[0].event);
    assert_eq!(receipts[2].event, receipts[1].event);
    assert_eq!(claim(&store, 10, 2).await.len(), 5);
}

/// Promise 3.
pub async fn promise_03_claims_are_exclusive_and_in_due_order(harness: &impl Harness) {
    let store = harness.open().await;
    for (name, due_ms) in [("late", 30), ("early", 10), ("middle", 20), ("future", 99)] {
        store
            .append(vec![event(name, &["b", "a"], due_ms)], 1)
            .await
            .unwrap();
    }
    assert_eq!(store.next_due().await.unwrap(), Some(10));
    assert!(
        claim(&store, 10, 9).await.is_empty(),
        "claimed before it was due"
    );
    assert!(claim(&store, 0, 50).await.is_empty());
    let first = claim(&store, 3, 50).await;
    assert_eq!(
        names(&first),
        [
            ("early", "a".into()),
            ("early", "b".into()),
            ("middle", "a".into())
        ]
    );
    let rest = claim(&store, 100, 50).await;
    assert_eq!(
        names(&rest),
        [
            ("middle", "b".into()),
            ("late", "a".into()),
            ("late", "b".into())
        ]
    );
    let tokens: HashSet<_> = first.iter().chain(&rest).map(|c| c.token.clone()).collect();
    assert_eq!(tokens.len(), 6);

    // Many claimers at once: nobody gets what another has.
    let batch = (0..100).map(|_| event("many", &["a"], 60)).collect();
    store.append(batch, 60).await.unwrap();
    let (a, b, c) = tokio::join!(
        store.claim(40, 60),
        store.claim(40, 60),
        store.claim(40, 60)
    );
    let all: Vec<_> = [a, b, c].into_iter().flat_map(Result::unwrap).collect();
    let distinct: HashSet<_> = all.iter().map(|c| c.event.id).collect();
    assert_eq!((all.len(), distinct.len()), (100, 100));

    // Claimed with the append: nobody else gets it, and its token is good.
    let event = NewEvent::new("mine", "{}")
        .deliver("a", Start::Claimed)
        .deliver("b", Start::At(70))
        .deliver("c", Start::Claimed);
    let receipts = store.append(vec![event], 70).await.unwrap();
    let tokens = &receipts[0].claimed;
    assert_eq!(
        tokens.iter().map(|t| &**t.subscriber()).collect::<Vec<_>>(),
        ["a", "c"]
    );
    assert_eq!(names(&claim(&store, 10, 70).await), [("mine", "b".into())]);
    let settles = tokens
        .iter()
        .map(|t| (t.clone(), Settle::Complete))
        .collect();
    assert_eq!(
        store.settle(settles, 71).await.unwrap(),
        [Settled::Applied; 2]
    );
}

/// Promise 4.
pub async fn promise_04_attempts_count_at_the_start(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a"], 1).await;
    assert_eq!(claim(&store, 1, 1).await[0].attempt, 1);
    let store = harness.crash(&store).await;
    let second = claim(&store, 1, 2).await;
    assert_eq!(
        second[0].attempt, 2,
        "the attempt that the process died in did not count"
    );
    settle(
        &store,
        &second[0],
        Settle::Retry {
            due_ms: 3,
            error: String::new(),
        },
        2,
    )
    .await;
    assert_eq!(claim(&store, 1, 3).await[0].attempt, 3);
}

/// Promise 5.
pub async fn promise_05_settling_is_by_token(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a", "b"], 1).await;
    let first = claim(&store, 1, 1).await.remove(0);
    let retry = Settle::Retry {
        due_ms: 5,
        error: "timeout".into(),
    };
    assert_eq!(
        settle(&store, &first, retry.clone(), 2).await,
        Settled::Applied
    );
    assert_eq!(
        settle(&store, &first, Settle::Complete, 3).await,
        Settled::Stale,
        "while waiting"
    );
    let other = claim(&store, 1, 4).await.remove(0);
    assert_eq!(&**other.token.subscriber(), "b");
    let second = claim(&store, 1, 5).await.remove(0);
    for late in [
        Settle::Complete,
        retry,
        discard("fatal", ""),
        Settle::Release,
    ] {
        assert_eq!(
            settle(&store, &first, late, 6).await,
            Settled::Stale,
            "while running again"
        );
    }
    // One call, a void token among good ones.
    let settles = vec![
        (first.token.clone(), Settle::Complete),
        (second.token.clone(), Settle::Complete),
        (second.token.clone(), Settle::Complete),
        (other.token.clone(), Settle::Complete),
    ];
    assert_eq!(
        store.settle(settles, 7).await.unwrap(),
        [
            Settled::Stale,
            Settled::Applied,
            Settled::Stale,
            Settled::Applied
        ]
    );
    assert_eq!(store.counts().await.unwrap().finished, 2);
}

/// Promise 6.
pub async fn promise_06_retries_keep_due_time_and_error(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a"], 1).await;
    let first = claim(&store, 1, 1).await.remove(0);
    assert_eq!(first.last_error, None);
    settle(
        &store,
        &first,
        Settle::Retry {
            due_ms: 1_000,
            error: "no route".into(),
        },
        2,
    )
    .await;
    let store = harness.crash(&store).await;
    assert_eq!(store.next_due().await.unwrap(), Some(1_000));
    assert!(
        claim(&store, 1, 999).await.is_empty(),
        "claimed before its backoff was over"
    );
    let second = claim(&store, 1, 1_000).await.remove(0);
    assert_eq!(
        (second.attempt, second.due_ms, second.crashes),
        (2, 1_000, 0)
    );
    assert_eq!(second.last_error.as_deref(), Some("no route"));
}

/// Promise 7.
pub async fn promise_07_a_release_consumes_nothing(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a"], 1).await;
    let first = claim(&store, 1, 1).await.remove(0);
    assert_eq!(
        settle(&store, &first, Settle::Release, 2).await,
        Settled::Applied
    );
    let again = claim(&store, 1, 2).await.remove(0);
    assert_eq!((again.attempt, again.crashes), (1, 0));
    assert_ne!(again.token, first.token);
    assert_eq!(
        settle(&store, &first, Settle::Complete, 3).await,
        Settled::Stale
    );
    settle(
        &store,
        &again,
        Settle::Retry {
            due_ms: 4,
            error: String::new(),
        },
        3,
    )
    .await;
    let second = claim(&store, 1, 4).await.remove(0);
    settle(&store, &second, Settle::Release, 5).await;
    assert_eq!(store.counts().await.unwrap().retrying, 1);
    assert_eq!(claim(&store, 1, 5).await[0].attempt, 2);
}

/// Promise 8.
pub async fn promise_08_deliveries_are_independent(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a", "b", "c"], 1).await;
    let claimed = claim(&store, 3, 1).await;
    settle(&store, &claimed[1], discard("fatal", "no"), 2).await;
    settle(&store, &claimed[0], Settle::Complete, 2).await;
    assert_eq!(
        settle(&store, &claimed[2], Settle::Complete, 3).await,
        Settled::Applied
    );
    let replay = crate::event::store::Replay {
        name: "fixed".into(),
        filter: Filter::default(),
        limit: 10,
    };
    assert_eq!(store.replay(replay, 4).await.unwrap(), 1);
    assert_eq!(names(&claim(&store, 10, 4).await), [("one", "b".into())]);
}

/// Promise 9.
pub async fn promise_09_recovery_is_immediate(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a", "b"], 100).await;
    let claimed = claim(&store, 1, 100).await.remove(0);
    let store = harness.crash(&store).await;
    // At the very time of the claim: no lease has to run out.
    let again = claim(&store, 10, 100).await;
    assert_eq!(names(&again), [("one", "a".into()), ("one", "b".into())]);
    assert_eq!(again[0].crashes, 1);
    assert_eq!(again[1].crashes, 0, "what was not running was marked");
    assert_eq!(
        settle(&store, &claimed, Settle::Complete, 101).await,
        Settled::Stale,
        "a token of the dead process settled"
    );
}

/// Promise 10.
pub async fn promise_10_crashes_count(harness: &impl Harness) {
    let mut store = harness.open().await;
    append(&store, "killer", &["a"], 1).await;
    append(&store, "innocent", &["a"], 1).await;
    for crashes in 0..3 {
        let killer = claim(&store, 1, 1).await.remove(0);
        assert_eq!((&*killer.event.name, killer.crashes), ("killer", crashes));
        if crashes == 1 {
            // What is handed back was not running.
            let innocent = claim(&store, 1, 1).await.remove(0);
            settle(&store, &innocent, Settle::Release, 1).await;
        }
        store = harness.crash(&store).await;
    }
    assert_eq!(
        names(&claim(&store, 10, 1).await),
        [("innocent", "a".into())]
    );
    let dead = store
        .list(State::Discarded, Filter::default(), None, 10)
        .await
        .unwrap();
    assert_eq!(dead.len(), 1);
    assert_eq!((&*dead[0].event_name, dead[0].crashes), ("killer", 3));
    assert_eq!(dead[0].reason.as_deref(), Some(CRASHED));
    assert!(dead[0].error.is_some());
}

/// Promise 10, of those that merely ran beside it: the last chance is run alone.
pub async fn promise_10_suspects_are_claimed_alone(harness: &impl Harness) {
    let mut store = harness.open().await;
    let names_of = ["killer", "bystander", "fresh", "later"];
    for (due_ms, name) in names_of.iter().enumerate() {
        store
            .append(vec![event(name, &["a"], due_ms as i64)], 1)
            .await
            .unwrap();
    }
    for crashes in 0..SUSPECT {
        // Below, they go together.
        let claimed = claim(&store, 2, 1).await;
        let found: Vec<_> = claimed.iter().map(|c| c.crashes).collect();
        assert_eq!(found, [crashes; 2]);
        store = harness.crash(&store).await;
    }
    let killer = claim(&store, 10, 10).await;
    assert_eq!(names(&killer), [("killer", "a".into())]);
    assert_eq!(killer[0].crashes, SUSPECT);
    // It says that there is more.
    assert!(store.next_due().await.unwrap().is_some_and(|due| due <= 10));
    let store = harness.crash(&store).await;
    let bystander = claim(&store, 10, 10).await;
    assert_eq!(names(&bystander), [("bystander", "a".into())]);
    assert_eq!(
        settle(&store, &bystander[0], Settle::Complete, 11).await,
        Settled::Applied
    );
    let rest = claim(&store, 10, 12).await;
    assert_eq!(names(&rest), [("fresh", "a".into()), ("later", "a".into())]);
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.discarded, counts.finished), (1, 1));
}
