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
            let batch = {
                let mut ended = self.ended.lock();
                let size = ended.len().min(BATCH);
                ended.drain(..size).collect::<Vec<_>>()
            };
            if batch.is_empty() {
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
                    for (settlement, settled) in batch.iter().zip(settled) {
                        if settled == Settled::Stale {
                            observe::stale(settlement.token.subscriber());
                        }
                    }
                }
                Err(error) if error.is_closed() => {
                    // Closing has handed back what was running.
                    self.trouble.tell("settle", &error);
                }
                Err(error) => {
                    self.trouble.tell("settle", &error);
                    self.ended.lock().splice(..0, batch);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
    }
}
