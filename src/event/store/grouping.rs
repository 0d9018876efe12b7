//! What makes two errors the same error, for people who look at a thousand dead letters.
//!
//! Not a parser: it blanks what varies from one delivery to the next and leaves the words.

/// The longest group that is kept, in characters: two errors that agree so far are one.
const MAX_GROUP: usize = 200;

/// The error with its numbers, ids, hexadecimal runs and addresses blanked as `#`, so that
/// `user 17 not found` and `user 93 not found` are one group.
///
/// A word that holds a digit, or an `@`, is blanked whole; words are split at spaces and at
/// punctuation other than `-`, `.`, `:`, `_`, `@` and `+`, which ids, addresses and times contain.
#[must_use]
pub fn error_group(error: &str) -> String {
    let mut group = String::new();
    let mut word = String::new();
    for c in error.chars().chain(Some(' ')) {
        if c.is_alphanumeric() || matches!(c, '-' | '.' | ':' | '_' | '@' | '+') {
            word.push(c);
            continue;
        }
        push_word(&mut group, &word);
        word.clear();
        let c = if c.is_whitespace() { ' ' } else { c };
        if !(c == ' ' && (group.is_empty() || group.ends_with(' '))) {
            group.push(c);
        }
        if group.len() > MAX_GROUP * 4 {
            break;
        }
    }
    let short: String = group.trim_end().chars().take(MAX_GROUP).collect();
    short
}

fn push_word(group: &mut String, word: &str) {
    let head = word.trim_start_matches(['.', ':']);
    let core = head.trim_end_matches(['.', ':']);
    if core.contains(|c: char| c.is_numeric() || c == '@') || is_hex(core) {
        group.push_str(&word[..word.len() - head.len()]);
        group.push('#');
        group.push_str(&head[core.len()..]);
    } else {
        group.push_str(word);
    }
}

/// Eight letters and more that are all hexadecimal are an id (no English word is).
fn is_hex(word: &str) -> bool {
    word.len() >= 8 && word.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_varies_is_blanked_and_the_words_stay() {
        for (error, group) in [
            ("user 17 not found", "user # not found"),
            ("timeout after 250ms: retry", "timeout after #: retry"),
            ("no route to 10.0.0.7:5432.", "no route to #."),
            ("connect [fe80::1]:80 refused", "connect [#]:# refused"),
            (
                "row 6f1c2d3e-aaaa-bbbb-cccc-deadbeefcafe gone",
                "row # gone",
            ),
            ("key deadbeefcafe", "key #"),
            ("at 0x7ffe12", "at #"),
            ("mail to jo+x@example.org bounced", "mail to # bounced"),
            ("  two\n lines\t ", "two lines"),
            ("no such table: users", "no such table: users"),
            ("", ""),
        ] {
            assert_eq!(error_group(error), group, "{error}");
        }
    }

    #[test]
    fn a_group_is_bounded() {
        assert_eq!(
            error_group(&"word ".repeat(10_000)).chars().count(),
            MAX_GROUP
        );
        assert_eq!(error_group(&"ö".repeat(10_000)).chars().count(), MAX_GROUP);
    }
}
