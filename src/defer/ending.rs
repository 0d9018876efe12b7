//! What is known of a response so far, how that is learnt, and the record that comes of it: plain data,
//! and one function without clock or lock.

use std::time::Duration;

use http::StatusCode;

use super::Collector;
use super::collector::Beside;
use crate::clock::Tick;
use crate::response::{End, ResponseInfo};
use crate::sync::Arc;

/// What is known when the handler has answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) grpc_status: Option<i32>,
}

/// What is known when the response is over.
#[derive(Clone, Debug)]
pub(crate) struct Ending {
    pub(crate) end: End,
    pub(crate) bytes: u64,
    pub(crate) body_error: Option<Arc<str>>,
}

impl Ending {
    /// It has not ended: so many bytes of it have been asked for.
    pub(super) fn stalled(bytes: u64) -> Self {
        Self {
            end: End::Stalled,
            bytes,
            body_error: None,
        }
    }

    /// There is no response.
    pub(crate) fn without_response(end: End) -> Self {
        Self {
            end,
            bytes: 0,
            body_error: None,
        }
    }
}

/// What is known so far. A time that was not read is zero.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// When the first task was registered: times are counted from there.
    pub(super) first_at: Tick,
    pub(super) head: Option<(Head, Tick)>,
    /// From the trailers. Not a part of the ending: a release by force comes before that, and must
    /// know all the same that the call failed.
    pub(super) grpc_status: Option<i32>,
    pub(super) ending: Option<Ending>,
}

impl Known {
    /// Writes the record of a release now.
    #[inline]
    pub(super) fn record(&self, now: Tick, ending: Ending, info: &mut ResponseInfo) {
        // Taken apart, so that no field is forgotten: another response may have left it full.
        let ResponseInfo {
            status,
            grpc_status,
            end,
            bytes,
            body_error,
            to_head,
            to_release,
        } = info;
        *status = self.head.map(|(head, _)| head.status);
        *grpc_status = self
            .grpc_status
            .or(self.head.and_then(|(head, _)| head.grpc_status));
        *end = ending.end;
        *bytes = ending.bytes;
        *body_error = ending.body_error;
        *to_head = self
            .head
            .filter(|(_, at)| *at != Tick::ZERO)
            .map(|(_, at)| self.since_first(at));
        *to_release = self.since_first(now);
    }

    pub(super) fn renew(&mut self) {
        let Self {
            first_at,
            head,
            grpc_status,
            ending,
        } = self;
        *first_at = Tick::ZERO;
        *head = None;
        *grpc_status = None;
        if ending.is_some() {
            *ending = None;
        }
    }

    fn since_first(&self, at: Tick) -> Duration {
        if self.first_at == Tick::ZERO {
            Duration::ZERO
        } else {
            at.since(self.first_at)
        }
    }
}

impl Collector {
    /// Takes note of how the request was answered: what was emitted before that and is not being recorded
    /// is recorded then.
    pub(super) fn learn(self: &Arc<Self>, learn: impl FnOnce(&mut Beside)) {
        #[cfg(not(feature = "events"))]
        self.gate.with(|_, beside| learn(beside));
        #[cfg(feature = "events")]
        self.record_at_once(self.gate.with(|_, beside| {
            learn(beside);
            beside.outbox.take_late()
        }));
    }
}
