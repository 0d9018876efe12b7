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

/// One fact, as a bit.
#[derive(Clone, Copy, Debug)]
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
    const UPGRADED: Mark = Mark(32);
    const HTTP1: Mark = Mark(64);

    fn when(self, is_so: bool) -> u32 {
        if is_so { self.0 } else { 0 }
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
    pub(crate) fn begin(&self, seen: BodySeen) {
        let marks = Mark::UPGRADED.when(seen.upgraded)
            | Mark::BODILESS.when(seen.bodiless)
            | Mark::HTTP1.when(seen.http1);
        self.marks.store(marks, Ordering::Relaxed);
        self.declared
            .store(seen.declared.unwrap_or(UNDECLARED), Ordering::Relaxed);
    }

    pub(crate) fn mark(&self, mark: Mark) {
        self.marks.store(self.marks() | mark.0, Ordering::Relaxed);
    }

    pub(crate) fn unmark(&self, mark: Mark) {
        self.marks.store(self.marks() & !mark.0, Ordering::Relaxed);
    }

    pub(crate) fn has(&self, mark: Mark) -> bool {
        self.marks() & mark.0 != 0
    }

    pub(crate) fn so_far(&self, yielded: u64) -> BodySeen {
        let declared = self.declared.load(Ordering::Relaxed);
        BodySeen {
            failed: self.has(Mark::FAILED),
            upgraded: self.has(Mark::UPGRADED),
            bodiless: self.has(Mark::BODILESS),
            ended: self.has(Mark::ENDED),
            declared: (declared != UNDECLARED).then_some(declared),
            yielded,
            http1: self.has(Mark::HTTP1),
        }
    }

    fn marks(&self) -> u32 {
        self.marks.load(Ordering::Relaxed)
    }
}
