//! What is seen of a response's body while it is sent.
//!
//! It lies in the collector, and not in the body: a body that nobody watches is moved about often, and
//! would carry the room for it. Relaxed throughout: only the body, which has one owner at a time, reads and
//! writes it.
//!
//! # Who writes the last bytes
//!
//! A task that keeps its thread busy must not delay the response that it was registered for. The body of an
//! HTTP/2 response ends in a task of its own, and another one, the connection's, writes what is left. So
//! the workers let others go first (`executor/queue.rs`, invariant 6), which costs turns of the runtime.
//!
//! On HTTP/1 nothing is left for others. One task, the connection's, asks for the frames, drops body and
//! chunks, and writes, and all of that within one poll: in hyper 1.12, `proto/h1/dispatch.rs`, `poll_loop`
//! (lines 171 to 217) calls `poll_write`, where the body is asked and dropped, and then `poll_flush`, and
//! once more wherever it asked the body once more. So a worker of the same thread is polled after the bytes
//! have left, and one of another thread runs beside it. It makes no difference whether hyper flattens what
//! it writes (the chunk is dropped as soon as it is copied, `proto/h1/io.rs`, `WriteBuf::buffer`) or hands it to the
//! socket as it is (dropped when it is written, `Buffered::poll_flush`). Requests of one connection follow
//! each other: the next one is not read before this one is flushed (`conn.rs`, `poll_flush`,
//! `try_keep_alive`). An upgrade is handed out after its head was written, and a body that is never asked (HEAD, 204,
//! 101) is dropped before the head is written, in the same poll.
//!
//! What does not fit into the socket is written when the client has read; so this is said only of what
//! does ([`AT_ONCE`]). It is also not said before the head: a future that was dropped may be answered by
//! an outer layer, and no frame has shown yet who sends it. Nor where the connection's task has used up its
//! turn, by what its handler awaited: then tokio's socket lets it write nothing before its next one.
//!
//! It is not true, and cannot be seen from here, of connections that hold back what was flushed: with hyper's
//! `pipeline_flush(true)` the responses to pipelined requests, and what another task carries to the network (a
//! pipe within the process, a stream of a multiplexed connection). README.md, "Limits", says so.

use tokio::task::coop;

use crate::response::BodySeen;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Seen {
    marks: AtomicU32,
    /// [`UNDECLARED`] where no length was.
    declared: AtomicU64,
}

/// So many bytes are taken by every socket that is not full: Linux begins with 16 KiB of buffer
/// (`tcp_wmem`), and other systems with more.
const AT_ONCE: u64 = 16 * 1024;

/// No response is as long as this.
const UNDECLARED: u64 = u64::MAX;

/// A fact, as a bit, or several of them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mark(u32);

impl Mark {
    pub(crate) const FAILED: Mark = Mark(1);
    pub(crate) const ENDED: Mark = Mark(2);
    /// We are within the inner body: dropped now, it has panicked.
    pub(crate) const ENTERED: Mark = Mark(4);
    /// The answer was not given: the head says so, and the inner body is not asked.
    #[cfg(feature = "events")]
    pub(crate) const REFUSED: Mark = Mark(8);
    pub(crate) const BODILESS: Mark = Mark(16);
    pub(crate) const UPGRADED: Mark = Mark(32);
    pub(crate) const HTTP1: Mark = Mark(64);
    /// Of the request's method.
    pub(crate) const CONNECT: Mark = Mark(128);

    #[inline]
    pub(crate) fn when(self, is_so: bool) -> Mark {
        Mark(self.0 * u32::from(is_so))
    }

    #[inline]
    pub(crate) fn and(self, other: Mark) -> Mark {
        Mark(self.0 | other.0)
    }

    pub(crate) fn has(self, mark: Mark) -> bool {
        self.0 & mark.0 != 0
    }
}

impl Seen {
    pub(super) fn new() -> Self {
        Self {
            marks: AtomicU32::new(0),
            declared: AtomicU64::new(UNDECLARED),
        }
    }

    /// What is known before the first frame.
    pub(crate) fn begin(&self, marks: Mark, declared: Option<u64>) {
        self.marks.store(marks.0, Ordering::Relaxed);
        self.declared
            .store(declared.unwrap_or(UNDECLARED), Ordering::Relaxed);
    }

    pub(crate) fn mark(&self, mark: Mark) {
        self.marks.store(self.marks().0 | mark.0, Ordering::Relaxed);
    }

    pub(crate) fn unmark(&self, mark: Mark) {
        self.marks
            .store(self.marks().0 & !mark.0, Ordering::Relaxed);
    }

    pub(crate) fn has(&self, mark: Mark) -> bool {
        self.marks().has(mark)
    }

    pub(crate) fn so_far(&self, yielded: u64) -> BodySeen {
        let marks = self.marks();
        let declared = self.declared.load(Ordering::Relaxed);
        BodySeen {
            failed: marks.has(Mark::FAILED),
            upgraded: marks.has(Mark::UPGRADED),
            bodiless: marks.has(Mark::BODILESS),
            ended: marks.has(Mark::ENDED),
            declared: (declared != UNDECLARED).then_some(declared),
            yielded,
            http1: marks.has(Mark::HTTP1),
        }
    }

    /// Whether the response's bytes, so many, are written before another task of the same thread is
    /// polled.
    pub(super) fn is_written_at_once(&self, bytes: u64) -> bool {
        self.has(Mark::HTTP1) && bytes <= AT_ONCE && coop::has_budget_remaining()
    }

    fn marks(&self) -> Mark {
        Mark(self.marks.load(Ordering::Relaxed))
    }
}
