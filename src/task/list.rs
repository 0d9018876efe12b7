//! A first-in-first-out list through links that its items carry, in safe Rust.
//!
//! An owned singly linked list has no safe pointer to its tail, so this is two stacks: items are
//! pushed on `back` and, when `front` is empty, turned over onto it. Each item is turned once.
//! Registering a task therefore allocates nothing but the task.

use std::mem::ManuallyDrop;

/// An item that can be in one list at a time.
pub(crate) trait Link: Sized {
    fn link(&mut self) -> &mut Option<Self>;
}

/// Puts something into a place that is empty. The compiler does not know that it is, and would ask
/// whether there is something to drop: a dozen of 620 instructions of a task.
#[inline(always)]
pub(super) fn fill<T>(place: &mut Option<T>, item: Option<T>) {
    let before = ManuallyDrop::new(std::mem::replace(place, item));
    debug_assert!(before.is_none(), "the place is empty");
}

#[derive(Debug)]
pub(crate) struct Fifo<T: Link> {
    front: Option<T>,
    back: Option<T>,
    len: usize,
}

impl<T: Link> Fifo<T> {
    pub(crate) const fn new() -> Self {
        Self {
            front: None,
            back: None,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) fn push(&mut self, mut item: T) {
        fill(item.link(), self.back.take());
        fill(&mut self.back, Some(item));
        self.len += 1;
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<T> {
        if self.front.is_none() {
            self.turn();
        }
        self.pop_front()
    }

    #[inline]
    fn pop_front(&mut self) -> Option<T> {
        let mut item = self.front.take()?;
        fill(&mut self.front, item.link().take());
        self.len -= 1;
        Some(item)
    }

    /// Takes the item, where there is only one.
    #[inline]
    pub(crate) fn take_only(&mut self) -> Option<T> {
        if self.len != 1 {
            return None;
        }
        self.len = 0;
        self.back.take().or_else(|| self.front.take())
    }

    /// The oldest item, without taking it.
    pub(crate) fn peek(&mut self) -> Option<&mut T> {
        if self.front.is_none() {
            self.turn();
        }
        self.front.as_mut()
    }

    /// Takes the first item for which `is_it` answers yes; walks the list.
    pub(crate) fn remove(&mut self, mut is_it: impl FnMut(&T) -> bool) -> Option<T> {
        let mut kept = Fifo::new();
        let mut found = None;
        while let Some(item) = self.pop() {
            if found.is_none() && is_it(&item) {
                found = Some(item);
            } else {
                kept.push(item);
            }
        }
        *self = kept;
        found
    }

    /// Puts all of `other` behind what is here. Where nothing has been taken from it, as nearly always,
    /// its stack is laid on ours as it is.
    pub(crate) fn append(&mut self, mut other: Fifo<T>) {
        while let Some(item) = other.pop_front() {
            self.push(item);
        }
        if !other.is_empty() {
            let mut end = &mut other.back;
            while let Some(item) = end {
                end = item.link();
            }
            *end = self.back.take();
            self.back = other.back.take();
            self.len += std::mem::take(&mut other.len);
        }
    }

    /// Calls `see` with each item; the order is of no meaning.
    pub(crate) fn for_each(&mut self, mut see: impl FnMut(&T)) {
        self.for_each_mut(|item| see(item));
    }

    pub(crate) fn for_each_mut(&mut self, mut see: impl FnMut(&mut T)) {
        for mut next in [&mut self.front, &mut self.back] {
            while let Some(item) = next {
                see(item);
                next = item.link();
            }
        }
    }

    #[cold]
    fn clear(&mut self) {
        while !self.is_empty() {
            self.pop();
        }
    }

    fn turn(&mut self) {
        let mut rest = self.back.take();
        while let Some(mut item) = rest {
            rest = item.link().take();
            fill(item.link(), self.front.take());
            fill(&mut self.front, Some(item));
        }
    }
}

impl<T: Link> Drop for Fifo<T> {
    /// One by one: the compiler's drop would recurse, and a long list overflows the stack.
    #[inline]
    fn drop(&mut self) {
        if !self.is_empty() {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Item(u32, Option<Box<Item>>);

    impl Link for Box<Item> {
        fn link(&mut self) -> &mut Option<Self> {
            &mut self.1
        }
    }

    fn item(n: u32) -> Box<Item> {
        Box::new(Item(n, None))
    }

    #[test]
    fn first_in_first_out_under_any_interleaving() {
        let mut list = Fifo::new();
        let mut model = std::collections::VecDeque::new();
        let mut state = 7_u32;
        for n in 0..10_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match state >> 29 {
                0..=3 => {
                    list.push(item(n));
                    model.push_back(n);
                }
                4..=5 => assert_eq!(list.pop().map(|i| i.0), model.pop_front()),
                6 => {
                    assert_eq!(list.peek().map(|i| i.0), model.front().copied());
                    let only = list.take_only().map(|i| i.0);
                    assert_eq!(only.is_some(), model.len() == 1);
                    assert!(only.is_none() || model.pop_front() == only);
                }
                _ => {
                    let target = n.saturating_sub(9);
                    let found = list.remove(|i| i.0 == target).map(|i| i.0);
                    let place = model.iter().position(|m| *m == target);
                    assert_eq!(found, place.and_then(|p| model.remove(p)));
                }
            }
            assert_eq!(list.len(), model.len());
        }
    }

    #[test]
    fn a_long_list_is_dropped_without_recursion() {
        let mut list = Fifo::new();
        for n in 0..300_000 {
            list.push(item(n));
        }
        drop(list);
    }
}
