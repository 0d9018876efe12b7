//! The courier: claims due deliveries from the store while there is room, and hands them to the
//! executor.
//!
//! Invariants:
//! 1. It claims no more than there is room for, so that what is claimed starts soon; and it takes no
//!    room before something is due, because whoever emits or registers meanwhile would find none.
//! 2. A store error delays it, and never ends it.
//! 3. Once a drain has begun it claims nothing.
//! 4. A delivery of a request whose response is not out waits with that request, also when the store
//!    hands it out before.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use super::claim::{Settlement, UNKNOWN_EVENT, UNKNOWN_SUBSCRIBER, UNREADABLE};
use super::hub::{Before, Core};
use super::room::Room;
use super::settler::PAUSE;
use super::store::{Claimed, Filter, Keep, SUSPECT, Settle, Store, StoreError};
use crate::clock;
use crate::executor::Permit;
use crate::observe;
use crate::sync::Arc;

/// It looks into the store so often though nobody told it to: hints may be lost, and the user's own
/// transactions give none.
const LOOK: Duration = Duration::from_secs(5);

/// Not at once again after a claim that found nothing of what was said to be due.
const BREATH: Duration = Duration::from_millis(20);

const HOUR: Duration = Duration::from_secs(3600);

/// How long a suspect waits for others to end, and then others for it. Long enough for what calls
/// somebody else; what takes longer is not held up by it for good.
const ALONE: Duration = Duration::from_secs(10);

/// What the courier does next.
enum Next {
    Claim,
    /// Wait until one that was lent has come back.
    Room,
    /// Wait for a place in the executor, which is full of others.
    Place,
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
        let mut place = None;
        while !self.has_ended() {
            // Where nothing is recorded any more, because a probe of readiness has turned all requests
            // away, nobody else would find out that the trouble is over.
            let probed = match store.health().trouble {
                Some(_) => store.probe(clock::unix_ms(clock::wall_now())).await,
                None => Ok(()),
            };
            let step = match probed {
                Err(error) => Err(error),
                Ok(()) if taken_back => self.claim_some(store, place.take()).await,
                Ok(()) => self.take_back(store).await,
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
                Next::Place => {
                    let reserved = async { place = self.executor().reserve().await.ok() };
                    self.unless_ended(reserved).await;
                }
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

    /// Applies the policy for finished events, at the start and then once an hour.
    pub(super) async fn prune(&self) {
        let Some(store) = &self.store else { return };
        while self.keep != Keep::everything() && !self.has_ended() {
            let now = clock::unix_ms(clock::wall_now());
            let pause = match self.keep.apply(&**store, now).await {
                Ok(_) => HOUR,
                Err(error) => {
                    self.trouble.tell("prune", &error);
                    PAUSE.1
                }
            };
            self.unless_ended(tokio::time::sleep(pause)).await;
        }
    }

    pub(super) fn has_ended(&self) -> bool {
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

    /// Claims what is due, as far as there is room. `permit`: a place that was waited for.
    async fn claim_some(
        self: &Arc<Self>,
        store: &Arc<dyn Store>,
        permit: Option<Permit>,
    ) -> Result<Next, StoreError> {
        let now = clock::unix_ms(clock::wall_now());
        let due = store.next_due().await?;
        let wait = due.map_or(LOOK, |due| {
            Duration::from_millis(u64::try_from(due - now).unwrap_or(0))
        });
        if !wait.is_zero() {
            return Ok(Next::Wait(wait.min(LOOK)));
        }
        // Half of what is free: requests that are answered meanwhile find room for theirs.
        let share = self.window.free().div_ceil(2);
        let mut place = permit.map(|permit| permit.into_parts().1);
        let places = self.executor().shared().admission.free().div_ceil(2).max(1);
        let mut rooms: Vec<Room> = (0..share.min(places))
            .map_while(|_| self.try_room(&mut place))
            .collect();
        if rooms.is_empty() {
            return Ok(if share == 0 { Next::Room } else { Next::Place });
        }
        let claimed = store
            .claim(rooms.len(), clock::unix_ms(clock::wall_now()))
            .await?;
        if claimed.is_empty() {
            return Ok(Next::Wait(BREATH));
        }
        let mut claims = InHand {
            core: self,
            claimed: claimed.into(),
        };
        // Recordings that were under way have said by then whose deliveries these are.
        drop(self.recording.write().await);
        let suspect = claims.claimed.iter().find(|it| it.crashes >= SUSPECT);
        if let Some(suspect) = suspect {
            rooms.truncate(1);
            let _closed = self.window.close();
            self.make_way(suspect).await;
            claims.start(&mut rooms);
            self.come_back(0).await;
        } else {
            claims.start(&mut rooms);
        }
        Ok(Next::Claim)
    }

    /// The process died twice while this ran, and once more makes a dead letter of it. So that it is
    /// not blamed for another's doing, it has the process for itself: nothing is lent meanwhile, and
    /// what is lent has a while to come back.
    async fn make_way(&self, delivery: &Claimed) {
        let event = &delivery.event;
        observe::suspect(delivery.token.subscriber(), &event.name, delivery.crashes);
        self.come_back(1).await;
    }

    /// Until no more than so many are lent, or [`ALONE`] has passed.
    async fn come_back(&self, left: usize) {
        let back = async {
            while self.window.lent() > left {
                self.window.freed.notified().await;
            }
        };
        let bounded = async {
            // A long one is not waited for.
            let _ = tokio::time::timeout(ALONE, back).await;
        };
        self.unless_ended(bounded).await;
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
        let now_ms = clock::unix_ms(clock::wall_now());
        let before = Before {
            attempts: delivery.attempt.saturating_sub(1),
            last_error: delivery.last_error,
            age: Duration::from_millis(u64::try_from(now_ms - delivery.since_ms).unwrap_or(0)),
        };
        let event = delivery.event;
        let holder = self.unreleased.lock().holder(event.id);
        if holder.is_some() {
            room.hold();
        }
        let node = self.lend(subscription, &event, delivery.token, room, before);
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
        // Nearly always there is nothing, and a start need not wait for three writes a name.
        if store.counts().await?.parked == 0 {
            return Ok(Next::Claim);
        }
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

/// What was claimed and has not started. What is left of it when the courier's runtime ends is handed back.
struct InHand<'a> {
    core: &'a Arc<Core>,
    claimed: VecDeque<Claimed>,
}

impl InHand<'_> {
    /// As far as there is room, which is all that was asked for.
    fn start(&mut self, rooms: &mut Vec<Room>) {
        for room in rooms.drain(..) {
            let Some(delivery) = self.claimed.pop_front() else {
                return;
            };
            self.core.start(delivery, room);
        }
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        for delivery in self.claimed.drain(..) {
            self.core.settle(Settlement {
                token: delivery.token,
                settle: Settle::Release,
                _room: None,
            });
        }
    }
}
