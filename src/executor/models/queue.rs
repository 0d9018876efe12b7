//! Models of the [`queue`](crate::executor::queue): no task is left without a worker.
//!
//! The workers are a [`Crew`]. At most five threads, three items, two or three preemptions. The models
//! end when every worker has ended; one that waits though a task is queued is a deadlock.

use super::crew::{AT_ONCE, Crew, DUE, Habit, one, pusher};
use crate::executor::queue::Wake;
use crate::sync::model::{check, spawn};
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};

/// Invariants 1, 3 and 5. One or two workers, one pusher beside the main thread, two items: a push
/// races with the end of a worker's idle time. Three preemptions.
#[test]
fn loom_a_push_races_with_expire() {
    for max_workers in [1, 2] {
        for habit in [Habit::Expire, Habit::ExpireAfterSpuriousPoll] {
            check(3, move || {
                let crew = Crew::new(max_workers, 2, (habit, habit));
                crew.push(0);
                crew.push(1);
                crew.finish();
                crew.knows_of_no_worker();
            });
        }
    }
}

/// Invariants 1, 2 and 3. One or two workers that stay parked, two pushers: a push races with parking,
/// and with polls for no reason. Three preemptions.
#[test]
fn loom_two_pushes_race_with_parking() {
    for max_workers in [1, 2] {
        check(3, move || {
            let crew = Crew::new(max_workers, 2, (Habit::Stay, Habit::Stay));
            let other = pusher(&crew, 1);
            crew.push(0);
            other.join().unwrap();
            let state = crew.finish();
            assert!(state.told <= 2, "{} wake-ups for two tasks", state.told);
        });
    }
}

/// Invariants 1 and 3. One or two workers, two pushers, a third item that is due: pushes race with each
/// other and with the end of a worker's idle time. Two preemptions.
#[test]
fn loom_two_pushers_race_with_expire() {
    for max_workers in [1, 2] {
        check(2, move || {
            let crew = Crew::new(max_workers, 3, (Habit::Expire, Habit::Expire));
            let other = pusher(&crew, 1);
            crew.push(0);
            crew.push_due(DUE);
            other.join().unwrap();
            crew.finish();
        });
    }
}

/// Invariant 6. One or two workers, one pusher beside the main thread: an item whose worker lets others
/// go first, and one that may start at once, in either order. Three preemptions.
#[test]
fn loom_only_some_items_let_others_go_first() {
    for max_workers in [1, 2] {
        check(3, move || {
            let crew = Crew::new(max_workers, 2, (Habit::Stay, Habit::Stay));
            let other = pusher(&crew, AT_ONCE);
            crew.push(0);
            other.join().unwrap();
            crew.finish();
        });
    }
}

/// Invariant 1. The first worker is dropped at each point of its life while a second item is pushed;
/// one or two workers. What it was told is told to another, which runs everything. Three preemptions.
#[test]
fn loom_a_push_races_with_a_worker_that_leaves() {
    for max_workers in [1, 2] {
        for habit in [
            Habit::LeaveAtOnce,
            Habit::LeaveAtYield,
            Habit::LeaveParked,
            Habit::LeaveRunning,
        ] {
            check(3, move || {
                let crew = Crew::new(max_workers, 2, (habit, Habit::Expire));
                crew.push(0);
                crew.push(1);
                crew.finish();
                crew.knows_of_no_worker();
            });
        }
    }
}

/// Invariant 1. A worker that leaves while another is parked: the parked one is told. Two workers, two
/// preemptions.
#[test]
fn loom_a_worker_that_leaves_tells_a_parked_one() {
    for habit in [Habit::LeaveAtOnce, Habit::LeaveAtYield, Habit::LeaveParked] {
        check(2, move || {
            let crew = Crew::new(2, 3, (habit, Habit::Stay));
            let other = pusher(&crew, 1);
            crew.push(0);
            crew.push(2);
            other.join().unwrap();
            crew.finish();
        });
    }
}

/// Invariant 1, its exception. No runtime can start a worker: the first leaves, and what it would have
/// started is abandoned; the next push starts one that runs everything. Three preemptions.
#[test]
fn loom_after_a_failed_start_the_next_push_starts_a_worker() {
    check(3, || {
        let crew = Crew::new(1, 2, (Habit::Expire, Habit::Expire));
        crew.begin(0);
        let Wake::Start(lost) = crew.queue.push(one(0), true) else {
            panic!("nobody is told of the first task");
        };
        let failing = {
            let crew = crew.clone();
            spawn(move || match crew.queue.leave(&lost) {
                Wake::Start(worker) => crew.queue.abandon(&worker),
                wake => crew.act(wake),
            })
        };
        failing.join().unwrap();
        crew.push(1);
        crew.finish();
        crew.knows_of_no_worker();
    });
}

/// Invariant 2, its chain. Two workers, two items that wait for each other, pushed at once or one by
/// one: no item waits for a worker to be done while another could be started. Three preemptions.
#[test]
fn loom_a_busy_worker_leaves_nothing_behind() {
    for at_once in [true, false] {
        check(3, move || {
            let crew = Crew::together(2, (Habit::Expire, Habit::Expire));
            if at_once {
                let mut both = one(0);
                both.append(one(1));
                crew.begin(0);
                crew.begin(1);
                crew.act(crew.queue.push(both, true));
            } else {
                crew.push(0);
                crew.push(1);
            }
            crew.finish();
        });
    }
}

/// Cancel against start. One worker, two threads that take the same item back, or the oldest: each
/// item runs or is taken back, exactly once. Three preemptions.
#[test]
fn loom_a_cancel_races_with_the_start() {
    check(3, || {
        let crew = Crew::new(1, 2, (Habit::Expire, Habit::Expire));
        crew.push(0);
        crew.push(1);
        let cancel = {
            let crew = crew.clone();
            spawn(move || crew.queue.remove(|item| item.number == 1))
        };
        let oldest = crew.queue.pop_oldest(|_| true);
        let cancelled = cancel.join().unwrap();
        crew.join_all();
        let mut seen = crew.state.lock().ran.clone();
        seen.extend(oldest.map(|item| item.number));
        seen.extend(cancelled.map(|item| item.number));
        seen.sort_unstable();
        assert_eq!(seen, [0, 1]);
        assert_eq!(crew.queue.len(), 0);
        crew.knows_of_no_worker();
    });
}

/// Drain against registration, at the deadline: the one who drains marks the end and then takes all,
/// the one who registers pushes and then looks for the mark (`Shared::cancel_if_abandoned`). Each item
/// runs or is taken, exactly once, and none is left. One worker, three items, one of them a due retry;
/// two preemptions.
#[test]
fn loom_a_drain_takes_what_no_worker_has() {
    check(2, || {
        let crew = Crew::new(1, 3, (Habit::Expire, Habit::Expire));
        let abandoned = Arc::new(AtomicUsize::new(0));
        let taken = Arc::new(Mutex::new(Vec::new()));
        let take = {
            let (crew, taken) = (crew.clone(), taken.clone());
            move || {
                let (ready, due) = crew.queue.take_all();
                for mut items in [ready, due] {
                    while let Some(item) = items.pop() {
                        taken.lock().push(item.number);
                    }
                }
            }
        };
        crew.push(0);
        crew.push_due(DUE);
        let registering = {
            let (crew, abandoned, take) = (crew.clone(), abandoned.clone(), take.clone());
            spawn(move || {
                crew.push(1);
                if abandoned.load(Ordering::SeqCst) == 1 {
                    take();
                }
            })
        };
        abandoned.store(1, Ordering::SeqCst);
        take();
        registering.join().unwrap();
        // Before the workers are waited for: it does not depend on them.
        assert_eq!(crew.queue.len(), 0);
        crew.join_all();
        let mut seen = crew.state.lock().ran.clone();
        seen.extend(taken.lock().iter());
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, DUE]);
    });
}
