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
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;

use super::future::grpc_status;
use crate::defer::{Ending, Hold, Mark};
use crate::error::bounded_text;
use crate::response::{BodySeen, classify};
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

/// Sees to a body. Its drop says how it ended. Two words, because a body is moved about often: what is seen
/// is in the collector.
#[derive(Debug)]
pub(super) struct Watch {
    /// Before `hold`: the tasks are released when all of the rest is gone.
    rare: Option<Box<Rare>>,
    hold: Hold,
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
            .is_some_and(|watch| watch.hold.seen().has(Mark::REFUSED));
        #[cfg(not(feature = "events"))]
        let refused = false;
        refused
    }

    /// What the server has not asked for yet of a chunk that was cut.
    fn rest(&self) -> u64 {
        self.watch.as_ref().map_or(0, Watch::rest)
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
        let Some(watch) = this.watch else {
            return this.inner.poll_frame(cx);
        };
        #[cfg(feature = "events")]
        if watch.hold.seen().has(Mark::REFUSED) {
            return Poll::Ready(None);
        }
        if let Some(piece) = watch.next_piece() {
            if watch.rest() == 0 && this.inner.is_end_stream() {
                watch.hold.seen().mark(Mark::ENDED);
            }
            return Poll::Ready(Some(Ok(piece)));
        }
        watch.hold.seen().mark(Mark::ENTERED);
        let polled = this.inner.as_mut().poll_frame(cx);
        let is_last = matches!(polled, Poll::Ready(Some(Ok(_)))) && this.inner.is_end_stream();
        watch.hold.seen().unmark(Mark::ENTERED);
        // Also before the first registration: it may come while the body waits for its next frame.
        watch.hold.asked(polled.is_pending());
        match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => {
                watch.hold.seen().mark(Mark::ENDED);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                watch.failed(&error);
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(Some(Ok(frame))) => {
                let frame = watch.frame(frame);
                if is_last && watch.rest() == 0 {
                    watch.hold.seen().mark(Mark::ENDED);
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
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
    pub(super) fn new(hold: Hold, seen: BodySeen) -> Self {
        hold.seen().begin(seen);
        Self { rare: None, hold }
    }

    fn rest(&self) -> u64 {
        self.rare.as_ref().map_or(0, |rare| rare.rest.len() as u64)
    }

    fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    /// Of an answer that was not given: its body is empty.
    #[cfg(feature = "events")]
    pub(super) fn refused(self) -> Self {
        self.hold.seen().mark(Mark::REFUSED);
        self.hold.seen().mark(Mark::BODILESS);
        self
    }

    /// The next piece of a chunk that was cut.
    fn next_piece(&mut self) -> Option<Frame<Bytes>> {
        let rest = &mut self.rare.as_mut()?.rest;
        if rest.is_empty() {
            return None;
        }
        let rest = std::mem::take(rest);
        self.hold.asked(false);
        Some(Frame::data(self.chunk(rest)))
    }

    /// A chunk on its way to the server: counted, cut where it is too large, guarded.
    fn chunk(&mut self, mut chunk: Bytes) -> Bytes {
        if chunk.len() > PIECE && self.hold.collector().is_used() {
            self.rare().rest = chunk.split_off(PIECE);
        }
        self.hold.count_bytes(chunk.len());
        self.guard(chunk)
    }

    fn frame(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let frame = match frame.into_data() {
            Ok(chunk) => return Frame::data(self.chunk(chunk)),
            Err(frame) => frame,
        };
        if let Some(trailers) = frame.trailers_ref() {
            self.hold.seen().mark(Mark::ENDED);
            if let Some(status) = grpc_status(trailers) {
                self.hold.collector().trailers(status);
            }
        }
        frame
    }

    /// A chunk that tells when the server lets go of it.
    fn guard(&self, chunk: Bytes) -> Bytes {
        if chunk.is_empty() || !self.hold.collector().is_used() {
            return chunk;
        }
        Bytes::from_owner(Guarded {
            chunk,
            hold: self.hold.another(),
        })
    }

    fn failed<E: fmt::Display>(&mut self, error: &E) {
        self.hold.seen().mark(Mark::FAILED);
        // The one place on the response's path that runs code of the user's, because the error goes to
        // the server and its text would be lost; bounded, and a panic in it is caught.
        self.rare().error = Some(bounded_text(|out| write!(out, "{error}")).into());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.hold.seen().has(Mark::ENTERED) {
            self.hold.seen().mark(Mark::FAILED);
            self.rare().error = Some("the body panicked".into());
        }
        self.hold.asked(false);
        let seen = self.hold.seen_so_far();
        let collector = self.hold.collector();
        collector.end(Ending {
            end: classify(seen),
            bytes: seen.yielded,
            body_error: self.rare.as_mut().and_then(|rare| rare.error.take()),
        });
        collector.close();
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
        self.hold.taken();
    }
}
