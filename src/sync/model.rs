//! The frame of the models, so that they name no primitive of loom themselves.
//!
//! Each model states its bound: threads (loom takes five at most, the main one included), items, and
//! preemptions: how often a thread is interrupted where it could have gone on. Switches where a thread
//! waits or ends are not counted, and are all explored.

use std::task::{Context, Wake, Waker};

use super::imp::Notify;
pub(crate) use super::thread::{JoinHandle, spawn};
use super::{Arc, Builder};
use crate::task::Link;

/// Runs `model` in every interleaving with at most so many preemptions.
///
/// A thread that waits for a bell that nobody will ring is a deadlock, and that fails the model: so
/// do lost wake-ups show.
pub(crate) fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// What a waker rings and one thread waits for. It may wake for no reason, once.
#[derive(Debug, Default)]
pub(crate) struct Bell(Notify);

impl Bell {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn wait(&self) {
        self.0.wait();
    }

    pub(crate) fn ring(&self) {
        self.0.notify();
    }

    pub(crate) fn waker(self: &Arc<Self>) -> Waker {
        self.clone().into()
    }

    /// Calls `poll` until it is ready, waiting for the bell in between.
    pub(crate) fn block_on<T>(
        self: &Arc<Self>,
        mut poll: impl FnMut(&mut Context<'_>) -> std::task::Poll<T>,
    ) -> T {
        let waker = self.waker();
        let mut cx = Context::from_waker(&waker);
        loop {
            if let std::task::Poll::Ready(ready) = poll(&mut cx) {
                return ready;
            }
            self.wait();
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

/// What stands for a task.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) number: usize,
    next: Option<Box<Item>>,
}

pub(crate) fn item(number: usize) -> Box<Item> {
    Box::new(Item { number, next: None })
}

impl Link for Box<Item> {
    fn link(&mut self) -> &mut Option<Self> {
        &mut self.next
    }
}
