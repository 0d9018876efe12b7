//! What became of the side effects.

/// Of every request that came to the handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Side effects that have ended.
    pub completed: u64,
    /// Not accepted, or accepted and dropped again for want of room.
    pub refused: u64,
}

impl Counts {
    /// As the server writes them.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(' ').map(|number| number.trim().parse().ok());
        Some(Self {
            requests: numbers.next()??,
            completed: numbers.next()??,
            refused: numbers.next()??,
        })
    }

    /// What [`parse`](Self::parse) reads.
    pub fn text(self) -> String {
        format!("{} {} {}", self.requests, self.completed, self.refused)
    }

    /// Only what came after these.
    pub fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            completed: self.completed - before.completed,
            refused: self.refused - before.refused,
        }
    }

    /// Of two runs.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            completed: self.completed + other.completed,
            refused: self.refused + other.refused,
        }
    }

    /// Nothing was refused, and nothing is missing.
    pub fn all_completed(self) -> bool {
        self.completed == self.requests
    }

    /// Side effects of which nobody knows.
    pub fn missing(self) -> u64 {
        self.requests.saturating_sub(self.completed + self.refused)
    }
}
