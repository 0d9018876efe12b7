//! Promises 11 to 14: dead letters and parked deliveries.

use std::collections::HashSet;

use super::{Harness, append, claim, discard, names, settle};
use crate::event::store::{AddPast, Filter, Replay, Settle, State, Store};

/// Appends `count` events and lets the delivery of each end as a dead letter.
async fn kill(store: &impl Store, count: usize, subscriber: &str, error: &str, now_ms: i64) {
    for _ in 0..count {
        append(store, "user.created", &[subscriber], now_ms).await;
    }
    let settles = claim(store, count, now_ms).await.into_iter().enumerate();
    let settles = settles
        .map(|(i, c)| {
            (
                c.token,
                discard("exhausted", &error.replace('N', &i.to_string())),
            )
        })
        .collect();
    store.settle(settles, now_ms).await.expect("settle");
}

/// Promise 11.
pub async fn promise_11_dead_letters_stay(harness: &impl Harness) {
    let store = harness.open().await;
    kill(&store, 7, "mail", "user N not found", 10).await;
    kill(&store, 3, "mail", "no route to 10.0.0.N:25", 20).await;
    kill(&store, 2, "crm", "user N not found", 30).await;
    let store = harness.crash(&store).await;
    assert!(
        claim(&store, 100, 1_000_000).await.is_empty(),
        "a dead letter was claimed"
    );

    let mut seen = HashSet::new();
    let mut after = None;
    loop {
        let page = store
            .list(State::Discarded, Filter::default(), after, 5)
            .await
            .unwrap();
        assert!(page.len() <= 5);
        assert!(
            page.iter().all(|letter| seen.insert(letter.cursor())),
            "listed twice"
        );
        assert!(
            page.iter()
                .all(|letter| letter.payload.contains("user.created"))
        );
        let Some(last) = page.last() else { break };
        after = Some(last.cursor());
    }
    assert_eq!(seen.len(), 12);

    let groups = store.group(Filter::default(), 10).await.unwrap();
    let short: Vec<_> = groups
        .iter()
        .map(|g| (&*g.subscriber, g.error_group.as_str(), g.count))
        .collect();
    assert_eq!(
        short,
        [
            ("mail", "user # not found", 7),
            ("mail", "no route to #", 3),
            ("crm", "user # not found", 2)
        ]
    );
    assert_eq!((groups[1].first_ms, groups[1].last_ms), (20, 20));
    assert_eq!(store.group(Filter::default(), 1).await.unwrap().len(), 1);

    for (filter, count) in [
        (
            Filter {
                subscriber: Some("mail".into()),
                ..Filter::default()
            },
            10,
        ),
        (
            Filter {
                error_group: Some("user # not found".into()),
                ..Filter::default()
            },
            9,
        ),
        (
            Filter {
                event_name: Some("user.created".into()),
                ..Filter::default()
            },
            12,
        ),
        (
            Filter {
                event_name: Some("other".into()),
                ..Filter::default()
            },
            0,
        ),
        (
            Filter {
                reason: Some("exhausted".into()),
                ..Filter::default()
            },
            12,
        ),
        (
            Filter {
                reason: Some("fatal".into()),
                ..Filter::default()
            },
            0,
        ),
        (
            Filter {
                from_ms: Some(20),
                ..Filter::default()
            },
            5,
        ),
        (
            Filter {
                from_ms: Some(20),
                until_ms: Some(30),
                ..Filter::default()
            },
            3,
        ),
    ] {
        let found = store
            .list(State::Discarded, filter.clone(), None, 100)
            .await
            .unwrap();
        assert_eq!(found.len(), count, "{filter:?}");
    }
}

/// Promise 12.
pub async fn promise_12_replay_is_idempotent_by_name(harness: &impl Harness) {
    let store = harness.open().await;
    kill(&store, 10, "mail", "user N not found", 10).await;
    kill(&store, 1, "crm", "user N not found", 10).await;
    let replay = |name: &str, limit| Replay {
        name: name.into(),
        filter: Filter {
            subscriber: Some("mail".into()),
            ..Filter::default()
        },
        limit,
    };
    let identity = store
        .list(State::Discarded, Filter::default(), None, 1)
        .await
        .unwrap();
    assert_eq!(store.replay(replay("fix", 4), 20).await.unwrap(), 4);
    let claimed = claim(&store, 100, 20).await;
    assert_eq!(claimed.len(), 4);
    assert_eq!(
        claimed[0].event.id, identity[0].event,
        "a replay changed the identity"
    );
    assert_eq!((claimed[0].attempt, claimed[0].crashes), (1, 0));
    // Two succeed, one fails again, one is running when the process dies.
    settle(&store, &claimed[0], Settle::Complete, 21).await;
    settle(&store, &claimed[1], Settle::Complete, 21).await;
    settle(&store, &claimed[2], discard("exhausted", "again"), 21).await;
    let store = harness.crash(&store).await;
    assert_eq!(
        store.replay(replay("fix", 100), 22).await.unwrap(),
        6,
        "replayed twice"
    );
    assert_eq!(store.replay(replay("fix", 100), 23).await.unwrap(), 0);
    assert_eq!(claim(&store, 100, 30).await.len(), 7);
    let counts = store.counts().await.unwrap();
    assert_eq!(
        (counts.discarded, counts.running, counts.finished),
        (2, 7, 2)
    );
    // Another name is another replay.
    assert_eq!(store.replay(replay("fix again", 100), 31).await.unwrap(), 1);
}

/// Promise 13.
pub async fn promise_13_discard_takes_exactly_what_matches(harness: &impl Harness) {
    let store = harness.open().await;
    kill(&store, 5, "mail", "gone", 10).await;
    kill(&store, 2, "crm", "gone", 10).await;
    let mail = Filter {
        subscriber: Some("mail".into()),
        ..Filter::default()
    };
    assert_eq!(store.discard(mail.clone(), 3, 20).await.unwrap(), 3);
    assert_eq!(store.discard(mail, 100, 20).await.unwrap(), 2);
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.discarded, counts.finished), (2, 5));
    assert_eq!(counts.events, 7, "an event went with its dead letter");
}

/// Promise 14: those that match become history, and nothing else of their event does.
pub async fn promise_14_parked_deliveries_can_be_discarded(harness: &impl Harness) {
    let store = harness.open().await;
    for _ in 0..3 {
        append(&store, "one", &["gone", "mail", "failed", "waits"], 1).await;
    }
    for claimed in claim(&store, 12, 1).await {
        let end = match &**claimed.token.subscriber() {
            "failed" => discard("fatal", "no"),
            "waits" => Settle::Release,
            subscriber => Settle::Park {
                reason: format!("unknown {subscriber}"),
                error: "gone".into(),
            },
        };
        settle(&store, &claimed, end, 2).await;
    }
    let gone = Filter {
        subscriber: Some("gone".into()),
        reason: Some("unknown gone".into()),
        ..Filter::default()
    };
    let discard = |filter: &Filter, limit| store.discard_parked(filter.clone(), limit, 3);
    assert_eq!(discard(&gone, 2).await.unwrap(), 2);
    assert_eq!(discard(&gone, 2).await.unwrap(), 1);
    assert_eq!(discard(&gone, 2).await.unwrap(), 0);
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.parked, counts.finished), (3, 3));
    assert_eq!((counts.discarded, counts.queued), (3, 3));
    // For good: neither is it unparked, nor given to the subscriber once more.
    let store = harness.crash(&store).await;
    assert_eq!(store.unpark(gone, None, 10, 4).await.unwrap(), 0);
    let past = AddPast {
        event_name: "one".into(),
        since_ms: 0,
        subscriber: "gone".into(),
        aliases: Vec::new(),
        after: None,
        limit: 10,
    };
    assert_eq!(store.add_past(past, 5).await.unwrap().added, 0);
    let all = Filter::default();
    assert_eq!(store.discard_parked(all, 10, 6).await.unwrap(), 3);
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.parked, counts.finished), (0, 6));
    assert_eq!((counts.discarded, counts.queued), (3, 3));
}

/// Promise 14.
pub async fn promise_14_parked_deliveries_wait(harness: &impl Harness) {
    let store = harness.open().await;
    append(&store, "one", &["old", "other"], 1).await;
    append(&store, "two", &["old", "new"], 1).await;
    for claimed in claim(&store, 10, 1).await {
        let known = matches!(&**claimed.token.subscriber(), "new");
        let park = Settle::Park {
            reason: "unknown_subscriber".into(),
            error: "gone".into(),
        };
        settle(
            &store,
            &claimed,
            if known { Settle::Complete } else { park },
            2,
        )
        .await;
    }
    let store = harness.crash(&store).await;
    assert!(
        claim(&store, 10, 1_000_000).await.is_empty(),
        "a parked delivery was claimed"
    );
    let parked = store
        .list(State::Parked, Filter::default(), None, 10)
        .await
        .unwrap();
    assert_eq!(parked.len(), 3);
    assert_eq!(parked[0].reason.as_deref(), Some("unknown_subscriber"));

    // Renamed; of the second event the new name has had a delivery already.
    let old = Filter {
        subscriber: Some("old".into()),
        ..Filter::default()
    };
    assert_eq!(
        store
            .unpark(old.clone(), Some("new".into()), 10, 10)
            .await
            .unwrap(),
        1
    );
    let claimed = claim(&store, 10, 10).await;
    assert_eq!(names(&claimed), [("one", "new".into())]);
    assert_eq!(claimed[0].attempt, 1, "a parked attempt was counted");
    assert_eq!(
        store
            .unpark(old.clone(), Some("new".into()), 10, 10)
            .await
            .unwrap(),
        0
    );
    // Back under its own name.
    assert_eq!(store.unpark(old, None, 10, 11).await.unwrap(), 1);
    assert_eq!(names(&claim(&store, 10, 11).await), [("two", "old".into())]);
    assert_eq!(
        store.unpark(Filter::default(), None, 10, 12).await.unwrap(),
        1
    );
}
