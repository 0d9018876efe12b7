//! The log of events and of the store that keeps them.

use std::error::Error;
use std::panic::Location;

use tracing::{debug, error, info, warn};

use super::events::TARGET;
use crate::error::error_text;

pub(crate) fn recorded(events: usize) {
    debug!(target: TARGET, events, "events recorded");
}

/// Their request is answered with 503.
pub(crate) fn not_recorded(events: usize) {
    warn!(target: TARGET, events, "events not recorded, and not delivered");
}

/// With [`store_works`] the two ends of a store's trouble; in between it is said once a minute.
pub(crate) fn store_failed(doing: &str, failed: &(dyn Error + 'static)) {
    error!(
        target: TARGET,
        doing,
        error = %error_text(failed),
        "the store of events fails, it is tried again"
    );
}

pub(crate) fn store_works(doing: &str) {
    info!(target: TARGET, doing, "the store of events works again");
}

pub(crate) fn event_skipped(event: &str, condition: &str) {
    debug!(target: TARGET, { event.name = event, condition }, "event skipped, its condition did not hold");
}

pub(crate) fn panic_in_condition(event: &str, panic: &str) {
    warn!(target: TARGET, { event.name = event, panic }, "an event's condition panicked");
}

pub(crate) fn unheard(event: &str, location: &'static Location<'static>) {
    warn!(
        target: TARGET,
        { event.name = event, event.location = %location },
        "nobody listens to this event (said at most once a minute)"
    );
}

pub(crate) fn not_emitted(failed: &(dyn Error + 'static), location: &'static Location<'static>) {
    warn!(
        target: TARGET,
        { event.location = %location, error = %error_text(failed) },
        "event not emitted"
    );
}

pub(crate) fn parked(subscriber: &str, event: &str, reason: &str) {
    warn!(
        target: TARGET,
        { task.name = subscriber, event.name = event, reason },
        "delivery parked: nobody here can run it"
    );
}

pub(crate) fn suspect(subscriber: &str, event: &str, crashes: u32) {
    warn!(
        target: TARGET,
        { task.name = subscriber, event.name = event, crashes },
        "the process died while this delivery ran: it is run alone"
    );
}

/// Somebody else has settled it, or it was claimed again.
pub(crate) fn stale(subscriber: &str) {
    info!(target: TARGET, { task.name = subscriber }, "an attempt ended after its delivery was settled");
}
