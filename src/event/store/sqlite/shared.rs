//! What a store's threads and its handle share.
//!
//! Not the requests: those go through the [worker](super::worker)'s queue.

use std::sync::{Arc, OnceLock};

use tokio::sync::{Notify, mpsc};

use super::worker::Message;
use crate::event::store::query::Health;
use crate::event::store::record::AttemptToken;
use crate::sync::{AtomicBool, Mutex, Ordering};

/// What a store's threads and its handle share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) health: Mutex<Health>,
    pub(super) wakeups: Arc<Notify>,
    /// A sync of SQLite's log has failed, on whichever thread (invariant 3 of the [desk](super::desk)).
    is_suspect: AtomicBool,
    /// Attempts that nobody has taken: the writer hands them back.
    unclaimed: Mutex<Vec<AttemptToken>>,
    /// To wake it. Weak, because it ends when nobody can reach it.
    writer: OnceLock<mpsc::WeakSender<Message>>,
}

impl Shared {
    /// A sync of SQLite's log has failed.
    pub(super) fn suspect(&self) {
        // Release, with the acquire below: what failed, failed before.
        self.is_suspect.store(true, Ordering::Release);
    }

    /// Takes that back; whether it was said.
    pub(super) fn trust(&self) -> bool {
        self.is_suspect.swap(false, Ordering::AcqRel)
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.is_suspect.load(Ordering::Acquire)
    }

    /// Tells where the writer can be reached.
    pub(super) fn meet(&self, writer: &mpsc::Sender<Message>) {
        let _ = self.writer.set(writer.downgrade());
    }

    /// Attempts that nobody has taken. The writer may be on its way out: then it hands back all there is.
    pub(super) fn hand_back(&self, attempts: Vec<AttemptToken>) {
        self.keep_unclaimed(attempts);
        if let Some(writer) = self.writer.get().and_then(mpsc::WeakSender::upgrade) {
            // If its queue is full, it is awake, and looks after each group.
            let _ = writer.try_send(Message::HandBack);
        }
    }

    pub(super) fn keep_unclaimed(&self, attempts: Vec<AttemptToken>) {
        self.unclaimed.lock().extend(attempts);
    }

    pub(super) fn take_unclaimed(&self) -> Vec<AttemptToken> {
        std::mem::take(&mut self.unclaimed.lock())
    }
}
