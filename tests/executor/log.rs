//! What the executor says, caught as data.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// One event.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) message: String,
    pub(crate) fields: HashMap<&'static str, String>,
}

impl Line {
    pub(crate) fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Line>>>);

impl Log {
    pub(crate) fn subscriber(&self) -> impl Subscriber + Send + Sync + use<> {
        tracing_subscriber::registry().with(self.clone())
    }

    pub(crate) fn lines(&self, is_it: impl Fn(&Line) -> bool) -> Vec<Line> {
        let lines = self.0.lock().unwrap_or_else(|e| e.into_inner());
        lines.iter().filter(|line| is_it(line)).cloned().collect()
    }

    pub(crate) fn count(&self, is_it: impl Fn(&Line) -> bool) -> usize {
        self.lines(is_it).len()
    }

    /// How often a task of this name was spoken of with this beginning of a message.
    pub(crate) fn about(&self, name: &str, message: &str) -> usize {
        self.count(|line| line.field("task.name") == name && line.message.starts_with(message))
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != "tower_defer" {
            return;
        }
        let mut line = Line {
            fields: HashMap::from([("level", event.metadata().level().to_string())]),
            message: String::new(),
        };
        event.record(&mut line);
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(line);
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.fields.insert(field.name(), format!("{value:?}"));
        }
    }
}
