//! A subscriber that remembers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// A span or an event.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) target: String,
    pub(crate) level: String,
    pub(crate) fields: BTreeMap<String, String>,
    pub(crate) is_root: bool,
    pub(crate) follows: Vec<u64>,
    pub(crate) opened_at: usize,
    pub(crate) closed: bool,
    pub(crate) closed_at: usize,
}

#[derive(Default)]
struct Log {
    /// Counts what happens, for the order of things.
    now: usize,
    spans: Vec<Seen>,
    events: Vec<Seen>,
}

/// What was seen on this thread, or on all.
pub(crate) struct Capture {
    log: Arc<Mutex<Log>>,
    _here: Option<DefaultGuard>,
}

impl Capture {
    pub(crate) fn here() -> Self {
        let log = Arc::<Mutex<Log>>::default();
        let registry = tracing_subscriber::registry().with(Remember(log.clone()));
        let _here = Some(registry.set_default());
        Self { log, _here }
    }

    /// Once in a process.
    pub(crate) fn everywhere() -> Self {
        let log = Arc::<Mutex<Log>>::default();
        let registry = tracing_subscriber::registry().with(Remember(log.clone()));
        tracing::subscriber::set_global_default(registry).unwrap();
        Self { log, _here: None }
    }

    pub(crate) fn spans(&self, name: &str) -> Vec<Seen> {
        let log = self.log.lock().unwrap();
        log.spans
            .iter()
            .filter(|span| span.name == name)
            .cloned()
            .collect()
    }

    pub(crate) fn span(&self, name: &str) -> Seen {
        let mut spans = self.spans(name);
        assert_eq!(spans.len(), 1, "{name}: {spans:?}");
        spans.remove(0)
    }

    pub(crate) fn events(&self, message: &str) -> Vec<Seen> {
        let log = self.log.lock().unwrap();
        log.events
            .iter()
            .filter(|event| event.name == message)
            .cloned()
            .collect()
    }

    /// Waits until this was said.
    pub(crate) async fn until(&self, message: &str) {
        let probe = async {
            while self.events(message).is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await; // the probe's pause
            }
        };
        let deadline = Duration::from_secs(30);
        assert!(
            tokio::time::timeout(deadline, probe).await.is_ok(),
            "not said: {message}"
        );
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(&self.log.lock().unwrap().events)
            .finish()
    }
}

impl Seen {
    #[track_caller]
    pub(crate) fn field(&self, name: &str) -> String {
        match self.fields.get(name) {
            Some(value) => value.clone(),
            None => panic!("no {name} in {self:?}"),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }
}

struct Remember(Arc<Mutex<Log>>);

impl Remember {
    fn change(&self, id: &Id, change: impl FnOnce(&mut Seen, usize)) {
        let mut log = self.0.lock().unwrap();
        log.now += 1;
        let now = log.now;
        // An id may be used again: the youngest has it.
        if let Some(span) = log.spans.iter_mut().rev().find(|s| s.id == id.into_u64()) {
            change(span, now);
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Remember {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, ctx: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let mut log = self.0.lock().unwrap();
        log.now += 1;
        let opened_at = log.now;
        let span = ctx.span(id).unwrap();
        log.spans.push(Seen {
            id: id.into_u64(),
            name: attributes.metadata().name().to_owned(),
            target: attributes.metadata().target().to_owned(),
            level: attributes.metadata().level().to_string(),
            fields: fields.0,
            is_root: span.parent().is_none(),
            opened_at,
            ..Seen::default()
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        values.record(&mut fields);
        self.change(id, |span, _| span.fields.extend(fields.0));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, _: Context<'_, S>) {
        self.change(id, |span, _| span.follows.push(follows.into_u64()));
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        self.change(&id, |span, now| (span.closed, span.closed_at) = (true, now));
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.0.lock().unwrap().events.push(Seen {
            name: fields.0.get("message").cloned().unwrap_or_default(),
            target: event.metadata().target().to_owned(),
            level: event.metadata().level().to_string(),
            fields: fields.0,
            ..Seen::default()
        });
    }
}

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}
