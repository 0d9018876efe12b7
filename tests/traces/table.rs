//! The tables of docs/observability.md, and what the code says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What is said of an event: its level and its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) level: String,
    pub(crate) fields: BTreeSet<String>,
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn docs() -> String {
    read("docs/observability.md")
}

/// All of src/observe.
fn code() -> String {
    let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/observe");
    let mut files: Vec<_> = fs::read_dir(room)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect()
}

/// The rows of the table that begins so, cell by cell.
fn rows(docs: &str, head: &str) -> Vec<Vec<String>> {
    let table = docs
        .split_once(head)
        .unwrap_or_else(|| panic!("no table {head}"))
        .1;
    let lines = table
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with('|'));
    let cells = |line: &str| {
        let inner = line.trim_matches('|');
        inner
            .split(" | ")
            .map(|cell| cell.trim().trim_matches('|').trim().to_owned())
            .collect()
    };
    lines.skip(1).map(cells).collect()
}

fn ticked(cell: &str) -> BTreeSet<String> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

pub(crate) fn events_of_the_docs() -> BTreeMap<String, Row> {
    let mut events = BTreeMap::new();
    for row in rows(&docs(), "| level | message | fields |") {
        let fields = row.get(2).map(|cell| ticked(cell)).unwrap_or_default();
        let level = row[0].to_uppercase();
        let before = events.insert(row[1].clone(), Row { level, fields });
        assert!(before.is_none(), "twice in the table: {}", row[1]);
    }
    events
}

pub(crate) fn row(message: &str) -> Row {
    let mut rows = events_of_the_docs();
    rows.remove(message)
        .unwrap_or_else(|| panic!("not in the table: {message}"))
}

pub(crate) fn span_fields_of_the_docs() -> BTreeSet<String> {
    rows(&docs(), "| field | meaning |")
        .iter()
        .flat_map(|row| ticked(&row[0]))
        .collect()
}

pub(crate) fn events_of_the_code() -> BTreeMap<String, Row> {
    let code = code();
    let mut events = BTreeMap::new();
    for level in ["debug", "info", "warn", "error", "trace"] {
        for arguments in calls(&code, &format!("{level}!(")) {
            let (fields, message) = fields(arguments);
            let message = message.unwrap_or_else(|| panic!("no message: {arguments}"));
            let level = level.to_uppercase();
            events.insert(message, Row { level, fields });
        }
    }
    events
}

pub(crate) fn span_fields_of_the_code() -> BTreeSet<String> {
    let code = code();
    let spans = calls(&code, "info_span!(");
    assert_eq!(spans.len(), 1);
    fields(spans[0]).0
}

/// The arguments of each call of a macro.
fn calls<'a>(code: &'a str, name: &str) -> Vec<&'a str> {
    let starts = code.match_indices(name).filter(|(at, _)| {
        let before = code[..*at].chars().next_back();
        before.is_none_or(|c| !(c.is_alphanumeric() || c == '_'))
    });
    starts
        .map(|(at, _)| until_closed(&code[at + name.len()..]))
        .collect()
}

fn until_closed(code: &str) -> &str {
    let (mut depth, mut quoted, mut escaped) = (1, false, false);
    for (at, c) in code.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '(' | '{' | '[' if !quoted => depth += 1,
            ')' | '}' | ']' if !quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &code[..at];
        }
    }
    panic!("not closed: {code}")
}

/// The names of fields, and the message.
fn fields(arguments: &str) -> (BTreeSet<String>, Option<String>) {
    let mut names = BTreeSet::new();
    let mut message = None;
    for part in parts(arguments) {
        if let Some(inner) = part.strip_prefix('{') {
            names.extend(fields(inner.trim_end_matches('}')).0);
        } else if let Some(text) = part.strip_prefix('"') {
            message = Some(plain(text.trim_end_matches('"')));
        } else if let Some((name, _)) = part.split_once(" = ") {
            names.insert(name.trim().to_owned());
        } else if !part.contains(':') {
            names.insert(part.to_owned());
        }
    }
    (names, message)
}

/// A literal may go on on the next line.
fn plain(literal: &str) -> String {
    let mut lines = literal.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines.fold(first, |text, line| text + line.trim_start())
}

fn parts(arguments: &str) -> Vec<&str> {
    let (mut depth, mut quoted, mut from) = (0, false, 0);
    let mut parts = Vec::new();
    for (at, c) in arguments.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '(' | '{' | '[' if !quoted => depth += 1,
            ')' | '}' | ']' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => {
                parts.push(arguments[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(arguments[from..].trim());
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}
