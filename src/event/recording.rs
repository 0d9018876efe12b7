//! A batch of events on its way into the store, and what follows from its being there.
//!
//! Once it has begun, the batch is the writer's: that the client leaves does not undo it, and its
//! deliveries start when the response is out, or at once where nobody waits for one.

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::sync::oneshot;

use super::EmitError;
use super::hub::{Before, Core, Hub};
use super::outgoing::{Holder, Outgoing};
use super::room::Room;
use super::store::{AttemptToken, NewDelivery, NewEvent, Receipt, Start, StoreError, StoredEvent};
use super::table::Subscription;
use crate::clock;
use crate::observe;
use crate::response::ResponseInfo;
use crate::sync::Arc;

/// Those whose condition holds; the others are told that it does not.
fn choose(outbox: Vec<Outgoing>, info: &ResponseInfo) -> Vec<Outgoing> {
    let mut chosen = Vec::new();
    for outgoing in outbox {
        // The condition is the user's code.
        match catch_unwind(AssertUnwindSafe(|| outgoing.when.holds(info))) {
            Ok(true) => chosen.push(outgoing),
            Ok(false) => {
                observe::event_skipped(outgoing.name(), outgoing.when.as_str());
                outgoing.answer(Err(EmitError::skipped()));
            }
            Err(payload) => {
                observe::panic_in_condition(outgoing.name(), &crate::error::panic_text(payload));
                outgoing.answer(Err(EmitError::skipped()));
            }
        }
    }
    chosen
}

/// A batch that is being recorded. Dropped before it is, it goes on by itself.
pub(crate) struct Recording {
    hub: Option<Arc<Hub>>,
    future: Option<InFlight>,
}

type InFlight = Pin<Box<dyn Future<Output = Result<(), EmitError>> + Send>>;

impl Recording {
    /// `info`: what the conditions are asked with, when this is first polled. `holder`: the request
    /// whose release its deliveries wait for.
    pub(crate) fn new(outbox: Vec<Outgoing>, info: ResponseInfo, holder: Arc<dyn Holder>) -> Self {
        Self {
            hub: outbox.first().map(|outgoing| outgoing.hub.clone()),
            future: Some(Box::pin(async move {
                record(choose(outbox, &info), Some(holder)).await
            })),
        }
    }

    /// No condition is asked.
    pub(crate) fn unconditional(batch: Vec<Outgoing>, holder: Option<Arc<dyn Holder>>) -> Self {
        Self {
            hub: batch.first().map(|outgoing| outgoing.hub.clone()),
            future: Some(Box::pin(record(batch, holder))),
        }
    }

    /// Leaves it to itself.
    pub(crate) fn go_on(self) {
        drop(self);
    }
}

impl Future for Recording {
    type Output = Result<(), EmitError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = self.future.as_mut() else {
            panic!("`Recording` polled after it was ready");
        };
        let recorded = ready!(future.as_mut().poll(cx));
        self.future = None;
        Poll::Ready(recorded)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let (Some(hub), Some(future)) = (self.hub.take(), self.future.take()) else {
            return;
        };
        // Where there is no runtime it is lost, with everything else of this process; that is said.
        hub.executor().shared().spawn(async move {
            // Who emitted them has their answers.
            let _ = future.await;
        });
    }
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recording")
    }
}

/// Records a batch; one of each hub's store, which is nearly always one. Where one fails, those that
/// would come after it are not recorded either.
async fn record(
    mut batch: Vec<Outgoing>,
    holder: Option<Arc<dyn Holder>>,
) -> Result<(), EmitError> {
    while let Some(first) = batch.first() {
        let hub = first.hub.clone();
        let (one, others) = batch
            .into_iter()
            .partition(|outgoing| Arc::ptr_eq(&outgoing.hub, &hub));
        batch = others;
        if let Err(error) = record_one(&hub, one, holder.as_ref()).await {
            if !batch.is_empty() {
                observe::not_recorded(batch.len());
            }
            for outgoing in batch {
                outgoing.answer(Err(error.clone()));
            }
            return Err(error);
        }
    }
    Ok(())
}

/// A delivery that starts from memory: there is room for it.
struct Lending {
    subscription: Arc<Subscription>,
    room: Room,
}

async fn record_one(
    hub: &Arc<Hub>,
    batch: Vec<Outgoing>,
    holder: Option<&Arc<dyn Holder>>,
) -> Result<(), EmitError> {
    let core: &Arc<Core> = hub;
    core.ensure_running();
    let now_ms = clock::unix_ms(clock::wall_now());
    let mut events = Vec::with_capacity(batch.len());
    let mut lendings = Vec::with_capacity(batch.len());
    let mut all_lent = true;
    for outgoing in &batch {
        let (event, lent) = with_deliveries(core, outgoing, now_ms);
        all_lent &= lent.len() == outgoing.listeners.len();
        events.push(event);
        lendings.push(lent);
    }
    // The courier may claim what is left to it as soon as it is recorded, and has to know by then that
    // it waits for this request.
    let waits = holder.is_some() && !all_lent;
    let append = append(
        core.clone(),
        batch,
        events,
        lendings,
        now_ms,
        holder.cloned(),
        waits,
    );
    if !waits {
        return append.await;
    }
    // By itself: it holds up the courier, and whoever polls us may have stopped to do so.
    let (said, heard) = oneshot::channel();
    core.executor().shared().spawn(async move {
        // Nobody may be waiting for it.
        let _ = said.send(append.await);
    });
    heard.await.unwrap_or_else(|_| Err(EmitError::lost()))
}

/// The append, and what follows from it.
async fn append(
    core: Arc<Core>,
    batch: Vec<Outgoing>,
    events: Vec<NewEvent>,
    lendings: Vec<Vec<Lending>>,
    now_ms: i64,
    holder: Option<Arc<dyn Holder>>,
    waits: bool,
) -> Result<(), EmitError> {
    let guard = if waits {
        Some(core.recording.read().await)
    } else {
        None
    };
    let appended = match &core.store {
        Some(store) => store.append(events, now_ms).await,
        None => Err(StoreError::closed()),
    };
    let receipts = match appended {
        Ok(receipts) => receipts,
        Err(error) => {
            core.trouble.tell("append", &error);
            observe::not_recorded(batch.len());
            for outgoing in batch {
                outgoing.answer(Err(EmitError::store(error.clone())));
            }
            return Err(EmitError::store(error));
        }
    };
    core.trouble.over("append");
    observe::recorded(batch.len());
    for ((receipt, outgoing), lent) in receipts.into_iter().zip(batch).zip(lendings) {
        // A duplicate's deliveries are the first one's, and wait for that request.
        if let (true, Some(holder)) = (waits && !receipt.duplicate, &holder) {
            core.unreleased.lock().add(receipt.event, holder);
        }
        lend(
            &core,
            receipt,
            &outgoing.event,
            now_ms,
            lent,
            holder.as_ref(),
        );
        outgoing.answer(Ok(()));
    }
    drop(guard);
    Ok(())
}

/// The event with a delivery for each listener: lent to us at once while there is room, else due at
/// once for the courier.
fn with_deliveries(core: &Core, outgoing: &Outgoing, now_ms: i64) -> (NewEvent, Vec<Lending>) {
    let mut event = outgoing.event.clone();
    let mut lent = Vec::new();
    for listener in &outgoing.listeners {
        let start = match core.try_room(&mut None) {
            Some(room) => {
                lent.push(Lending {
                    subscription: listener.clone(),
                    room,
                });
                Start::Claimed
            }
            None => Start::At(now_ms),
        };
        event.deliveries.push(NewDelivery {
            subscriber: listener.name.clone(),
            start,
        });
    }
    (event, lent)
}

/// Hands on what was recorded as ours. A duplicate brought nothing with it.
fn lend(
    core: &Arc<Core>,
    receipt: Receipt,
    event: &NewEvent,
    recorded_ms: i64,
    lent: Vec<Lending>,
    holder: Option<&Arc<dyn Holder>>,
) {
    if lent.is_empty() || receipt.claimed.is_empty() {
        return;
    }
    let event = Arc::new(StoredEvent {
        id: receipt.event,
        key: event.key.clone(),
        name: event.name.clone(),
        payload: event.payload.clone(),
        context: event.context.clone(),
        recorded_ms,
    });
    let tokens: Vec<AttemptToken> = receipt.claimed;
    for (token, Lending { subscription, room }) in tokens.into_iter().zip(lent) {
        if holder.is_some() {
            room.hold();
        }
        let node = core.lend(&subscription, &event, token, room, Before::default());
        match holder {
            Some(holder) => holder.clone().hold(core.executor(), node),
            None => core.executor().shared().enqueue_one(node, None),
        }
    }
}
