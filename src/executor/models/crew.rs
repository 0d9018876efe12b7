//! The frame of the models of the [`queue`](crate::executor::queue): workers that are threads and do
//! what `worker.rs` does, with wakers that ring a bell.

use std::task::Waker;

use crate::executor::queue::{Next, Queue, Wake, Worker};
use crate::sync::model::{Bell, Item, JoinHandle, item, spawn};
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};
use crate::task::Fifo;

/// This item has no response whose bytes others may have to write.
pub(super) const AT_ONCE: usize = 3;

/// Items from this number on are due retries.
pub(super) const DUE: usize = 4;

/// What a worker does when it finds nothing, or meets its end before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Habit {
    /// Retires all that are parked as soon as it is parked itself.
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

pub(super) struct Crew {
    pub(super) queue: Queue<Box<Item>>,
    max_workers: usize,
    expected: usize,
    /// The habit of the first worker, and of all others.
    habits: (Habit, Habit),
    /// A task that has begun waits for the others to begin.
    together: bool,
    pub(super) state: Mutex<State>,
    /// Bit by item: its push has begun.
    begun: AtomicUsize,
    at_work: AtomicUsize,
}

#[derive(Default)]
pub(super) struct State {
    started: usize,
    pub(super) told: usize,
    pub(super) ran: Vec<usize>,
    bells: Vec<Arc<Bell>>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    pub(super) fn new(max_workers: usize, expected: usize, habits: (Habit, Habit)) -> Arc<Self> {
        Arc::new(Self::apart(max_workers, expected, habits))
    }

    /// As many workers as tasks, and no task can end before all have begun.
    pub(super) fn together(expected: usize, habits: (Habit, Habit)) -> Arc<Self> {
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

    pub(super) fn push(self: &Arc<Self>, number: usize) {
        self.begin(number);
        self.act(self.queue.push(one(number), number != AT_ONCE));
    }

    pub(super) fn push_due(self: &Arc<Self>, number: usize) {
        self.begin(number);
        self.act(self.queue.push_due(one(number)));
    }

    pub(super) fn begin(&self, number: usize) {
        self.begun.fetch_add(1 << number, Ordering::Relaxed);
    }

    /// As `Shared::wake`.
    pub(super) fn act(self: &Arc<Self>, wake: Wake) {
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
            match self.queue.next(&mut me, &waker) {
                Next::Run(item, others) => {
                    if others {
                        self.act(self.queue.poke());
                    }
                    if item.number < AT_ONCE {
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
                // Not reached: that takes more items than a model has.
                Next::YieldOnce => {}
                Next::YieldFirst => {
                    if habit == Habit::LeaveAtYield {
                        return self.leave(&me);
                    }
                    begun_at_yield = self.begun.load(Ordering::Relaxed);
                }
                Next::End => return,
                Next::Park if std::mem::take(&mut spurious) => {}
                Next::Park => match habit {
                    Habit::Stay if self.is_over() => return,
                    Habit::Stay => bell.wait(),
                    Habit::LeaveParked => return self.leave(&me),
                    _ => {
                        let (retired, _) = self.queue.retire();
                        retired.into_iter().for_each(Waker::wake);
                        // Its own bell has been rung by that, or for a task in this very moment.
                        bell.wait();
                    }
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
    pub(super) fn finish(&self) -> State {
        self.join_all();
        let state = std::mem::take(&mut *self.state.lock());
        assert_eq!(self.queue.len(), 0, "left behind: only {:?} ran", state.ran);
        assert_eq!(state.ran.len(), self.expected, "ran: {:?}", state.ran);
        state
    }

    pub(super) fn join_all(&self) {
        loop {
            let next = self.state.lock().threads.pop();
            match next {
                Some(thread) => thread.join().unwrap(),
                None => return,
            }
        }
    }

    /// When all workers have ended, the queue knows of none: it starts one for the next task.
    pub(super) fn knows_of_no_worker(&self) {
        for _ in 0..self.max_workers {
            let wake = self.queue.push(one(8), true);
            let Wake::Start(mut worker) = wake else {
                panic!("a worker that has ended is still counted: {wake:?}");
            };
            // It takes the task, so that the next push finds it at work.
            let noop = Waker::noop();
            let _ = self.queue.next(&mut worker, noop);
            let next = self.queue.next(&mut worker, noop);
            assert!(matches!(next, Next::Run(..)));
        }
        let wake = self.queue.push(one(9), true);
        assert!(matches!(wake, Wake::Nobody), "one too many: {wake:?}");
    }
}

pub(super) fn one(number: usize) -> Fifo<Box<Item>> {
    let mut one = Fifo::new();
    one.push(item(number));
    one
}

pub(super) fn pusher(crew: &Arc<Crew>, number: usize) -> JoinHandle<()> {
    let crew = crew.clone();
    spawn(move || crew.push(number))
}
