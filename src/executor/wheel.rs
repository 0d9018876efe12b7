//! Things by the millisecond in which they are due: wheels within wheels, as tokio's timer has them.
//!
//! To put one in and to take it out costs the same however many there are. On the lowest level a slot is one
//! millisecond, on each one above it is a whole turn of the one below.
//!
//! Invariants:
//! 1. What was due before `now` has been taken out.
//! 2. A thing lies on the level of the highest digit, to the base of 64, in which its time differs from `now`,
//!    in the slot of that digit. So the first slot of the lowest level that has any is the earliest.

use crate::clock::Tick;

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;

#[derive(Debug)]
pub(super) struct Wheel<T> {
    /// In milliseconds.
    now: u64,
    len: usize,
    /// As many as have been needed: three reach four minutes, eight for ever.
    levels: Vec<Level<T>>,
}

#[derive(Debug)]
struct Level<T> {
    /// A bit for each slot that is not empty.
    occupied: u64,
    slots: [Slot<T>; SLOTS],
}

/// What lies in one slot, in the order in which it came: in pieces, so that a long one is not copied when it
/// grows, under the lock of all (and 36 of 1,986 instructions of a task that fails).
#[derive(Debug)]
pub(super) struct Slot<T>(Vec<Vec<(Tick, T)>>);

/// 4 KiB of waiting tasks.
const PIECE: usize = 64;

impl<T> Slot<T> {
    const EMPTY: Self = Self(Vec::new());

    #[inline]
    fn push(&mut self, at: Tick, thing: T) {
        match self.0.last_mut() {
            Some(piece) if piece.len() < PIECE => piece.push((at, thing)),
            _ => self.push_piece(at, thing),
        }
    }

    /// Only the first one of a slot may stay small.
    #[cold]
    fn push_piece(&mut self, at: Tick, thing: T) {
        let room = if self.0.is_empty() { 1 } else { PIECE };
        let mut piece = Vec::with_capacity(room);
        piece.push((at, thing));
        self.0.push(piece);
    }

    fn len(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }
}

impl<T> IntoIterator for Slot<T> {
    type Item = (Tick, T);
    type IntoIter = std::iter::Flatten<std::vec::IntoIter<Vec<(Tick, T)>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter().flatten()
    }
}

/// The first slot that is not empty.
struct First {
    level: usize,
    slot: usize,
    /// Its first millisecond.
    start: u64,
}

impl<T> Wheel<T> {
    pub(super) const fn new() -> Self {
        Self {
            now: 0,
            len: 0,
            levels: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(super) fn insert(&mut self, at: Tick, thing: T) {
        self.len += 1;
        self.place(at, thing);
    }

    #[inline]
    fn place(&mut self, at: Tick, thing: T) {
        let millis = at.ceil_millis().max(self.now);
        let digits = (millis ^ self.now).checked_ilog2().unwrap_or(0) / BITS;
        let level = digits as usize;
        while self.levels.len() <= level {
            self.levels.push(Level {
                occupied: 0,
                slots: [const { Slot::EMPTY }; SLOTS],
            });
        }
        let slot = (millis >> (digits * BITS)) as usize % SLOTS;
        let level = &mut self.levels[level];
        level.occupied |= 1 << slot;
        level.slots[slot].push(at, thing);
    }

    fn first(&self) -> Option<First> {
        let level = self.levels.iter().position(|level| level.occupied != 0)?;
        let slot = self.levels[level].occupied.trailing_zeros();
        let shift = level as u32 * BITS;
        let turn = self.now >> shift >> BITS << BITS;
        Some(First {
            level,
            slot: slot as usize,
            start: (turn | u64::from(slot)) << shift,
        })
    }

    /// When to look again: nothing is due before.
    pub(super) fn next(&self) -> Option<Tick> {
        self.first().map(|first| Tick::from_millis(first.start))
    }

    /// The things of the earliest millisecond, in the order in which they came, if that is not after `now`.
    pub(super) fn take(&mut self, now: Tick) -> Option<Slot<T>> {
        let now = now.millis();
        if now < self.now {
            self.go_back(now);
        }
        loop {
            let Some(first) = self.first().filter(|first| first.start <= now) else {
                // Not into a slot of a higher level: those begin later.
                self.now = self.now.max(now);
                return None;
            };
            self.now = first.start;
            let level = &mut self.levels[first.level];
            level.occupied &= !(1 << first.slot);
            let things = std::mem::replace(&mut level.slots[first.slot], Slot::EMPTY);
            if first.level == 0 {
                self.len -= things.len();
                return Some(things);
            }
            for (at, thing) in things {
                self.place(at, thing);
            }
        }
    }

    /// The time of a paused runtime was ahead, and has gone with it.
    #[cold]
    fn go_back(&mut self, now: u64) {
        let mut all = Vec::with_capacity(self.len);
        self.empty(|at, thing| all.push((at, thing)));
        self.now = now;
        // Those of one millisecond stay in their order.
        all.into_iter()
            .for_each(|(at, thing)| self.insert(at, thing));
    }

    /// Takes all of them out, in no order.
    pub(super) fn empty(&mut self, mut take: impl FnMut(Tick, T)) {
        self.len = 0;
        for level in std::mem::take(&mut self.levels) {
            for piece in level.slots.into_iter().flat_map(|slot| slot.0) {
                for (at, thing) in piece {
                    take(at, thing);
                }
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let slots = self.levels.iter().flat_map(|level| &level.slots);
        slots
            .flat_map(|slot| slot.0.iter().flatten())
            .map(|(_, thing)| thing)
    }
}

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use super::*;

    /// What is due by then, with its times.
    fn due(wheel: &mut Wheel<u64>, now: u64) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        while let Some(things) = wheel.take(Tick::from_millis(now)) {
            assert!(things.len() > 0);
            all.extend(things.into_iter().map(|(at, thing)| (at.millis(), thing)));
        }
        all
    }

    /// Spreads numbers; it need not be good.
    fn random(state: &mut u64, most: u64) -> u64 {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (*state >> 20) % (most + 1)
    }

    #[test]
    fn in_the_order_of_time_and_then_as_they_came() {
        let mut state = 7;
        for reach in [3, 70, 5_000, 300_000, 1 << 43] {
            let mut wheel = Wheel::new();
            let mut expected = Vec::new();
            let mut now = 0;
            for number in 0..2_000 {
                let at = now + random(&mut state, reach);
                wheel.insert(Tick::from_millis(at), number);
                expected.push((at, number));
                if random(&mut state, 15) == 0 {
                    now += random(&mut state, reach / 800);
                    expected.sort();
                    let later = expected.partition_point(|(at, _)| *at <= now);
                    assert_eq!(due(&mut wheel, now), expected[..later]);
                    expected.drain(..later);
                    assert_eq!(wheel.len(), expected.len());
                    assert_eq!(wheel.iter().count(), expected.len());
                    assert!(wheel.next().is_none_or(|next| next.millis() > now));
                }
            }
            expected.sort();
            assert!(
                wheel
                    .next()
                    .is_some_and(|next| next.millis() <= expected[0].0)
            );
            assert_eq!(due(&mut wheel, 1 << 44), expected);
            assert!(wheel.is_empty() && wheel.next().is_none());
        }
    }

    #[test]
    fn what_comes_too_late_is_due_at_once() {
        let mut wheel = Wheel::new();
        assert!(wheel.take(Tick::from_millis(1_000)).is_none());
        for (at, number) in [(10, 1), (1_000, 2), (1_001, 3)] {
            wheel.insert(Tick::from_millis(at), number);
        }
        assert_eq!(wheel.next(), Some(Tick::from_millis(1_000)));
        assert_eq!(due(&mut wheel, 1_000), [(10, 1), (1_000, 2)]);
        // Also where the clock is another one, which is behind.
        assert!(wheel.take(Tick::from_millis(500)).is_none());
        for (at, number) in [(600, 4), (600, 5)] {
            wheel.insert(Tick::from_millis(at), number);
        }
        assert_eq!(wheel.next(), Some(Tick::from_millis(576)));
        assert_eq!(due(&mut wheel, 700), [(600, 4), (600, 5)]);
        let mut rest = Vec::new();
        wheel.empty(|at, thing| rest.push((at, thing)));
        assert_eq!(rest, [(Tick::from_millis(1_001), 3)]);
        assert!(wheel.is_empty() && wheel.next().is_none());
    }
}
