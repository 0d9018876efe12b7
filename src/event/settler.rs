//! Writes down how attempts ended, as many at a time as have come together: what arrives during one
//! commit is the next one. Completions may lag; a store error delays them and loses none.

use std::time::Duration;

use super::claim::Settlement;
use super::hub::Core;
use super::store::Settled;
use crate::clock;
use crate::observe;

/// No commit takes more than this many, so that a large one does not hold up what requests wait for.
const BATCH: usize = 512;

/// How long a store that failed is left alone: from the first number, doubled up to the second.
pub(super) const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

impl Core {
    /// Takes note of an end.
    pub(super) fn settle(&self, settlement: Settlement) {
        self.ended.lock().push(settlement);
        self.settles.notify_one();
    }

    /// Runs until the hub is gone and everything lent has come back.
    pub(super) async fn settle_all(&self) {
        let Some(store) = &self.store else { return };
        let mut pause = PAUSE.0;
        loop {
            let mut batch = Batch::take(self);
            if batch.settlements.is_empty() {
                if self.is_over() && self.window.lent() == 0 {
                    return;
                }
                tokio::select! {
                    () = self.settles.notified() => {}
                    () = self.window.empty.notified() => {}
                    () = self.over.notified() => {}
                }
                continue;
            }
            let settles = batch
                .settlements
                .iter()
                .map(|s| (s.token.clone(), s.settle.clone()))
                .collect();
            match store
                .settle(settles, clock::unix_ms(clock::wall_now()))
                .await
            {
                Ok(settled) => {
                    pause = PAUSE.0;
                    self.trouble.over("settle");
                    for (settlement, settled) in batch.settlements.drain(..).zip(settled) {
                        if settled == Settled::Stale {
                            observe::stale(settlement.token.subscriber());
                        }
                    }
                }
                Err(error) if error.is_closed() => {
                    // Closing has handed back what was running.
                    self.trouble.tell("settle", &error);
                    batch.settlements.clear();
                }
                Err(error) => {
                    self.trouble.tell("settle", &error);
                    drop(batch);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
    }
}

/// What is being written down. What of it was not, goes back, also when the runtime ends meanwhile: where
/// the store had it all the same, its token is void the second time.
struct Batch<'a> {
    core: &'a Core,
    settlements: Vec<Settlement>,
}

impl<'a> Batch<'a> {
    fn take(core: &'a Core) -> Self {
        let mut ended = core.ended.lock();
        let size = ended.len().min(BATCH);
        let settlements = ended.drain(..size).collect();
        Self { core, settlements }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.settlements);
        self.core.ended.lock().splice(..0, left);
    }
}
