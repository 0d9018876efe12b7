//! What is seen of a response's body while it is sent.
//!
//! It lies in the collector, and not in the body: a body that nobody watches is moved about often, and
//! would carry the room for it. Relaxed throughout: only the body, which has one owner at a time, reads and
//! writes it.

use crate::response::BodySeen;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Seen {
    marks: AtomicU32,
    /// [`UNDECLARED`] where no length was.
    declared: AtomicU64,
}

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

    fn marks(&self) -> Mark {
        Mark(self.marks.load(Ordering::Relaxed))
    }
}
