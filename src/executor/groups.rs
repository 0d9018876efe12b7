//! Dead letters by what they have in common.

use std::collections::HashMap;
use std::time::SystemTime;

use super::DeadLetter;
use crate::sync::Arc;
use crate::task::TaskId;

/// Dead letters with the same name and, but for digits, ids and addresses, the same error.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetterGroup {
    /// The tasks' name.
    pub name: String,
    /// Their error, digits, ids and addresses blanked by `#`.
    pub error: String,
    /// How many there are.
    pub count: usize,
    /// The first failure among them.
    pub first: SystemTime,
    /// The last failure among them.
    pub last: SystemTime,
    /// One of them, for a closer look.
    pub example: TaskId,
}

pub(super) fn group(letters: &[Arc<DeadLetter>]) -> Vec<DeadLetterGroup> {
    let mut groups: HashMap<(&str, String), DeadLetterGroup> = HashMap::new();
    for letter in letters {
        let error = blank(&letter.error);
        let group = groups
            .entry((&letter.name, error.clone()))
            .or_insert(DeadLetterGroup {
                name: letter.name.clone(),
                error,
                count: 0,
                first: letter.first_failure(),
                last: letter.last_failure(),
                example: letter.id,
            });
        group.count += 1;
        group.first = group.first.min(letter.first_failure());
        group.last = group.last.max(letter.last_failure());
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.name.cmp(&b.name)));
    groups
}

/// Replaces digits, ids and addresses by `#`, so that errors that differ only in these are the same.
///
/// A word with a digit becomes `#` as a whole where it is hexadecimal and at least six long (an id);
/// elsewhere its digits do. `#` and the marks that join them in an address or a uuid collapse into one.
pub(crate) fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    let mut rest = text.char_indices();
    while let Some((at, c)) = rest.next() {
        if word.is_empty() && is_uuid(text.as_bytes().get(at..at + 36).unwrap_or_default()) {
            out.push('#');
            rest.nth(34);
        } else if c.is_ascii_alphanumeric() {
            word.push(c);
        } else {
            flush(&mut word, &mut out);
            out.push(c);
        }
    }
    flush(&mut word, &mut out);
    collapse(&out)
}

/// 8-4-4-4-12 hexadecimal digits.
fn is_uuid(text: &[u8]) -> bool {
    text.len() == 36
        && text.iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

fn flush(word: &mut String, out: &mut String) {
    let has_digit = word.bytes().any(|b| b.is_ascii_digit());
    let hex = word.strip_prefix("0x").unwrap_or(word);
    let is_hex = !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit());
    if !has_digit {
        out.push_str(word);
    } else if is_hex && (word.len() >= 6 || hex.len() < word.len()) {
        out.push('#');
    } else {
        let mut in_digits = false;
        for c in word.chars() {
            if !c.is_ascii_digit() {
                out.push(c);
            } else if !in_digits {
                out.push('#');
            }
            in_digits = c.is_ascii_digit();
        }
    }
    word.clear();
}

/// `#.#.#.#:#` is one address, `#-#-#` one uuid.
fn collapse(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let joins = matches!(c, '.' | ':' | '-');
        if joins && out.ends_with('#') && rest.peek() == Some(&'#') {
            rest.next();
            continue;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::blank;

    #[test]
    fn what_differs_only_in_its_numbers_is_the_same() {
        for (given, blanked) in [
            ("user 17 not found", "user # not found"),
            ("connect 10.0.3.17:5432: refused", "connect #: refused"),
            (
                "order 7f3a9c2e-11d0-4a4b-9c00-1234567890ab is gone",
                "order # is gone",
            ),
            ("at 0x7ffe12ab", "at #"),
            ("sha deadbeef01", "sha #"),
            ("a decade of feedback", "a decade of feedback"),
            ("http2 stream 5", "http# stream #"),
            ("né à 3 h", "né à # h"),
            ("", ""),
        ] {
            assert_eq!(blank(given), blanked);
        }
    }
}
