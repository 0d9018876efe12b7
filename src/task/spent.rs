//! Emptied tasks: the next ones of the same kind use their memory.
//!
//! A burst of tasks is more than the allocator keeps at hand: it cost 345 of the 1,271 instructions of a
//! task. Here an ended task is emptied where it lies, what the user captured is dropped, and the box
//! waits on its thread for the next task of its type.
//!
//! Invariants:
//! 1. What is kept holds nothing of the user's.
//! 2. A thread keeps at most [`KEPT`] boxes, each of at most [`LARGEST`] bytes and a header: 144 KiB.

use std::any::{Any, TypeId};
use std::cell::Cell;
use std::hash::{Hash, Hasher};
use std::mem::ManuallyDrop;

use super::list::fill;
use super::{Link, Node};

const KEPT: usize = 256;

const LARGEST: usize = 512;

/// Whether emptied bodies of this type are kept.
pub(super) const fn is_kept<T>() -> bool {
    size_of::<T>() <= LARGEST
}

/// Types share a shelf by chance. A box that is found there and is of another type is given back to the
/// allocator, so that a type that has gone out of use holds none.
const SHELVES: usize = 16;

thread_local! {
    /// Nothing is done with it at the end of its thread, so that a task that looks at it need not ask
    /// whether that has come: [`ATTENDANT`] does what is to be done. Saves 40 of 674 instructions of a task.
    static SHELVES_HERE: ManuallyDrop<Shelves> = const {
        ManuallyDrop::new(Shelves {
            stacks: [const { Cell::new(None) }; SHELVES],
            kept: Cell::new(0),
            room: Cell::new(0),
            next: Cell::new(0),
            alone: Cell::new(None),
        })
    };

    /// Comes with the first box, and clears the shelves at the end of the thread.
    static ATTENDANT: Attendant = const { Attendant };
}

struct Attendant;

impl Drop for Attendant {
    fn drop(&mut self) {
        SHELVES_HERE.with(|shelves| shelves.close());
    }
}

struct Shelves {
    stacks: [Cell<Option<Node>>; SHELVES],
    kept: Cell<usize>,
    /// None while there is no attendant.
    room: Cell<usize>,
    /// On which shelf room is looked for.
    next: Cell<usize>,
    /// The shelf for which there was none on any other.
    alone: Cell<Option<u8>>,
}

/// Where emptied tasks of a type lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shelf(u8);

impl Shelf {
    /// The same for all bodies of this type.
    #[inline]
    pub(super) fn of<T: 'static>() -> Self {
        let mut bits = Bits(0);
        TypeId::of::<T>().hash(&mut bits);
        Self((bits.0 % SHELVES as u64) as u8)
    }

    /// A task made of an emptied one, with the content taken out of `content`.
    #[inline(always)]
    pub(super) fn take(self, content: &mut dyn Any) -> Option<Node> {
        let mut node = SHELVES_HERE.with(|shelves| shelves.pop(self))?;
        node.body_mut().refill(content).then_some(node)
    }

    /// Out of line, so that it works with registers: 28 instructions instead of 36.
    #[inline(never)]
    pub(super) fn put(self, node: Node) {
        if SHELVES_HERE.with(|shelves| shelves.has_room()) || self.make_room() {
            SHELVES_HERE.with(|shelves| shelves.push(self, node));
        }
    }

    #[cold]
    #[inline(never)]
    fn make_room(self) -> bool {
        SHELVES_HERE.with(|shelves| shelves.make_room(self))
    }
}

impl Shelves {
    #[inline(always)]
    fn pop(&self, shelf: Shelf) -> Option<Node> {
        let stack = &self.stacks[usize::from(shelf.0) % SHELVES];
        let mut node = stack.take()?;
        put(stack, node.link().take());
        self.kept.set(self.kept.get() - 1);
        Some(node)
    }

    #[inline(always)]
    fn push(&self, shelf: Shelf, mut node: Node) {
        let stack = &self.stacks[usize::from(shelf.0) % SHELVES];
        fill(node.link(), stack.take());
        put(stack, Some(node));
        self.kept.set(self.kept.get() + 1);
    }

    #[inline(always)]
    fn has_room(&self) -> bool {
        self.kept.get() < self.room.get()
    }

    /// Drops a box of another shelf, so that types that have gone out of use do not take the room of those
    /// that are in use. Where all that is kept is of one type there is nothing to find, and a look at each shelf
    /// was 183 instructions of a task: so after one in vain it looks at one shelf a call.
    fn make_room(&self, shelf: Shelf) -> bool {
        if self.room.get() == 0 {
            // An error: the thread is ending, and the box is dropped.
            return ATTENDANT.try_with(|_| self.room.set(KEPT)).is_ok();
        }
        let is_alone = self.alone.get() == Some(shelf.0);
        for _ in 0..if is_alone { 1 } else { SHELVES } {
            let at = self.next.get();
            if at != usize::from(shelf.0) % SHELVES && self.pop(Shelf(at as u8)).is_some() {
                self.alone.set(None);
                return true;
            }
            self.next.set((at + 1) % SHELVES);
        }
        self.alone.set(Some(shelf.0));
        false
    }

    fn close(&self) {
        self.room.set(0);
        for at in 0..SHELVES {
            while self.pop(Shelf(at as u8)).is_some() {}
        }
    }
}

/// As [`fill`]: the stack has been taken out.
#[inline(always)]
fn put(stack: &Cell<Option<Node>>, nodes: Option<Node>) {
    let before = ManuallyDrop::new(stack.replace(nodes));
    debug_assert!(before.is_none(), "the place is empty");
}

/// Of a type's id, which the compiler knows: no hash is computed when the program runs.
struct Bits(u64);

impl Hasher for Bits {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, bits: u64) {
        self.0 ^= bits;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
