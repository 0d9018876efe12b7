//! The timeouts of a worker's attempts.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::task::unconstrained;
use tokio::time::Sleep;

use crate::clock::{Clock, Tick};

/// One timer per worker, for the timeouts of its attempts.
///
/// It is moved only when it is too late for what it is wanted for: armed for an attempt that has ended
/// since, it goes off early and is then set again. So attempts that end in time, which is nearly all
/// of them, do not touch the runtime's timer wheel. A parked worker may be woken by it, once and for
/// nothing.
#[derive(Default)]
pub(super) struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    /// When the timer goes off, if it is armed.
    at: Option<Tick>,
    /// Whom it wakes then. While that stays, an armed timer need not be polled again.
    wakes: Option<Waker>,
}

impl Alarm {
    /// Ready at the deadline. `now` where it is known: what is armed for later than that has not gone off,
    /// and need not be asked, which after some milliseconds is a load from memory (37 of 5,056 samples of
    /// a server's CPU).
    pub(super) fn poll_until(
        &mut self,
        clock: &Clock,
        deadline: Tick,
        now: Option<Tick>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            let at = match self.at {
                Some(at) if at <= deadline => at,
                _ => {
                    self.set(clock, deadline);
                    deadline
                }
            };
            match &mut self.sleep {
                Some(sleep) => {
                    let known = self.wakes.as_ref();
                    if known.is_some_and(|known| known.will_wake(cx.waker()))
                        && (now.is_some_and(|now| now < at) || !sleep.is_elapsed())
                    {
                        return Poll::Pending;
                    }
                    // Also where the task has used up its turn: pending means that the waker is known.
                    let mut sleep = unconstrained(sleep.as_mut());
                    if Pin::new(&mut sleep).poll(cx).is_pending() {
                        self.wakes = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
                None => return Poll::Pending,
            }
            self.at = None;
            if at >= deadline {
                return Poll::Ready(());
            }
        }
    }

    fn set(&mut self, clock: &Clock, at: Tick) {
        let instant = clock.instant(at);
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().reset(instant),
            None => self.sleep = Some(Box::pin(tokio::time::sleep_until(instant))),
        }
        self.at = Some(at);
        self.wakes = None;
    }
}
