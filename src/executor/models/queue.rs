//! Models of the [`queue`](crate::executor::queue): no task is left without a worker.
//!
//! Workers are threads that do what `worker.rs` does, with wakers that ring a bell. At most five
//! threads, three items, two or three preemptions. The models end when every worker has ended; one that
//! waits though a task is queued is a deadlock.

use std::task::Poll;

use super::super::queue::{Next, Queue, Wake, Worker};
use crate::sync::model::{Bell, Item, JoinHandle, check, item, spawn};
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};
use crate::task::Fifo;

/// What a worker does when it finds nothing, or meets its end before.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Habit {
    /// Ends when it is parked and has not been told: its idle time is over at once.
    Expire,
    /// The same, after one more poll by a waker that was left somewhere.
    ExpireAfterSpuriousPoll,
    /// Stays parked until everything has run.
    Stay,
    /// Its runtime drops it before its first poll.
    LeaveAtOnce,
    /// Its runtime drops it when it has been told to yield.
    LeaveAtYield,
    /// Its runtime drops it when it is parked, told or not.
    LeaveParked,
    /// Its runtime drops it in the middle of its first task, which is lost with it.
    LeaveRunning,
}

struct Crew {
    queue: Queue<Box<Item>>,
    max_workers: usize,
    expected: usize,
    /// The habit of the first worker, and of all others.
    habits: (Habit, Habit),
    /// A task that has begun waits for the others to begin.
    together: bool,
    state: Mutex<State>,
    /// Bit by item: its push has begun.
    begun: AtomicUsize,
    at_work: AtomicUsize,
}

#[derive(Default)]
struct State {
    started: usize,
    told: usize,
    ran: Vec<usize>,
    bells: Vec<Arc<Bell>>,
    threads: Vec<JoinHandle<()>>,
}

// Said again, so that the rule about long files knows it for a test.
#[cfg(all(test, defer_loom))]
impl Crew {
    fn new(max_workers: usize, expected: usize, habits: (Habit, Habit)) -> Arc<Self> {
        Arc::new(Self::apart(max_workers, expected, habits))
    }

    /// As many workers as tasks, and no task can end before all have begun.
    fn together(expected: usize, habits: (Habit, Habit)) -> Arc<Self> {
        Arc::new(Self {
            together: true,
            ..Self::apart(expected, expected, habits)
        })
    }

    fn apart(max_workers: usize, expected: usize, habits: (Habit, Habit)) -> Self {
        Self {
            queue: Queue::new(max_workers),
            max_workers,
            expected,
            habits,
            together: false,
            state: Mutex::new(State::default()),
            begun: AtomicUsize::new(0),
            at_work: AtomicUsize::new(0),
        }
    }

    fn push(self: &Arc<Self>, number: usize) {
        self.begin(number);
        self.act(self.queue.push(one(number)));
    }

    fn push_due(self: &Arc<Self>, number: usize) {
        self.begin(number);
        self.act(self.queue.push_due(one(number)));
    }

    fn begin(&self, number: usize) {
        self.begun.fetch_add(1 << number, Ordering::Relaxed);
    }

    /// As `Shared::wake`.
    fn act(self: &Arc<Self>, wake: Wake) {
        match wake {
            Wake::Nobody => {}
            Wake::Unpark(waker) => {
                self.state.lock().told += 1;
                waker.wake();
            }
            Wake::Start(worker) => {
                let mut state = self.state.lock();
                let habit = match state.started {
                    0 => self.habits.0,
                    _ => self.habits.1,
                };
                state.started += 1;
                state.told += 1;
                let crew = self.clone();
                state.threads.push(spawn(move || crew.work(worker, habit)));
            }
        }
    }

    /// As `worker.rs`.
    fn work(self: &Arc<Self>, mut me: Worker, habit: Habit) {
        let bell = Bell::new();
        let waker = bell.waker();
        let mut begun_at_yield = 0;
        if habit == Habit::Stay || self.together {
            self.state.lock().bells.push(bell.clone());
        }
        if habit == Habit::LeaveAtOnce {
            return self.leave(&me);
        }
        let mut spurious = habit == Habit::ExpireAfterSpuriousPoll;
        loop {
            let (next, wake) = self.queue.poll_next(&mut me, &waker);
            self.act(wake);
            match next {
                Poll::Ready(Next::Run(item)) => {
                    if item.number < DUE {
                        let yielded = begun_at_yield & (1 << item.number) != 0;
                        assert!(yielded, "item {} starts before a yield", item.number);
                    }
                    let others = self.at_work.fetch_add(1, Ordering::Relaxed);
                    assert!(others < self.max_workers);
                    if self.ran(item.number) {
                        self.ring_all();
                    }
                    while self.together && !self.is_over() {
                        bell.wait();
                    }
                    self.at_work.fetch_sub(1, Ordering::Relaxed);
                    if habit == Habit::LeaveRunning {
                        return self.leave(&me);
                    }
                }
                Poll::Ready(Next::YieldFirst) => {
                    if habit == Habit::LeaveAtYield {
                        return self.leave(&me);
                    }
                    begun_at_yield = self.begun.load(Ordering::Relaxed);
                }
                Poll::Pending if std::mem::take(&mut spurious) => {}
                Poll::Pending => match habit {
                    Habit::Stay if self.is_over() => return,
                    Habit::Stay => bell.wait(),
                    Habit::LeaveParked => return self.leave(&me),
                    _ if self.queue.expire(&me) => return,
                    // Told in this very moment: the bell has been rung, or will be.
                    _ => bell.wait(),
                },
            }
        }
    }

    fn leave(self: &Arc<Self>, me: &Worker) {
        self.act(self.queue.leave(me));
    }

    /// Whether that was the last one.
    fn ran(&self, number: usize) -> bool {
        let mut state = self.state.lock();
        assert!(!state.ran.contains(&number), "item {number} runs twice");
        state.ran.push(number);
        state.ran.len() == self.expected
    }

    fn is_over(&self) -> bool {
        self.state.lock().ran.len() == self.expected
    }

    fn ring_all(&self) {
        let bells = std::mem::take(&mut self.state.lock().bells);
        bells.iter().for_each(|bell| bell.ring());
    }

    /// Waits for all workers; everything has run then.
    fn finish(&self) -> State {
        self.join_all();
        let state = std::mem::take(&mut *self.state.lock());
        assert_eq!(self.queue.len(), 0, "left behind: only {:?} ran", state.ran);
        assert_eq!(state.ran.len(), self.expected, "ran: {:?}", state.ran);
        state
    }

    fn join_all(&self) {
        loop {
            let next = self.state.lock().threads.pop();
            match next {
                Some(thread) => thread.join().unwrap(),
                None => return,
            }
        }
    }

    /// When all workers have ended, the queue knows of none: it starts one for the next task.
    fn knows_of_no_worker(&self) {
        for _ in 0..self.max_workers {
            let wake = self.queue.push(one(8));
            let Wake::Start(mut worker) = wake else {
                panic!("a worker that has ended is still counted: {wake:?}");
            };
            // It takes the task, so that the next push finds it at work.
            let noop = std::task::Waker::noop();
            let _ = self.queue.poll_next(&mut worker, noop);
            let (next, _) = self.queue.poll_next(&mut worker, noop);
            assert!(matches!(next, Poll::Ready(Next::Run(_))));
        }
        let wake = self.queue.push(one(9));
        assert!(matches!(wake, Wake::Nobody), "one too many: {wake:?}");
    }
}

/// Items from this number on are due retries.
const DUE: usize = 4;

fn one(number: usize) -> Fifo<Box<Item>> {
    let mut one = Fifo::new();
    one.push(item(number));
    one
}

fn pusher(crew: &Arc<Crew>, number: usize) -> JoinHandle<()> {
    let crew = crew.clone();
    spawn(move || crew.push(number))
}

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
/// other and with the end of a worker's idle time. Three preemptions.
#[test]
fn loom_two_pushers_race_with_expire() {
    for max_workers in [1, 2] {
        check(3, move || {
            let crew = Crew::new(max_workers, 3, (Habit::Expire, Habit::Expire));
            let other = pusher(&crew, 1);
            crew.push(0);
            crew.push_due(DUE);
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
        let Wake::Start(lost) = crew.queue.push(one(0)) else {
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
                crew.act(crew.queue.push(both));
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
        let oldest = crew.queue.pop_oldest();
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
