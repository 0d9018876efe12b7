//! loom models of the [`gate`](super::gate): reservation against release, cancel against release.
//!
//! The invariants are those of its module documentation. At most four threads, two items, three
//! preemptions.

use super::gate::{Gate, Refused};
use crate::sync::model::{Item, check, item, spawn};
use crate::sync::{Arc, AtomicUsize, Ordering};
use crate::task::Fifo;

const PREEMPTIONS: usize = 3;

type Items = Fifo<Box<Item>>;

/// Beside the items: how often someone looked while opening it.
type TestGate = Gate<Box<Item>, usize>;

fn push(gate: &TestGate, number: usize) -> Result<(), Refused> {
    gate.enter(8).map(|entered| entered.push(item(number)))
}

fn open(gate: &TestGate) -> Option<Vec<usize>> {
    let mut opened = gate.open()?;
    *opened.beside() += 1;
    assert_eq!(*opened.beside(), 1, "opened twice");
    Some(numbers(opened.into_items()))
}

fn let_go(gate: &TestGate) -> Option<Vec<usize>> {
    if gate.let_go() { open(gate) } else { None }
}

fn numbers(mut items: Items) -> Vec<usize> {
    std::iter::from_fn(|| items.pop())
        .map(|item| item.number)
        .collect()
}

/// Invariants 1 and 2. Three threads: one holder lets go, two others push an item each.
#[test]
fn loom_a_push_races_with_the_last_let_go() {
    check(PREEMPTIONS, || {
        let gate = Arc::new(TestGate::new());
        let pushers = [0, 1].map(|number| {
            let gate = gate.clone();
            spawn(move || push(&gate, number))
        });
        let batch = let_go(&gate).expect("the only holder opens the gate");
        for (number, pusher) in pushers.into_iter().enumerate() {
            match pusher.join().unwrap() {
                Ok(()) => assert!(batch.contains(&number), "item {number} is lost"),
                Err(why) => {
                    assert_eq!(why, Refused::Open);
                    assert!(!batch.contains(&number), "item {number} is there twice");
                }
            }
        }
        assert_eq!(open(&gate), None, "opened twice");
    });
}

/// Invariants 1 and 3. Three threads, each a holder; two push an item before they let go. The one who
/// was last gets both items, and knows of both without the lock.
#[test]
fn loom_of_three_holders_the_last_one_opens() {
    check(PREEMPTIONS, || {
        let gate = Arc::new(TestGate::new());
        let written = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let holders = [0, 1].map(|number| {
            gate.hold();
            let (gate, written) = (gate.clone(), written.clone());
            spawn(move || {
                written[number].store(1, Ordering::Relaxed);
                push(&gate, number).unwrap();
                assert!(gate.pushed() > 0, "does not see its own item");
                open_as_last(&gate, &written)
            })
        });
        let mut batches = vec![open_as_last(&gate, &written)];
        batches.extend(holders.map(|holder| holder.join().unwrap()));
        let mut batches = batches.into_iter().flatten();
        let mut batch = batches.next().expect("nobody opened the gate");
        batch.sort_unstable();
        assert_eq!(batch, [0, 1]);
        assert_eq!(batches.next(), None, "opened twice");
    });
}

fn open_as_last(gate: &TestGate, written: &[AtomicUsize; 2]) -> Option<Vec<usize>> {
    if !gate.let_go() {
        return None;
    }
    assert_eq!(gate.pushed(), 2, "the hint is behind");
    for word in written {
        assert_eq!(word.load(Ordering::Relaxed), 1, "a holder's write is lost");
    }
    open(gate)
}

/// Invariant 1. Three threads: two chunks are let go, and the body ends meanwhile. Where it finds that it is
/// the only holder it opens without counting down.
#[test]
fn loom_the_only_holder_need_not_count_down() {
    check(PREEMPTIONS, || {
        let gate = Arc::new(TestGate::new());
        push(&gate, 0).unwrap();
        let written = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let chunks = [0, 1].map(|number| {
            gate.hold();
            let (gate, written) = (gate.clone(), written.clone());
            spawn(move || {
                written[number].store(1, Ordering::Relaxed);
                let_go(&gate)
            })
        });
        let body = if gate.is_held_once() {
            for word in &*written {
                assert_eq!(word.load(Ordering::Relaxed), 1, "a holder's write is lost");
            }
            open(&gate)
        } else {
            let_go(&gate)
        };
        let mut batches = vec![body];
        batches.extend(chunks.map(|chunk| chunk.join().unwrap()));
        let batches: Vec<_> = batches.into_iter().flatten().collect();
        assert_eq!(batches, [[0]], "opened once");
    });
}

/// Invariants 1 and 2. Three threads: the last holder lets go, another opens by force, a third pushes.
#[test]
fn loom_a_forced_open_races_with_let_go() {
    check(PREEMPTIONS, || {
        let gate = Arc::new(TestGate::new());
        push(&gate, 0).unwrap();
        let forced = {
            let gate = gate.clone();
            spawn(move || open(&gate))
        };
        let pushed = {
            let gate = gate.clone();
            spawn(move || push(&gate, 1))
        };
        let by_holder = let_go(&gate);
        let by_force = forced.join().unwrap();
        assert!(
            by_holder.is_some() != by_force.is_some(),
            "{by_holder:?}, {by_force:?}"
        );
        let batch = by_holder.or(by_force).unwrap();
        match pushed.join().unwrap() {
            Ok(()) => assert_eq!(batch, [0, 1]),
            Err(why) => assert_eq!((batch.as_slice(), why), (&[0][..], Refused::Open)),
        }
    });
}

/// Invariant 2 and the limit. Three threads: two push where there is room for one, one lets go.
#[test]
fn loom_the_limit_holds_and_nothing_is_lost_by_it() {
    check(PREEMPTIONS, || {
        let gate = Arc::new(TestGate::new());
        let pushers = [0, 1].map(|number| {
            let gate = gate.clone();
            spawn(move || gate.enter(1).map(|entered| entered.push(item(number))))
        });
        let batch = let_go(&gate).expect("the only holder opens the gate");
        let mut accepted = Vec::new();
        for (number, pusher) in pushers.into_iter().enumerate() {
            if pusher.join().unwrap().is_ok() {
                accepted.push(number);
            }
        }
        assert!(accepted.len() <= 1);
        assert_eq!(batch, accepted);
    });
}

/// Cancel against release. Three threads: two take the same item back, the holder lets go. Exactly one
/// of the three has it.
#[test]
fn loom_a_cancel_races_with_the_release() {
    check(PREEMPTIONS, || {
        let gate = Arc::new(TestGate::new());
        push(&gate, 0).unwrap();
        push(&gate, 1).unwrap();
        let cancels = [(); 2].map(|()| {
            let gate = gate.clone();
            spawn(move || gate.with(|items, _| items.remove(|item| item.number == 0).is_some()))
        });
        let batch = let_go(&gate).expect("the only holder opens the gate");
        let cancelled = cancels
            .into_iter()
            .map(|cancel| usize::from(cancel.join().unwrap()))
            .sum::<usize>();
        let released = batch.iter().filter(|number| **number == 0).count();
        assert_eq!(cancelled + released, 1);
        assert!(batch.contains(&1), "the other item is lost");
    });
}
