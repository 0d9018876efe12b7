//! The thread that owns a connection: it takes requests from a bounded queue and commits them in
//! groups.
//!
//! Not a pool, and not async: SQLite has one writer at a time, and a commit blocks on the disk. Not
//! on a timer: what arrives during one sync is the next group, so a lone request pays one sync and
//! sixty-four share one.
//!
//! Invariants:
//!
//! 1. A request is answered after the commit of its group, never before; if the commit fails,
//!    with the error.
//! 2. A request that fails for reasons of its own does not fail its group: the group is rolled
//!    back and each request gets a transaction of its own. If the fault is the store's (a full
//!    disk), the group fails as one.
//! 3. The thread ends by being closed, or when nobody can reach it any more; never by an error or
//!    a panic.
//! 4. A group is as durable as the request in it that asks for most. One that need be so for its events alone
//!    is left to the redo log.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::append;
use super::checkpoint::{self, Checkpoints, Done};
use super::connection::Access;
use super::desk::{Desk, Durable};
use super::fault::Fault;
use super::flow;
use super::lent::Lent;
use super::redo;
use super::shared::Shared;
use crate::event::store::StoreError;
use crate::event::store::life::Settle;
use crate::event::store::record::{AttemptToken, NewEvent, Receipt, Start};

/// How many requests may wait: beyond, callers wait for room.
pub(super) const QUEUE: usize = 1_024;

/// A request. It may be run more than once, if its group was rolled back in between.
pub(super) trait Job: Send {
    fn run(&mut self, desk: &mut Desk) -> Result<(), Fault>;
    fn answer(self: Box<Self>, result: Result<(), StoreError>, shared: &Arc<Shared>);
    fn terms(&self) -> Terms;
}

/// What the worker must know of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// The time that it brought.
    pub(super) now_ms: Option<i64>,
    /// Whether something may be claimable afterwards that was not before.
    pub(super) wakes: bool,
    /// Whether it must survive a power cut when it is answered.
    pub(super) durable: bool,
}

/// What the worker is asked. Appends are told from the rest because those of one group go into the
/// tables together.
pub(super) enum Request {
    Append(Append),
    Other(Box<dyn Job>),
}

/// A message to a worker.
pub(super) enum Message {
    Request(Request),
    /// Nobody has taken what was claimed.
    HandBack,
    /// Move the log into the database.
    Checkpoint(Done),
    Close(Closer),
}

/// Who waits for the end.
pub(super) type Closer = oneshot::Sender<Result<(), StoreError>>;

/// Who waits for an answer.
pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// Events to be recorded.
pub(super) struct Append {
    pub(super) events: Vec<NewEvent>,
    pub(super) now_ms: i64,
    pub(super) receipts: Vec<Receipt>,
    pub(super) reply: Reply<Lent<Vec<Receipt>>>,
}

impl Append {
    fn terms(&self) -> Terms {
        // What starts from memory is nothing to look for.
        let wakes = |event: &NewEvent| event.deliveries.iter().any(|d| d.start != Start::Claimed);
        Terms {
            now_ms: Some(self.now_ms),
            wakes: self.events.iter().any(wakes),
            durable: true,
        }
    }
}

/// A request made of a closure, and the one who waits for it.
pub(super) struct Op<T, U, F> {
    pub(super) work: F,
    pub(super) result: Option<T>,
    /// What becomes of the result when it is committed.
    pub(super) wrap: Wrap<T, U>,
    pub(super) reply: Reply<U>,
    pub(super) terms: Terms,
}

pub(super) type Wrap<T, U> = fn(T, &Arc<Shared>) -> U;

impl<T, U, F> Job for Op<T, U, F>
where
    T: Send,
    U: Send,
    F: FnMut(&mut Desk) -> Result<T, Fault> + Send,
{
    fn run(&mut self, desk: &mut Desk) -> Result<(), Fault> {
        self.result = Some((self.work)(desk)?);
        Ok(())
    }

    fn answer(self: Box<Self>, result: Result<(), StoreError>, shared: &Arc<Shared>) {
        let Self {
            result: value,
            wrap,
            reply,
            ..
        } = *self;
        let answer = result
            .and_then(|()| value.ok_or_else(|| StoreError::invalid("a request without a result")))
            .map(|value| wrap(value, shared));
        // Whoever has stopped waiting does not undo what was done.
        let _ = reply.send(answer);
    }

    fn terms(&self) -> Terms {
        self.terms
    }
}

impl Request {
    fn terms(&self) -> Terms {
        match self {
            Self::Append(append) => append.terms(),
            Self::Other(job) => job.terms(),
        }
    }

    fn answer(self, result: Result<(), StoreError>, shared: &Arc<Shared>) {
        match self {
            Self::Append(append) => {
                let receipts = |()| Lent::new(append.receipts, Arc::clone(shared));
                let _ = append.reply.send(result.map(receipts));
            }
            Self::Other(job) => job.answer(result, shared),
        }
    }
}

/// How durable a group must be (invariant 4).
fn durable(group: &[Request]) -> Durable {
    let mut bytes = 0;
    for request in group {
        match request {
            Request::Append(append) => {
                bytes += append.events.iter().map(redo::size).sum::<usize>();
            }
            Request::Other(job) if job.terms().durable => return Durable::Yes,
            Request::Other(_) => {}
        }
    }
    match bytes {
        0 => Durable::No,
        bytes => Durable::Events(bytes),
    }
}

/// Runs requests in their order, appends that follow each other as one.
fn run(desk: &mut Desk, mut requests: &mut [Request]) -> Result<(), Fault> {
    while let [first, ..] = requests {
        if let Request::Other(job) = first {
            job.run(desk)?;
            requests = &mut requests[1..];
            continue;
        }
        let appends = requests
            .iter()
            .take_while(|request| matches!(request, Request::Append(_)))
            .count();
        let (appends, rest) = requests.split_at_mut(appends);
        let batches = appends.iter().filter_map(|request| match request {
            Request::Append(append) => Some((&*append.events, append.now_ms)),
            Request::Other(_) => None,
        });
        let (conn, tally, redo) = desk.parts_to_record();
        let receipts = append::append(conn, tally, redo, batches, true)?;
        for (request, receipts) in appends.iter_mut().zip(receipts) {
            if let Request::Append(append) = request {
                append.receipts = receipts;
            }
        }
        requests = rest;
    }
    Ok(())
}

/// One thread's loop.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) desk: Desk,
    pub(super) queue: mpsc::Receiver<Message>,
    /// How long a group waits for a foreign lock before it fails.
    pub(super) patience_ms: u64,
    /// The last time that a request brought with it: this thread reads no clock.
    pub(super) now_ms: i64,
    /// The writer's.
    pub(super) checkpoints: Option<Checkpoints>,
}

impl Worker {
    /// Works until it is closed, or nobody can reach it any more. Returns who waits for the end.
    pub(super) fn run(
        &mut self,
        goodbye: impl FnMut(&mut Desk) -> Result<(), Fault>,
    ) -> (Vec<Closer>, Result<(), StoreError>) {
        let mut closers = Vec::new();
        let mut group = Vec::new();
        while let Some(message) = self.queue.blocking_recv() {
            let mut next = Some(message);
            let mut done = None;
            while let Some(message) = next {
                match message {
                    Message::Request(request) => group.push(request),
                    Message::HandBack => {}
                    Message::Checkpoint(through) => done = Some(through),
                    Message::Close(closer) => {
                        // What is in the queue was accepted, and is still done.
                        self.queue.close();
                        closers.push(closer);
                    }
                }
                next = if group.len() < QUEUE {
                    self.queue.try_recv().ok()
                } else {
                    None
                };
            }
            let group = std::mem::take(&mut group);
            // Invariant 3: also when a log subscriber of the user's panics.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                self.commit(group);
                self.hand_back();
            }));
            if self.queue.is_empty() {
                self.desk.rest();
            }
            let conn = self.desk.idle_conn();
            let mut is_suspect = false;
            if let (Some(conn), Some(_)) = (conn, &done) {
                is_suspect |= checkpoint::run(conn);
            }
            if let Some(checkpoints) = &mut self.checkpoints {
                is_suspect |= checkpoints.after_commit(conn);
            }
            if is_suspect {
                self.desk.shared.suspect();
            }
        }
        let result = self
            .desk
            .transact(self.now_ms, self.patience_ms, Durable::Yes, goodbye);
        (closers, result)
    }

    /// Invariants 1 and 2.
    fn commit(&mut self, mut group: Vec<Request>) {
        if group.is_empty() {
            return;
        }
        let result = self.attempt(&mut group);
        let is_shared = result
            .as_ref()
            .err()
            .is_none_or(StoreError::is_of_the_store);
        if is_shared || group.len() == 1 {
            self.answer(group, &result);
            return;
        }
        for request in group {
            let mut alone = vec![request];
            let result = self.attempt(&mut alone);
            self.answer(alone, &result);
        }
    }

    /// What was claimed for those who have stopped waiting is due again. Like the claim, it must survive the
    /// process only.
    fn hand_back(&mut self) {
        let attempts = match &self.checkpoints {
            Some(_) => self.desk.shared.take_unclaimed(),
            None => return,
        };
        if attempts.is_empty() {
            return;
        }
        let release = |token: &AttemptToken| (token.clone(), Settle::Release);
        let settles: Vec<_> = attempts.iter().map(release).collect();
        let (now_ms, patience_ms) = (self.now_ms, self.patience_ms);
        let result = self
            .desk
            .transact(now_ms, patience_ms, Durable::No, |desk| {
                flow::settle(desk, &settles, now_ms)
            });
        self.desk.report(now_ms, result.as_ref().map(drop));
        match result {
            Ok(_) => self.desk.shared.wakeups.notify_one(),
            // After the next group: whoever looks at the health sends a probe.
            Err(_) => self.desk.shared.keep_unclaimed(attempts),
        }
    }

    fn attempt(&mut self, group: &mut [Request]) -> Result<(), StoreError> {
        self.now_ms = group
            .iter()
            .filter_map(|request| request.terms().now_ms)
            .fold(self.now_ms, i64::max);
        let durable = durable(group);
        self.desk
            .transact(self.now_ms, self.patience_ms, durable, |desk| {
                run(desk, group)
            })
    }

    fn answer(&self, group: Vec<Request>, result: &Result<(), StoreError>) {
        if matches!(self.desk.access, Access::Write) {
            match result {
                Err(error) if error.is_invalid() => {}
                result => self.desk.report(self.now_ms, result.as_ref().map(drop)),
            }
            if result.is_ok() && group.iter().any(|request| request.terms().wakes) {
                self.desk.shared.wakeups.notify_one();
            }
        }
        for request in group {
            request.answer(result.clone(), &self.desk.shared);
        }
    }
}
