//! Rust source, read roughly: enough to tell code from words and tests from production.
//!
//! Not a parser: it knows literals, comments, brackets and `use` trees, and nothing else.

pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    /// The text with comments and literals blanked.
    pub(crate) code: String,
    /// Per line: does it belong to an item under `#[cfg(test)]`?
    pub(crate) test_lines: Vec<bool>,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let code = if path.ends_with(".rs") {
            blanked(text)
        } else {
            text.to_owned()
        };
        let test_lines = test_lines(&code);
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            code,
            test_lines,
        }
    }

    /// A file of nothing but tests: an integration test, or `mod tests;` in a file of its own.
    pub(crate) fn is_test_file(&self) -> bool {
        self.path.starts_with("tests/")
            || self.path.ends_with("/tests.rs")
            || self.path.contains("/tests/")
    }

    pub(crate) fn find<'a>(&self, rule: impl Fn(&str) -> Option<&'a str>) -> Vec<String> {
        numbered(&self.code)
            .filter_map(|(at, line)| rule(line).map(|reason| self.violation(at, reason)))
            .collect()
    }

    pub(crate) fn violation(&self, line: usize, reason: &str) -> String {
        format!("{}:{}: {reason}", self.path, line + 1)
    }
}

pub(crate) fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate()
}

/// Where `word` begins a word of its own.
pub(crate) fn word_positions<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let joined = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |at| !line[..*at].ends_with(joined))
}

/// Every path that the code names: `use` trees spelled out, and `a::b::c` where it stands.
pub(crate) fn paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let line_of = |at: usize| code[..at].matches('\n').count();
    for at in word_positions(code, "use ") {
        let tree = code[at + 4..].split(';').next().unwrap_or_default();
        // `b as c` names b.
        let mut words = tree.split_whitespace();
        let mut packed = String::new();
        while let Some(word) = words.next() {
            if word == "as" {
                let name = words.next().unwrap_or_default();
                packed.push_str(name.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_'));
            } else {
                packed.push_str(word);
            }
        }
        spell_out("", &packed, &mut |path| found.push((line_of(at), path)));
    }
    for start in ["std::", "core::", "loom::"] {
        for at in word_positions(code, start).filter(|at| !code[..*at].ends_with("::")) {
            let rest = &code[at..];
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
            let path = &rest[..end.unwrap_or(rest.len())];
            // What ends in `::` is the stem of a tree, spelled out above.
            if !path.ends_with("::") {
                found.push((line_of(at), path.to_owned()));
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

/// `a::{b, c::{d, e}}` is `a::b`, `a::c::d` and `a::c::e`.
fn spell_out(stem: &str, tree: &str, found: &mut impl FnMut(String)) {
    let Some((head, group)) = tree.split_once('{') else {
        if !tree.is_empty() {
            found(format!("{stem}{tree}"));
        }
        return;
    };
    let group = group.strip_suffix('}').unwrap_or(group);
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices().chain([(group.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                // Not generic over itself: the recursion passes the same closure on.
                spell_out(&format!("{stem}{head}"), &group[start..at], &mut *found);
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// Comments and the insides of literals become spaces; line breaks stay.
fn blanked(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = token_end(&chars, at);
        if end == at {
            code.push(chars[at]);
            at += 1;
        } else {
            code.extend(
                chars[at..end]
                    .iter()
                    .map(|c| if *c == '\n' { '\n' } else { ' ' }),
            );
            at = end;
        }
    }
    code
}

/// The end of the comment or literal that begins here; `at` itself if none does.
fn token_end(chars: &[char], at: usize) -> usize {
    let from = |start: usize, text: &str| {
        text.chars()
            .enumerate()
            .all(|(i, c)| chars.get(start + i) == Some(&c))
    };
    let first = |start: usize, found: &dyn Fn(usize) -> bool| {
        (start..chars.len())
            .find(|i| found(*i))
            .unwrap_or(chars.len())
    };
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');

    if from(at, "//") {
        return first(at, &|i| chars[i] == '\n');
    }
    if from(at, "/*") {
        let (mut depth, mut i) = (0, at);
        while i < chars.len() {
            if from(i, "/*") {
                (depth, i) = (depth + 1, i + 2);
            } else if from(i, "*/") {
                (depth, i) = (depth - 1, i + 2);
                if depth == 0 {
                    return i;
                }
            } else {
                i += 1;
            }
        }
        return chars.len();
    }
    if !in_word || (at > 0 && "bc".contains(chars[at - 1])) {
        let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
        if chars[at] == 'r' && chars.get(at + 1 + hashes) == Some(&'"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let end = first(at + 2 + hashes, &|i| from(i, &close));
            return (end + close.len()).min(chars.len());
        }
    }
    if chars[at] == '"' {
        return quoted_end(chars, at);
    }
    // `'a` is a lifetime, `'a'` and `'\n'` are characters.
    if chars[at] == '\'' && (chars.get(at + 1) == Some(&'\\') || chars.get(at + 2) == Some(&'\'')) {
        return quoted_end(chars, at);
    }
    at
}

fn quoted_end(chars: &[char], at: usize) -> usize {
    let mut i = at + 1;
    while i < chars.len() && chars[i] != chars[at] {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(chars.len())
}

/// Marks the lines of the items under `#[cfg(test)]` and `#[cfg(all(test, …))]`.
fn test_lines(code: &str) -> Vec<bool> {
    let lines: Vec<&str> = code.lines().collect();
    let mut marks = vec![false; lines.len()];
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at].trim_start();
        if line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test,") {
            let end = (at + item_lines(&lines[at..])).min(lines.len());
            marks[at..end].fill(true);
            at = end;
        } else {
            at += 1;
        }
    }
    marks
}

/// How many lines the item that begins here takes: to its closing brace, or to its semicolon.
fn item_lines(lines: &[&str]) -> usize {
    let mut depth = 0;
    for (at, line) in lines.iter().enumerate() {
        for c in line.chars() {
            match c {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                _ => {}
            }
            if depth < 0 || (depth == 0 && (c == '}' || c == ';')) {
                return at + 1;
            }
        }
    }
    lines.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_blanked() {
        for (text, code) in [
            ("a // b", "a     "),
            ("a /* /* b */ c\n */ d", "a             \n    d"),
            (r#"f("x\"y", 'c', '\'')"#, "f(      ,    ,     )"),
            ("r#\"a\"b\"# c", "         c"),
            ("br\"\\\" c", "b     c"),
            ("fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)"),
            ("var\"x\"", "var   "),
        ] {
            assert_eq!(blanked(text), code, "{text}");
        }
    }

    #[test]
    fn items_under_cfg_test_are_marked() {
        let marked = |text: &str| -> String {
            test_lines(&blanked(text))
                .iter()
                .map(|test| if *test { 't' } else { '.' })
                .collect()
        };
        assert_eq!(
            marked("a\n#[cfg(test)]\nmod tests {\n\"}\"\n}\nb"),
            ".tttt."
        );
        assert_eq!(
            marked("#[cfg(test)]\n#[expect(x)]\nuse a::{\nb,\n};\nb"),
            "ttttt."
        );
        assert_eq!(
            marked("#[cfg(all(test, defer_loom))]\nmod models;\nb"),
            "tt."
        );
        assert_eq!(marked("#[cfg(not(test))]\nmod a {}"), "..");
    }

    #[test]
    fn use_trees_are_spelled_out() {
        let spelled = |code| {
            paths(code)
                .into_iter()
                .map(|(_, path)| path)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            spelled("use a::{b as c, d::{e, f as _}, *};\nlet x = std::y::Z::w();"),
            ["a::*", "a::b", "a::d::e", "a::d::f", "std::y::Z::w"]
        );
    }
}
