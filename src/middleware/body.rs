//! [`DeferBody`]: from the head to the last byte.
//!
//! Everything is passed on as it is: frames, trailers, errors, `size_hint`, `is_end_stream`. Where
//! something has been registered, each chunk carries a guard besides (a very large one is cut first, see
//! [`PIECE`]), and the release comes when the server has let go of the last one: it drops a chunk when it
//! has been written, and a body long before that.

use std::fmt;
use std::fmt::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;

use super::future::grpc_status;
use crate::defer::{Collector, Ending, Hold, Mark};
use crate::error::bounded_text;
use crate::response::classify;
use crate::sync::Arc;

/// A response body behind a [`DeferLayer`](crate::DeferLayer).
///
/// Frames, trailers, errors, `size_hint` and `is_end_stream` are the inner body's; but where something
/// has been registered, a data frame of more than 256 KiB is passed on in pieces. Its drop tells how the
/// response ended; the tasks are released when the last of its chunks is dropped, too.
#[pin_project]
#[derive(Debug)]
pub struct DeferBody<B> {
    #[pin]
    inner: B,
    /// None where nobody can have registered anything. After `inner`, so that it is dropped after it:
    /// what the inner body holds (permits, connections, spans) is free when a task starts.
    watch: Option<Watch>,
}

/// Sees to a body. Its drop says how it ended. Small, because a body is moved about often: what is seen
/// is in the collector.
#[derive(Debug)]
pub(super) struct Watch {
    rare: Option<Box<Rare>>,
    /// Of which this is a holder. None at the end.
    collector: Option<Arc<Collector>>,
}

/// What few bodies have.
#[derive(Debug, Default)]
struct Rare {
    /// What the server has not asked for yet of a chunk that was too large for one piece.
    rest: Bytes,
    error: Option<Arc<str>>,
}

/// The largest piece that is guarded as one. A server lets go of a piece when all of it is written, and
/// that is the only sign of life of a client that reads: in one piece, a large body to a slow but steady
/// client would look stalled. At this size a client of 70 kbit/s is within the default `max_hold`.
const PIECE: usize = 256 * 1024;

impl<B> DeferBody<B> {
    pub(super) fn new(inner: B, watch: Option<Watch>) -> Self {
        Self { inner, watch }
    }

    fn is_refused(&self) -> bool {
        #[cfg(feature = "events")]
        let refused = self
            .watch
            .as_ref()
            .and_then(|watch| watch.collector.as_ref())
            .is_some_and(|collector| collector.seen().has(Mark::REFUSED));
        #[cfg(not(feature = "events"))]
        let refused = false;
        refused
    }

    /// What the server has not asked for yet of a chunk that was cut.
    fn rest(&self) -> u64 {
        self.watch.as_ref().map_or(0, |watch| rest(&watch.rare))
    }
}

impl<B> Body for DeferBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: fmt::Display,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let Some(Watch {
            rare,
            collector: Some(collector),
        }) = this.watch
        else {
            return this.inner.poll_frame(cx);
        };
        let seen = collector.seen();
        #[cfg(feature = "events")]
        if seen.has(Mark::REFUSED) {
            return Poll::Ready(None);
        }
        if let Some(piece) = rare.as_mut().and_then(|rare| rare.next_piece(collector)) {
            if rest(rare) == 0 && this.inner.is_end_stream() {
                seen.mark(Mark::ENDED);
            }
            return Poll::Ready(Some(Ok(piece)));
        }
        seen.mark(Mark::ENTERED);
        let mut polled = this.inner.as_mut().poll_frame(cx);
        let is_last = match &polled {
            Poll::Ready(None) => true,
            Poll::Ready(Some(Ok(_))) => this.inner.is_end_stream(),
            Poll::Ready(Some(Err(_))) | Poll::Pending => false,
        };
        seen.unmark(Mark::ENTERED);
        // Also before the first registration: it may come while the body waits for its next frame.
        collector.asked(polled.is_pending());
        // What was polled is changed where it lies: a frame is large.
        match &mut polled {
            Poll::Ready(Some(Ok(frame))) => pass_on(frame, collector, rare),
            Poll::Ready(Some(Err(error))) => {
                seen.mark(Mark::FAILED);
                // The one place on the response's path that runs code of the user's, because the error
                // goes to the server and its text would be lost; bounded, and a panic in it is caught.
                let text = bounded_text(|out| write!(out, "{error}"));
                rare.get_or_insert_default().error = Some(text.into());
            }
            Poll::Ready(None) | Poll::Pending => {}
        }
        if is_last && rest(rare) == 0 {
            seen.mark(Mark::ENDED);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        if self.is_refused() {
            return true;
        }
        self.rest() == 0 && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_refused() {
            return SizeHint::with_exact(0);
        }
        let rest = self.rest();
        let mut hint = self.inner.size_hint();
        if rest > 0 {
            // The upper bound first: the lower one must not pass it.
            if let Some(upper) = hint.upper() {
                hint.set_upper(upper.saturating_add(rest));
            }
            hint.set_lower(hint.lower().saturating_add(rest));
        }
        hint
    }
}

impl Watch {
    /// The collector's holder from now on.
    pub(super) fn new(collector: Arc<Collector>) -> Self {
        Self {
            rare: None,
            collector: Some(collector),
        }
    }

    #[inline(never)]
    fn ended(rare: Option<Box<Rare>>, collector: Arc<Collector>) {
        let mut body_error = rare.and_then(|rare| rare.error);
        if collector.seen().has(Mark::ENTERED) {
            collector.seen().mark(Mark::FAILED);
            body_error = Some("the body panicked".into());
        }
        let seen = collector.seen_so_far();
        let ending = Ending {
            end: classify(seen),
            bytes: seen.yielded,
            body_error,
        };
        Collector::finish(collector, ending);
    }
}

impl Rare {
    /// The next piece of a chunk that was cut.
    fn next_piece(&mut self, collector: &Arc<Collector>) -> Option<Frame<Bytes>> {
        if self.rest.is_empty() {
            return None;
        }
        let mut piece = std::mem::take(&mut self.rest);
        collector.asked(false);
        if piece.len() > PIECE {
            self.rest = piece.split_off(PIECE);
        }
        guard(&mut piece, collector);
        Some(Frame::data(piece))
    }
}

fn rest(rare: &Option<Box<Rare>>) -> u64 {
    rare.as_ref().map_or(0, |rare| rare.rest.len() as u64)
}

/// A frame on its way to the server.
#[inline]
fn pass_on(frame: &mut Frame<Bytes>, collector: &Arc<Collector>, rare: &mut Option<Box<Rare>>) {
    if let Some(chunk) = frame.data_mut() {
        if chunk.len() > PIECE && collector.is_used() {
            cut(chunk, rare);
        }
        guard(chunk, collector);
    } else if let Some(trailers) = frame.trailers_ref() {
        pass_on_trailers(trailers, collector);
    }
}

#[cold]
fn cut(chunk: &mut Bytes, rare: &mut Option<Box<Rare>>) {
    rare.get_or_insert_default().rest = chunk.split_off(PIECE);
}

#[inline(never)]
fn pass_on_trailers(trailers: &HeaderMap, collector: &Collector) {
    collector.seen().mark(Mark::ENDED);
    if let Some(status) = grpc_status(trailers) {
        collector.trailers(status);
    }
}

/// Counts a chunk, and has it tell when the server lets go of it.
fn guard(chunk: &mut Bytes, collector: &Arc<Collector>) {
    collector.count_bytes(chunk.len());
    if chunk.is_empty() || !collector.is_used() {
        return;
    }
    let hold = Hold::another(collector);
    *chunk = Bytes::from_owner(Guarded {
        chunk: std::mem::take(chunk),
        hold,
    });
}

impl Drop for Watch {
    /// What is left of a chunk that was cut goes before the tasks are released.
    #[inline]
    fn drop(&mut self) {
        if let Some(collector) = self.collector.take() {
            Self::ended(self.rare.take(), collector);
        }
    }
}

/// A chunk in the server's hands.
struct Guarded {
    chunk: Bytes,
    hold: Hold,
}

impl AsRef<[u8]> for Guarded {
    fn as_ref(&self) -> &[u8] {
        &self.chunk
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(collector) = self.hold.collector() {
            collector.taken();
        }
    }
}
