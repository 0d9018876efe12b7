//! Inline mode of the test kit: an answer that waits for its tasks.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

pub(super) type Tasks = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An answer, and what comes before it.
pub(super) struct Inline<R> {
    /// Boxed: a future of production, where this is never used, does not grow by it.
    answer: Option<Box<R>>,
    tasks: Tasks,
}

impl<R> Inline<R> {
    pub(super) fn new(answer: R, tasks: Tasks) -> Self {
        Self {
            answer: Some(Box::new(answer)),
            tasks,
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<R> {
        ready!(self.tasks.as_mut().poll(cx));
        match self.answer.take() {
            Some(answer) => Poll::Ready(*answer),
            None => panic!("`DeferFuture` polled after it was ready"),
        }
    }
}

impl<R> fmt::Debug for Inline<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inline")
    }
}
