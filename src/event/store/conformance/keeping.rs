//! Promises 15 to 20: the past, pruning, counts, hints, closing, texts.

use std::time::Duration;

use super::{Harness, append, claim, discard, settle};
use crate::event::store::{
    AddPast, Counts, EventId, Filter, Keep, NewEvent, Prune, Settle, Start, State, Store,
};

/// Long enough for any machine; nothing waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Promise 15.
pub async fn promise_15_a_subscriber_gets_the_past_once(harness: &impl Harness) {
    let mut store = harness.open().await;
    for now_ms in [10, 20, 30] {
        append(&store, "user.created", &["mail"], now_ms).await;
        append(&store, "user.deleted", &["mail"], now_ms).await;
    }
    for claimed in claim(&store, 100, 30).await {
        settle(&store, &claimed, Settle::Complete, 31).await;
    }
    for round in 0..2 {
        let mut added = 0;
        let mut after = None;
        loop {
            let past = AddPast {
                event_name: "user.created".into(),
                since_ms: 20,
                subscriber: "crm".into(),
                aliases: Vec::new(),
                after,
                limit: 2,
            };
            let walked = store.add_past(past, 40).await.unwrap();
            added += walked.added;
            after = walked.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(added, if round == 0 { 2 } else { 0 }, "round {round}");
        let claimed = claim(&store, 100, 40).await;
        assert_eq!(claimed.len() as u64, added);
        assert!(claimed.iter().all(|c| c.event.recorded_ms >= 20));
        for (i, claimed) in claimed.iter().enumerate() {
            let end = if i == 0 {
                Settle::Complete
            } else {
                discard("fatal", "no")
            };
            settle(&store, claimed, end, 41).await;
        }
        store = harness.crash(&store).await;
    }
    // Who has had them already gets none.
    let mail = AddPast {
        event_name: "user.created".into(),
        since_ms: 0,
        subscriber: "mail".into(),
        aliases: Vec::new(),
        after: None,
        limit: 100,
    };
    assert_eq!(store.add_past(mail.clone(), 50).await.unwrap().added, 0);
    // Nor does who has had them under another name: "mail" had three, "crm" the last two of them.
    let renamed = |old: &str| AddPast {
        subscriber: "letters".into(),
        aliases: vec![old.into(), "nobody".into()],
        ..mail.clone()
    };
    for (old, added) in [("mail", 0), ("crm", 1)] {
        let walked = store.add_past(renamed(old), 60).await.unwrap();
        assert_eq!(walked.added, added, "known as {old}");
    }
}

/// Promise 16.
pub async fn promise_16_nothing_is_pruned_without_a_policy(harness: &impl Harness) {
    let store = harness.open().await;
    for now_ms in 1..=8 {
        append(&store, "one", &["a", "b"], now_ms).await;
    }
    for claimed in claim(&store, 100, 8).await {
        let end = match (claimed.event.recorded_ms, &**claimed.token.subscriber()) {
            (1, "a") => discard("fatal", "no"),
            (2, "a") => Settle::Retry {
                due_ms: 1_000,
                error: String::new(),
            },
            (3, "a") => Settle::Park {
                reason: "unknown".into(),
                error: String::new(),
            },
            _ => Settle::Complete,
        };
        settle(&store, &claimed, end, 10).await;
    }
    let nothing = Prune {
        before_ms: None,
        keep_last: None,
        after: None,
        limit: 100,
    };
    assert_eq!(store.prune(nothing).await.unwrap().events, 0);
    let old = Prune {
        before_ms: Some(6),
        ..nothing
    };
    // A step looks at no more than its limit.
    let step = store.prune(Prune { limit: 4, ..old }).await.unwrap();
    assert_eq!((step.events, step.deliveries), (1, 2));
    let rest = store
        .prune(Prune {
            after: step.next,
            ..old
        })
        .await
        .unwrap();
    assert_eq!((rest.events, rest.deliveries, rest.next), (1, 2, None));
    let few = Prune {
        keep_last: Some(2),
        ..nothing
    };
    assert_eq!(store.prune(few).await.unwrap().events, 1);
    // Everything is old now, and still the unfinished, the dead and the newest stay.
    let all = Prune {
        before_ms: Some(i64::MAX),
        ..nothing
    };
    assert_eq!(store.prune(all).await.unwrap().events, 1);
    let counts = store.counts().await.unwrap();
    assert_eq!(
        (
            counts.events,
            counts.discarded,
            counts.retrying,
            counts.parked,
            counts.finished,
            counts.pruned
        ),
        (4, 1, 1, 1, 5, 4)
    );
    // No number is given twice.
    let newest = store
        .append(vec![NewEvent::new("next", "{}")], 20)
        .await
        .unwrap();
    assert!(newest[0].event > EventId::new(8));
}

/// Promise 17.
pub async fn promise_17_counts_tell_the_truth(harness: &impl Harness) {
    let store = harness.open().await;
    assert_eq!(store.counts().await.unwrap(), Counts::default());
    append(&store, "one", &["a", "b", "c", "d", "e"], 1).await;
    append(&store, "two", &["a", "b"], 5).await;
    let claimed = claim(&store, 5, 1).await;
    settle(&store, &claimed[0], Settle::Complete, 2).await;
    settle(
        &store,
        &claimed[1],
        Settle::Retry {
            due_ms: 3,
            error: String::new(),
        },
        2,
    )
    .await;
    settle(&store, &claimed[2], discard("fatal", ""), 2).await;
    let park = Settle::Park {
        reason: "unknown".into(),
        error: String::new(),
    };
    settle(&store, &claimed[3], park, 2).await;
    let counts = Counts {
        queued: 2,
        running: 1,
        retrying: 1,
        parked: 1,
        discarded: 1,
        finished: 1,
        unknown: 0,
        events: 2,
        pruned: 0,
        oldest_due_ms: Some(3),
    };
    assert_eq!(store.counts().await.unwrap(), counts);
    for (state, count) in [
        (State::Queued, 2),
        (State::Running, 1),
        (State::Retrying, 1),
        (State::Parked, 1),
        (State::Discarded, 1),
    ] {
        let listed = store
            .list(state, Filter::default(), None, 10)
            .await
            .unwrap();
        assert_eq!(listed.len(), count, "{state}");
        assert!(listed.iter().all(|listed| listed.state == state));
    }
    assert!(store.health().trouble.is_none());
}

/// Promise 18. Only the half that can be tested: that a hint comes at all, where nothing is lost.
pub async fn promise_18_wakeups_are_hints(harness: &impl Harness) {
    let store = harness.open().await;
    let wakeups = store.wakeups();
    append(&store, "one", &["a"], 1).await;
    let hint = tokio::time::timeout(PATIENCE, wakeups.notified()).await;
    // A store without hints is a store all the same: what is due is found without them.
    drop(hint);
    assert_eq!(claim(&store, 1, 1).await.len(), 1);
}

/// Promise 19.
pub async fn promise_19_a_closed_store_refuses(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["a"], 1).await;
    let claimed = claim(&store, 1, 1).await.remove(0);
    store.close().await.unwrap();
    assert!(store.claim(1, 2).await.unwrap_err().is_closed());
    assert!(
        store
            .append(vec![NewEvent::new("x", "{}")], 2)
            .await
            .unwrap_err()
            .is_closed()
    );
    assert!(store.counts().await.unwrap_err().is_closed());
    store.close().await.unwrap();
    let store = harness.crash(&store).await;
    let again = claim(&store, 1, 2).await.remove(0);
    assert_eq!(
        (again.attempt, again.crashes),
        (1, 0),
        "an orderly close counted as a crash"
    );
    assert_eq!(again.event, claimed.event);
}

/// Promise 20.
pub async fn promise_20_texts_come_back(harness: &impl Harness) {
    let store = harness.open().await;
    let texts = [
        "",
        "{}",
        "ä€😀",
        "with \0 in it",
        "'; DROP TABLE defer_events; --",
        "a\nb\t\"c\"",
    ];
    for text in texts {
        let event = NewEvent::new(format!("name {text}"), text)
            .key(format!("key {text}"))
            .context(text)
            .deliver(format!("to {text}"), Start::At(1));
        store.append(vec![event], 1).await.unwrap();
    }
    let big = NewEvent::new("big", "x".repeat(1 << 20)).deliver("big", Start::At(2));
    store.append(vec![big], 1).await.unwrap();
    let store = harness.crash(&store).await;
    let claimed = claim(&store, 10, 2).await;
    assert_eq!(claimed.len(), texts.len() + 1);
    for (claimed, text) in claimed.iter().zip(texts) {
        assert_eq!(*claimed.event.name, format!("name {text}"));
        assert_eq!(**claimed.token.subscriber(), format!("to {text}"));
        assert_eq!(claimed.event.key, Some(format!("key {text}")));
        assert_eq!(claimed.event.payload, text);
        assert_eq!(claimed.event.context.as_deref(), Some(text));
        assert_eq!(claimed.event.recorded_ms, 1);
    }
    assert_eq!(claimed[texts.len()].event.payload.len(), 1 << 20);
    let error = "ö".repeat(10_000);
    settle(&store, &claimed[0], Settle::Retry { due_ms: 3, error }, 2).await;
    let again = claim(&store, 1, 3).await.remove(0);
    assert_eq!(again.last_error, Some("ö".repeat(2_048)));
}

/// Promise 16, by a policy that is applied step by step.
pub async fn promise_16_a_policy_prunes_step_by_step(harness: &impl Harness) {
    let store = harness.open().await;
    let batch = |now_ms| {
        (0..1_200)
            .map(|_| NewEvent::new("one", "{}").deliver("a", Start::At(now_ms)))
            .collect()
    };
    store.append(batch(1), 1).await.unwrap();
    store.append(batch(2), 2).await.unwrap();
    let settles = claim(&store, 2_300, 2).await.into_iter();
    let settles = settles.map(|c| (c.token, Settle::Complete)).collect();
    store.settle(settles, 3).await.unwrap();
    let none = Keep::everything().apply(&store, i64::MAX).await.unwrap();
    assert_eq!(none.events, 0);
    let old = Keep::newer_than(Duration::from_millis(8));
    let pruned = old.apply(&store, 10).await.unwrap();
    assert_eq!((pruned.events, pruned.deliveries), (1_200, 1_200));
    let few = Keep::everything().at_most(200);
    let pruned = few.apply(&store, 10).await.unwrap();
    assert_eq!((pruned.events, pruned.deliveries), (1_000, 1_000));
    let store = harness.crash(&store).await;
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.events, counts.pruned), (200, 2_200));
    assert_eq!((counts.queued, counts.finished), (100, 100));
}
