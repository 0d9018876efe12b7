//! Who listens to what, by name, with the types gone: made where the application is put together, and
//! never changed afterwards.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::panic::Location;

use super::store::StoredEvent;
use super::subscriber::{Attempt, Policy, Subscriber};
use super::{DeliveryContext, Event};
use crate::error::TaskError;
use crate::sync::Arc;
use crate::task::{Node, Task};

type Stored = dyn Fn(&StoredEvent, DeliveryContext) -> Attempt + Send + Sync;
type InMemory = dyn Fn(&(dyn Any + Send + Sync), DeliveryContext) -> Attempt + Send + Sync;

/// A subscriber in its place.
pub(super) struct Subscription {
    pub(super) name: Arc<str>,
    events: Vec<&'static str>,
    location: &'static Location<'static>,
    policy: Policy,
    stored: Box<Stored>,
    in_memory: Box<InMemory>,
}

/// All subscribers.
#[derive(Default)]
pub(super) struct Table {
    /// By every name that it has or had.
    by_name: HashMap<Arc<str>, Arc<Subscription>>,
    by_event: HashMap<&'static str, Heard>,
}

/// Who hears of an event.
struct Heard {
    of: TypeId,
    listeners: Vec<Arc<Subscription>>,
}

/// Two types of event have one name.
#[derive(Debug)]
pub(super) struct Ambiguous;

impl Table {
    /// # Panics
    ///
    /// Where the name is taken: it is found when the application starts, every time.
    pub(super) fn add<S, E>(
        &mut self,
        state: S,
        name: Arc<str>,
        subscriber: Subscriber<S, E>,
        location: &'static Location<'static>,
    ) where
        S: Clone + Send + Sync + 'static,
        E: Event,
    {
        assert!(!name.is_empty(), "a subscriber needs a name");
        let Subscriber { call, policy } = subscriber;
        let (call_stored, state_stored) = (call.clone(), state.clone());
        let mut events = vec![E::NAME];
        events.extend(E::ALIASES);
        let subscription = Arc::new(Subscription {
            name: name.clone(),
            events,
            location,
            stored: Box::new(move |event, context| {
                match serde_json::from_str::<E>(&event.payload) {
                    Ok(event) => call_stored(state_stored.clone(), event, context),
                    Err(error) => Box::pin(std::future::ready(Err(TaskError::unreadable(error)))),
                }
            }),
            in_memory: Box::new(move |event, context| match event.downcast_ref::<E>() {
                Some(event) => call(state.clone(), event.clone(), context),
                None => unreachable!("listeners are looked up by the event's type"),
            }),
            policy,
        });
        for name in subscription.policy.aliases.iter().chain([&name]) {
            let before = self.by_name.insert(name.clone(), subscription.clone());
            assert!(
                before.is_none(),
                "there are two subscribers with the name {name:?}: give one of them another name"
            );
        }
        let heard = self.by_event.entry(E::NAME).or_insert_with(|| Heard {
            of: TypeId::of::<E>(),
            listeners: Vec::new(),
        });
        assert!(
            heard.of == TypeId::of::<E>(),
            "two types of event have the name {:?}: a name stands for one type",
            E::NAME
        );
        heard.listeners.push(subscription);
    }

    pub(super) fn by_name(&self, name: &str) -> Option<&Arc<Subscription>> {
        self.by_name.get(name)
    }

    /// Who hears of this event.
    pub(super) fn listeners<E: Event>(&self) -> Result<&[Arc<Subscription>], Ambiguous> {
        match self.by_event.get(E::NAME) {
            None => Ok(&[]),
            Some(heard) if heard.of == TypeId::of::<E>() => Ok(&heard.listeners),
            Some(_) => Err(Ambiguous),
        }
    }

    /// Every name that is answered to.
    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_name.keys()
    }
}

impl Subscription {
    pub(super) fn hears(&self, event: &str) -> bool {
        self.events.contains(&event)
    }

    /// What it was called before.
    pub(super) fn aliases(&self) -> &[Arc<str>] {
        &self.policy.aliases
    }

    pub(super) fn events(&self) -> &[&'static str] {
        &self.events
    }

    /// The task of a delivery that lives in this process.
    pub(super) fn in_memory<E: Event>(self: &Arc<Self>, event: Arc<E>) -> Task {
        let this = self.clone();
        self.task(Task::with_context(move |context| {
            (this.in_memory)(&*event, DeliveryContext::in_memory(context))
        }))
    }

    /// One attempt of a delivery that a store keeps, recorded under this name.
    pub(super) fn stored(self: &Arc<Self>, event: Arc<StoredEvent>, recorded: Arc<str>) -> Node {
        let this = self.clone();
        let task = Task::with_context(move |context| {
            let context = DeliveryContext::stored(context, event.clone(), recorded.clone());
            (this.stored)(&event, context)
        });
        self.task(task).into_node()
    }

    fn task(&self, task: Task) -> Task {
        let mut node = task.into_node();
        node.header_mut().location = self.location;
        let settings = node.settings_mut();
        settings.name = Some(self.name.clone().into());
        settings.retry.clone_from(&self.policy.retry);
        settings.timeout = self.policy.timeout;
        Task::from_node(node)
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}
