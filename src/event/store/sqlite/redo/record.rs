//! The records of the redo log, as bytes.
//!
//! Not a format for others: it is read by the version that wrote it, or the next one.
//!
//! | bytes of a record | hold |
//! | --- | --- |
//! | 8 | a checksum of the rest (FNV-1a) |
//! | 8 | the epoch: a number drawn at each open, which stands in `defer_meta`, too |
//! | 8 | the number of the record |
//! | 8 | how many bytes follow: the events of one transaction |

use crate::event::store::record::{NewDelivery, NewEvent, Start};
use crate::event::store::sqlite::schema::hash;

pub(super) const HEADER: usize = 32;

/// An event as it was recorded.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Logged {
    pub(in super::super) id: i64,
    pub(in super::super) recorded_ms: i64,
    pub(in super::super) event: NewEvent,
}

/// Adds an event to a record.
pub(super) fn put(to: &mut Vec<u8>, id: i64, event: &NewEvent, recorded_ms: i64) {
    put_number(to, id);
    put_number(to, recorded_ms);
    put_text(to, Some(&event.name));
    put_text(to, event.key.as_deref());
    put_text(to, event.context.as_deref());
    put_text(to, Some(&event.payload));
    put_length(to, event.deliveries.len());
    for delivery in &event.deliveries {
        put_text(to, Some(&delivery.subscriber));
        match delivery.start {
            Start::Claimed => to.push(0),
            Start::At(due_ms) => {
                to.push(1);
                put_number(to, due_ms);
            }
        }
    }
}

/// What an event takes in a record.
pub(in super::super) fn size(event: &NewEvent) -> usize {
    let text = |text: &str| 4 + text.len();
    let deliveries = event.deliveries.iter();
    16 + text(&event.name)
        + text(event.key.as_deref().unwrap_or_default())
        + text(event.context.as_deref().unwrap_or_default())
        + text(&event.payload)
        + 4
        + deliveries.map(|it| text(&it.subscriber) + 9).sum::<usize>()
}

/// Until the first record that is none, or does not follow the one before it. What does not begin with
/// what is known, or what follows it, is the log of a file that has gone on: an older one lies in its place.
pub(super) fn parse(bytes: &[u8], epoch: i64, known: i64) -> Vec<Logged> {
    let mut lost = Vec::new();
    let (mut rest, mut before) = (bytes, None);
    while let Some((number, body, after)) = open(rest, epoch) {
        let follows = match before {
            Some(before) => number == before + 1,
            None => number <= known.saturating_add(1),
        };
        if !follows {
            break;
        }
        let (mut body, batches_before) = (Reader(body), lost.len());
        while number > known && !body.0.is_empty() {
            let Some(event) = body.event() else {
                // The checksum holds: another version wrote it. A batch is recorded whole or not at all.
                tracing::error!(
                    record = number,
                    "the redo log of the event store cannot be read: what a power cut took from the \
                     database is lost from this record on"
                );
                lost.truncate(batches_before);
                return lost;
            };
            lost.push(event);
        }
        (rest, before) = (after, Some(number));
    }
    lost
}

/// Writes the header of a record.
pub(super) fn seal(record: &mut [u8], epoch: i64, number: i64) {
    let length = (record.len() - HEADER) as u64;
    record[8..16].copy_from_slice(&epoch.to_le_bytes());
    record[16..24].copy_from_slice(&number.to_le_bytes());
    record[24..32].copy_from_slice(&length.to_le_bytes());
    let sum = hash(&[&record[8..]]);
    record[..8].copy_from_slice(&sum.to_le_bytes());
}

/// The first record: its number, its body, and what follows it.
fn open(bytes: &[u8], epoch: i64) -> Option<(i64, &[u8], &[u8])> {
    let mut header = Reader(bytes);
    let sum = header.number()?;
    let (found, number, length) = (header.number()?, header.number()?, header.number()?);
    let length = usize::try_from(length).ok()?;
    let end = HEADER.checked_add(length)?;
    let record = bytes.get(8..end)?;
    let is_whole = found == epoch && sum.to_le_bytes() == hash(&[record]).to_le_bytes();
    is_whole.then(|| (number, &bytes[HEADER..end], &bytes[end..]))
}

fn put_number(to: &mut Vec<u8>, number: i64) {
    to.extend_from_slice(&number.to_le_bytes());
}

fn put_length(to: &mut Vec<u8>, length: usize) {
    // No record is longer than the file.
    to.extend_from_slice(&u32::try_from(length).unwrap_or(NONE - 1).to_le_bytes());
}

/// The length of a text that is not there.
const NONE: u32 = u32::MAX;

fn put_text(to: &mut Vec<u8>, text: Option<&str>) {
    match text {
        Some(text) => {
            put_length(to, text.len());
            to.extend_from_slice(text.as_bytes());
        }
        None => to.extend_from_slice(&NONE.to_le_bytes()),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number(&mut self) -> Option<i64> {
        self.bytes(8)?.try_into().ok().map(i64::from_le_bytes)
    }

    fn length(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn optional(&mut self) -> Option<Option<&'a str>> {
        match self.length()? {
            NONE => Some(None),
            length => {
                let bytes = self.bytes(usize::try_from(length).ok()?)?;
                Some(Some(std::str::from_utf8(bytes).ok()?))
            }
        }
    }

    fn text(&mut self) -> Option<&'a str> {
        self.optional()?
    }

    fn event(&mut self) -> Option<Logged> {
        let (id, recorded_ms) = (self.number()?, self.number()?);
        let name = self.text()?;
        let (key, context) = (self.optional()?, self.optional()?);
        let mut event = NewEvent::new(name, self.text()?);
        event.key = key.map(str::to_owned);
        event.context = context.map(str::to_owned);
        for _ in 0..self.length()? {
            let subscriber = self.text()?.into();
            let start = match self.bytes(1)? {
                [0] => Start::Claimed,
                _ => Start::At(self.number()?),
            };
            event.deliveries.push(NewDelivery { subscriber, start });
        }
        Some(Logged {
            id,
            recorded_ms,
            event,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: i64) -> Logged {
        let mut event = NewEvent::new("user.created", format!("{{\"number\":{number}}}"))
            .deliver("mail", Start::Claimed)
            .deliver("audit", Start::At(7));
        if number % 2 == 0 {
            event = event.key(format!("key {number}")).context("");
        }
        Logged {
            id: number,
            recorded_ms: number + 100,
            event,
        }
    }

    /// Records of one event each, with these numbers.
    fn log(epoch: i64, numbers: &[i64]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for number in numbers {
            let mut record = vec![0; HEADER];
            let Logged {
                id,
                recorded_ms,
                event,
            } = event(*number);
            put(&mut record, id, &event, recorded_ms);
            assert!(record.len() <= HEADER + size(&event));
            seal(&mut record, epoch, *number);
            bytes.extend_from_slice(&record);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    fn ids(events: &[Logged]) -> Vec<i64> {
        events.iter().map(|event| event.id).collect()
    }

    #[test]
    fn what_goes_in_comes_out() {
        let (bytes, _) = log(11, &[1, 2, 3]);
        assert_eq!(parse(&bytes, 11, 0), [event(1), event(2), event(3)]);
        assert_eq!(ids(&parse(&bytes, 11, 2)), [3]);
        assert_eq!(parse(&bytes, 12, 0), []);
    }

    #[test]
    fn a_torn_record_ends_the_log_and_takes_nothing_with_it() {
        let (bytes, ends) = log(21, &[1, 2, 3]);
        for length in 0..bytes.len() {
            let whole = ends.iter().filter(|end| **end <= length).count();
            let mut torn = bytes[..length].to_vec();
            assert_eq!(parse(&torn, 21, 0).len(), whole);
            // And what was there before.
            torn.resize(bytes.len(), 0xaa);
            assert_eq!(parse(&torn, 21, 0).len(), whole);
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            let whole = ends.iter().filter(|end| **end <= at).count();
            assert_eq!(parse(&flipped, 21, 0).len(), whole);
        }
    }

    #[test]
    fn of_a_batch_that_cannot_be_read_nothing_is_recorded() {
        let (mut bytes, _) = log(41, &[1]);
        let mut record = vec![0; HEADER];
        put(&mut record, 2, &event(2).event, 102);
        record.extend_from_slice(b"another version");
        seal(&mut record, 41, 2);
        bytes.extend_from_slice(&record);
        assert_eq!(ids(&parse(&bytes, 41, 0)), [1]);
    }

    #[test]
    fn an_old_record_behind_a_new_one_is_none() {
        let (bytes, _) = log(31, &[5, 2, 3]);
        assert_eq!(ids(&parse(&bytes, 31, 4)), [5]);
    }

    #[test]
    fn a_log_that_begins_later_than_the_file_ends_is_none_of_its_own() {
        let (bytes, _) = log(41, &[5, 6]);
        assert_eq!(ids(&parse(&bytes, 41, 4)), [5, 6]);
        assert_eq!(parse(&bytes, 41, 3), []);
    }
}
