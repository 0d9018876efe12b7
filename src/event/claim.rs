//! The keeper of a delivery that is lent to the executor: hears how its attempt ended, and has that
//! written down.

use super::hub::Core;
use super::room::Room;
use super::store::{AttemptToken, Settle};
use crate::clock;
use crate::sync::Arc;
use crate::task::{Keeper, Kept};

/// What is to be written down. Its room is free when that has been done.
#[derive(Debug)]
pub(super) struct Settlement {
    pub(super) token: AttemptToken,
    pub(super) settle: Settle,
    pub(super) _room: Option<Room>,
}

/// One attempt of a delivery. Dropped without a word (at a drain, with its runtime) it hands the
/// attempt back, which then does not count.
pub(super) struct Claim {
    core: Arc<Core>,
    /// None once it has been settled.
    lent: Option<(AttemptToken, Room)>,
}

impl Claim {
    pub(super) fn new(core: Arc<Core>, token: AttemptToken, room: Room) -> Self {
        Self {
            core,
            lent: Some((token, room)),
        }
    }

    fn settle(&mut self, settle: Settle) {
        if let Some((token, room)) = self.lent.take() {
            self.core.settle(Settlement {
                token,
                settle,
                _room: Some(room),
            });
        }
    }
}

impl Keeper for Claim {
    fn released(&self) {
        if let Some((_, room)) = &self.lent {
            room.release();
        }
    }

    fn ended(mut self: Box<Self>, end: Kept) {
        let settle = match end {
            Kept::Completed => Settle::Complete,
            Kept::Retry(after, error) => {
                let after = i64::try_from(after.as_millis()).unwrap_or(i64::MAX);
                Settle::Retry {
                    due_ms: clock::unix_ms(clock::wall_now()).saturating_add(after),
                    error: error.to_string(),
                }
            }
            Kept::Discarded(reason, error) => Settle::Discard {
                reason: reason.as_str().to_owned(),
                error: error.to_string(),
            },
            Kept::Unreadable(error) => Settle::Park {
                reason: UNREADABLE.to_owned(),
                error: error.to_string(),
            },
        };
        self.settle(settle);
    }

    fn is_gone(&self) -> bool {
        self.core.is_over()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.settle(Settle::Release);
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Claim").field(&self.lent).finish()
    }
}

/// Why a delivery is parked: nobody here answers to its subscriber's name.
pub(super) const UNKNOWN_SUBSCRIBER: &str = "unknown_subscriber";
/// Its subscriber does not listen to events of this name.
pub(super) const UNKNOWN_EVENT: &str = "unknown_event";
/// Its payload does not decode.
pub(super) const UNREADABLE: &str = "unreadable";
