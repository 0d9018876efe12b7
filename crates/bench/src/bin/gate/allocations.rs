//! A counting allocator: how often, and how much is live.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Two additions a call, the same for ours and for the references.
pub struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);
static LIVE: AtomicU64 = AtomicU64::new(0);

/// Allocations so far.
pub fn calls() -> u64 {
    CALLS.load(Relaxed)
}

/// Bytes asked for and not yet given back.
pub fn live() -> u64 {
    LIVE.load(Relaxed)
}

fn add(counter: &AtomicU64, n: u64) {
    // One thread measures; a lock prefix would cost time and no instruction.
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

// Sound: each call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(&CALLS, 1);
        add(&LIVE, layout.size() as u64);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        add(&LIVE, (layout.size() as u64).wrapping_neg());
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(&CALLS, 1);
        add(&LIVE, (size as u64).wrapping_sub(layout.size() as u64));
        unsafe { System.realloc(pointer, layout, size) }
    }
}
