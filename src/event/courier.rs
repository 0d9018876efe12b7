//! The courier: claims due deliveries from the store while there is room, and hands them to the
//! executor.
//!
//! Invariants:
//! 1. It claims no more than there is room for, so that what is claimed starts soon.
//! 2. A store error delays it, and never ends it.
//! 3. Once a drain has begun it claims nothing.
//! 4. A delivery of a request whose response is not out waits with that request, also when the store
//!    hands it out before.

use std::future::Future;
use std::time::Duration;

use super::claim::{Settlement, UNKNOWN_EVENT, UNKNOWN_SUBSCRIBER, UNREADABLE};
use super::hub::{Before, Core};
use super::room::Room;
use super::settler::PAUSE;
use super::store::{Claimed, Filter, Settle, Store, StoreError};
use crate::clock;
use crate::observe;
use crate::sync::Arc;

/// It looks into the store so often though nobody told it to: hints may be lost, and the user's own
/// transactions give none.
const LOOK: Duration = Duration::from_secs(5);

/// Not at once again after a claim that found nothing of what was said to be due.
const BREATH: Duration = Duration::from_millis(20);

/// What the courier does next.
enum Next {
    Claim,
    /// Wait for room.
    Room,
    /// Wait to be told of something, or so long.
    Wait(Duration),
    /// The store is in trouble: leave it alone so long.
    Rest(Duration),
}

impl Core {
    /// Runs until a drain begins or the hub is gone. What it has asked the store for it waits for: a
    /// claim whose answer nobody hears would stay claimed by nobody.
    pub(super) async fn deliver(self: &Arc<Self>) {
        let Some(store) = &self.store else { return };
        let wakeups = store.wakeups();
        let mut pause = PAUSE.0;
        let mut taken_back = false;
        while !self.has_ended() {
            let step = if taken_back {
                self.claim_some(store).await
            } else {
                self.take_back(store).await
            };
            let next = match step {
                Ok(next) => {
                    taken_back = true;
                    pause = PAUSE.0;
                    self.trouble.over("deliver");
                    next
                }
                Err(error) => {
                    self.trouble.tell("deliver", &error);
                    let next = Next::Rest(pause);
                    pause = (pause * 2).min(PAUSE.1);
                    next
                }
            };
            match next {
                Next::Claim => {}
                Next::Room => self.unless_ended(self.window.freed.notified()).await,
                Next::Wait(time) => {
                    let told = async {
                        // Told or not, it looks again.
                        let _ = tokio::time::timeout(time, wakeups.notified()).await;
                    };
                    self.unless_ended(told).await;
                }
                Next::Rest(time) => self.unless_ended(tokio::time::sleep(time)).await,
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.is_over() || self.executor().shared().is_draining()
    }

    async fn unless_ended(&self, wait: impl Future<Output = ()>) {
        let mut over = std::pin::pin!(self.over.notified());
        over.as_mut().enable();
        if self.has_ended() {
            return;
        }
        tokio::select! {
            () = over => {}
            () = self.executor().shared().draining() => {}
            () = wait => {}
        }
    }

    /// Claims what there is room for.
    async fn claim_some(self: &Arc<Self>, store: &Arc<dyn Store>) -> Result<Next, StoreError> {
        let mut rooms = Vec::new();
        while let Some(room) = self.try_room() {
            rooms.push(room);
        }
        if rooms.is_empty() {
            return Ok(Next::Room);
        }
        let asked = rooms.len();
        let claimed = store
            .claim(asked, clock::unix_ms(clock::wall_now()))
            .await?;
        let found = claimed.len();
        if found > 0 {
            // Recordings that were under way have said by then whose deliveries these are.
            drop(self.recording.write().await);
        }
        for delivery in claimed {
            if let Some(room) = rooms.pop() {
                self.start(delivery, room);
            }
        }
        drop(rooms);
        if found == asked {
            return Ok(Next::Claim);
        }
        let now = clock::unix_ms(clock::wall_now());
        let wait = match store.next_due().await? {
            None => LOOK,
            Some(due) => Duration::from_millis(u64::try_from(due - now).unwrap_or(0)),
        };
        let least = if found > 0 {
            Duration::from_millis(1)
        } else {
            BREATH
        };
        Ok(Next::Wait(wait.clamp(least, LOOK)))
    }

    fn start(self: &Arc<Self>, delivery: Claimed, room: Room) {
        let subscriber = delivery.token.subscriber();
        let Some(subscription) = self.table.by_name(subscriber) else {
            let error = format!("no subscriber is called {subscriber:?}");
            return self.park(delivery, room, UNKNOWN_SUBSCRIBER, error);
        };
        if !subscription.hears(&delivery.event.name) {
            let name = &delivery.event.name;
            let error = format!("{subscriber:?} does not listen to {name:?}");
            return self.park(delivery, room, UNKNOWN_EVENT, error);
        }
        let before = Before {
            attempts: delivery.attempt.saturating_sub(1),
            last_error: delivery.last_error,
            age: Duration::ZERO,
        };
        let event = delivery.event;
        let node = self.lend(subscription, &event, delivery.token, room, before);
        let holder = self.unreleased.lock().holder(event.id);
        match holder {
            Some(holder) => holder.hold(self.executor(), node),
            None => self.executor().shared().enqueue_one(node, None),
        }
    }

    fn park(&self, delivery: Claimed, room: Room, reason: &'static str, error: String) {
        observe::parked(delivery.token.subscriber(), &delivery.event.name, reason);
        self.settle(Settlement {
            token: delivery.token,
            settle: Settle::Park {
                reason: reason.to_owned(),
                error,
            },
            _room: Some(room),
        });
    }

    /// What was parked because nobody here could run it, and may be run now: the code is another one
    /// since the last start.
    async fn take_back(&self, store: &Arc<dyn Store>) -> Result<Next, StoreError> {
        const STEP: usize = 1_000;
        for name in self.table.names() {
            for reason in [UNKNOWN_SUBSCRIBER, UNKNOWN_EVENT, UNREADABLE] {
                let filter = Filter {
                    subscriber: Some(name.clone()),
                    reason: Some(reason.to_owned()),
                    ..Filter::default()
                };
                loop {
                    let now = clock::unix_ms(clock::wall_now());
                    let back = store.unpark(filter.clone(), None, STEP, now).await?;
                    if back < STEP as u64 {
                        break;
                    }
                }
            }
        }
        Ok(Next::Claim)
    }
}
