//! What was claimed for somebody, on its way to him: where nobody takes it (he has stopped waiting, his
//! runtime has ended), it is handed back, as by a release.
//!
//! Not for what he has taken: that is his to settle.

use super::shared::Shared;
use crate::event::store::record::{AttemptToken, Claimed, Receipt};
use crate::sync::Arc;

/// An answer that deliveries were claimed for. It is made after the commit: before, there is nothing to hand
/// back.
#[derive(Debug)]
pub(super) struct Lent<T: Tokens> {
    answer: T,
    shared: Arc<Shared>,
}

/// The attempts that an answer gives away.
pub(super) trait Tokens: Default {
    fn tokens(self) -> Vec<AttemptToken>;
}

impl Tokens for Vec<Claimed> {
    fn tokens(self) -> Vec<AttemptToken> {
        self.into_iter().map(|claimed| claimed.token).collect()
    }
}

impl Tokens for Vec<Receipt> {
    fn tokens(self) -> Vec<AttemptToken> {
        self.into_iter().flat_map(|it| it.claimed).collect()
    }
}

impl<T: Tokens> Lent<T> {
    pub(super) fn new(answer: T, shared: Arc<Shared>) -> Self {
        Self { answer, shared }
    }

    pub(super) fn take(mut self) -> T {
        std::mem::take(&mut self.answer)
    }
}

impl<T: Tokens> Drop for Lent<T> {
    fn drop(&mut self) {
        let tokens = std::mem::take(&mut self.answer).tokens();
        if !tokens.is_empty() {
            self.shared.hand_back(tokens);
        }
    }
}
