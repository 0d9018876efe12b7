//! Other executors than that of the request's outermost layer: an inner layer's, or one that the
//! handler named. Each has tasks of the request, or counts the request, or both.
//!
//! It knows no response and no lock: the collector keeps it under its own.

use crate::executor::{Executor, Shared};
use crate::sync::Arc;
use crate::task::{Fifo, Node};

/// Few requests have one. Boxed, so that a collector is smaller and its end has less to look at.
#[derive(Debug, Default)]
pub(super) struct Elsewhere(Option<Box<Others>>);

#[derive(Debug, Default)]
struct Others(Vec<Other>);

#[derive(Debug)]
struct Other {
    executor: Executor,
    tasks: Fifo<Node>,
    /// As what the request counts with this executor.
    joined: Option<Stage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Handler,
    Response,
}

impl Elsewhere {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub(super) fn push(&mut self, executor: &Executor, node: Node) {
        self.at(executor).tasks.push(node);
    }

    /// From now on the request counts with this executor.
    pub(super) fn join(&mut self, executor: &Executor) {
        let other = self.at(executor);
        if other.joined.is_none() {
            other.joined = Some(Stage::Handler);
            executor.shared().request_opened();
        }
    }

    /// As what the request counts from now on, with those that it has joined.
    pub(super) fn move_to(&mut self, stage: Option<Stage>) {
        self.all().for_each(|other| other.move_to(stage));
    }

    pub(super) fn remove(
        &mut self,
        is_it: impl Fn(&Node) -> bool + Copy,
    ) -> Option<(Executor, Node)> {
        self.all()
            .find_map(|other| Some((other.executor.clone(), other.tasks.remove(is_it)?)))
    }

    /// All tasks. After a release by force the request itself goes on, and those that wait for its end
    /// are told by [`move_to`](Self::move_to).
    #[inline]
    pub(super) fn take(&mut self) -> Option<Vec<(Executor, Fifo<Node>)>> {
        if self.is_empty() {
            None
        } else {
            self.take_all()
        }
    }

    #[cold]
    fn take_all(&mut self) -> Option<Vec<(Executor, Fifo<Node>)>> {
        let take = |other: &mut Other| {
            let tasks = std::mem::replace(&mut other.tasks, Fifo::new());
            (other.executor.clone(), tasks)
        };
        let others = self.0.as_mut()?;
        let taken = others.0.iter_mut().map(take).collect();
        others.0.retain(|other| other.joined.is_some());
        Some(taken)
    }

    /// The tasks for one of them, which can wait no longer.
    pub(super) fn take_of(&mut self, executor: &Shared) -> Fifo<Node> {
        let other = self
            .all()
            .find(|other| std::ptr::eq(&**other.executor.shared(), executor));
        other.map_or_else(Fifo::new, |other| {
            std::mem::replace(&mut other.tasks, Fifo::new())
        })
    }

    fn at(&mut self, executor: &Executor) -> &mut Other {
        let others = &mut self.0.get_or_insert_default().0;
        let found = others
            .iter()
            .position(|other| Arc::ptr_eq(other.executor.shared(), executor.shared()));
        let at = found.unwrap_or_else(|| {
            others.push(Other {
                executor: executor.clone(),
                tasks: Fifo::new(),
                joined: None,
            });
            others.len() - 1
        });
        &mut others[at]
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Other> {
        self.0.iter_mut().flat_map(|others| &mut others.0)
    }
}

impl Other {
    fn move_to(&mut self, stage: Option<Stage>) {
        let shared = self.executor.shared();
        match (self.joined, stage) {
            (Some(Stage::Handler), Some(Stage::Response)) => shared.request_answered(true),
            (Some(Stage::Handler), None) => shared.request_answered(false),
            (Some(Stage::Response), None) => shared.response_closed(),
            _ => return,
        }
        self.joined = stage;
    }
}
