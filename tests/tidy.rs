//! The repository checks itself: the house rules that no compiler and no lint knows.
//!
//! What this is not: a style guide. rustfmt and clippy judge the shape of the code; here stand
//! the rules about which file may say what, and about what the manifest promises the reader.
//!
//! 1. A rule reads files and returns violations, `path:line: reason`; it never panics over one.
//! 2. Rules look at code with comments and literals blanked ([`Source::code`]), so that a word in
//!    a sentence is never taken for a call. Lines keep their numbers.
//! 3. Files are found by walking, so a file that is added tomorrow is held to the same rules.
//! 4. `the_rules_bite` shows each rule a violation: a rule that finds nothing must mean that there
//!    is nothing.

use std::{fs, iter, path::Path, process::Command};

use source::{Source, numbered, paths, word_positions};

#[path = "tidy/source.rs"]
mod source;

const MAX_LINES: usize = 400;

/// What production code may take from `std::sync` anywhere: no lock and no atomic among it, and the
/// error is the very type that loom's locks return.
const SHARED_EVERYWHERE: [&str; 5] = ["Arc", "Weak", "OnceLock", "LazyLock", "PoisonError"];

/// The comments that excuse a sleep in a test, at the end of its line.
const SLEEP_REASONS: [&str; 3] = [
    "// paused time",
    "// the task's own work",
    "// the probe's pause",
];

#[test]
fn files_are_small_rooms() {
    expect_none(rust_files(&["src"]).iter().flat_map(too_long));
}

#[test]
fn nothing_is_silenced_or_left_undone() {
    expect_none(
        rust_files(&["src", "tests", "benches", "examples"])
            .iter()
            .flat_map(silenced),
    );
}

#[test]
fn tests_do_not_wait_for_a_fixed_time() {
    expect_none(rust_files(&["src", "tests"]).iter().flat_map(bare_sleeps));
}

#[test]
fn primitives_are_named_in_sync_only() {
    expect_none(rust_files(&["src"]).iter().flat_map(primitives));
}

#[test]
fn time_and_chance_come_from_clock_only() {
    expect_none(rust_files(&["src"]).iter().flat_map(clock_reads));
}

#[test]
fn unsafe_code_is_forbidden() {
    let lib = Source::new("src/lib.rs", &read("src/lib.rs"));
    assert!(
        lib.code
            .lines()
            .any(|line| line == "#![forbid(unsafe_code)]"),
        "src/lib.rs lacks `#![forbid(unsafe_code)]`, on a line of its own"
    );
}

#[test]
fn no_tracked_file_names_a_machine_or_a_registry() {
    expect_none(tracked_files().into_iter().flat_map(|path| {
        let text = fs::read(top().join(&path)).unwrap_or_default();
        places(&path, &String::from_utf8_lossy(&text))
    }));
}

#[test]
fn documents_name_this_version() {
    let readme = read("README.md");
    let sources = iter::once(Source::new("README.md", &readme)).chain(rust_files(&["src"]));
    expect_none(sources.flat_map(|source| other_versions(&source, env!("CARGO_PKG_VERSION"))));
    assert!(
        !requirements(&readme).is_empty(),
        "README.md does not say how to depend on this version: `{} = \"…\"`",
        env!("CARGO_PKG_NAME")
    );
}

#[test]
fn features_are_explained() {
    expect_none(unexplained(&read("Cargo.toml"), &read("README.md")));
}

#[test]
fn readme_names_the_commands_that_ci_runs() {
    let (readme, run) = (read("README.md"), read(".ci/run"));
    let command = run
        .lines()
        .find_map(|line| {
            line.strip_prefix("readonly test_command='")?
                .strip_suffix('\'')
        })
        .expect(".ci/run states its test command");
    assert!(
        readme.contains(command),
        "README.md does not give the test command: {command}"
    );
    assert!(
        readme.contains(".ci/run"),
        "README.md does not name `.ci/run`"
    );
}

// The rules.

fn too_long(source: &Source) -> Vec<String> {
    let lines = source.test_lines.iter().filter(|test| !**test).count();
    let short = lines <= MAX_LINES || source.is_test_file();
    let reason = format!("{lines} lines without tests, {MAX_LINES} at most");
    if short {
        Vec::new()
    } else {
        vec![source.violation(0, &reason)]
    }
}

fn silenced(source: &Source) -> Vec<String> {
    source.find(|line| {
        let attribute = line.contains("#[") || line.contains("#![");
        let calls = |name: &str| word_positions(line, name).next().is_some();
        (attribute && calls("allow("))
            .then_some("`allow` says nothing: `#[expect(…, reason = …)]`")
            .or((attribute && calls("ignore")).then_some("an ignored test is one nobody runs"))
            .or((calls("todo!") || calls("unimplemented!")).then_some("left undone"))
            .or(calls("dbg!").then_some("left from debugging"))
    })
}

fn bare_sleeps(source: &Source) -> Vec<String> {
    let lines = source
        .code
        .lines()
        .zip(source.text.lines())
        .zip(&source.test_lines);
    let sleeps = |line: &str| {
        ["sleep(", "sleep_until("].iter().any(|name| {
            word_positions(line, name)
                .any(|at| !line[..at].ends_with('.') && !line[..at].ends_with("fn "))
        })
    };
    lines
        .enumerate()
        .filter(|(_, ((code, text), test))| {
            let excused = SLEEP_REASONS.iter().any(|reason| text.contains(reason));
            (**test || source.is_test_file()) && sleeps(code) && !excused
        })
        .map(|(at, _)| source.violation(at, &format!("a sleep without one of {SLEEP_REASONS:?}")))
        .collect()
}

/// Tests may use what they like: they are not what loom models.
fn primitives(source: &Source) -> Vec<String> {
    let in_sync = source.path == "src/sync.rs" || source.path.starts_with("src/sync/");
    if in_sync || source.is_test_file() {
        return Vec::new();
    }
    let production: String = source
        .code
        .lines()
        .zip(&source.test_lines)
        .flat_map(|(line, test)| [if *test { "" } else { line }, "\n"])
        .collect();
    paths(&production)
        .into_iter()
        .filter(|(_, path)| {
            let from_sync = ["std::sync", "core::sync"]
                .iter()
                .find_map(|module| path.strip_prefix(module))
                .filter(|rest| rest.is_empty() || rest.starts_with("::"));
            let item = from_sync.map(|rest| rest.trim_start_matches("::"));
            item.is_some_and(|item| {
                !SHARED_EVERYWHERE.contains(&item.split("::").next().unwrap_or(item))
            }) || path.starts_with("loom::")
        })
        .map(|(at, path)| source.violation(at, &format!("`{path}`: name it in src/sync.rs")))
        .collect()
}

fn clock_reads(source: &Source) -> Vec<String> {
    source.find(|line| {
        let reads = ["Instant::now", "SystemTime::now", "fastrand::"]
            .iter()
            .any(|it| line.contains(it));
        (reads && source.path != "src/clock.rs")
            .then_some("time and randomness come from src/clock.rs only")
    })
}

/// Absolute paths of a developer's machine, and hosts that serve packages: a mirror is read from
/// the machine's own configuration. Put together here, so that this file passes its own rule.
fn places(path: &str, text: &str) -> Vec<String> {
    let directories = ["work", "root"].map(|name| format!("/{name}/"));
    let hosts = [
        ["crates", "io"],
        ["debian", "org"],
        ["ubuntu", "com"],
        ["npmjs", "org"],
        ["pypi", "org"],
        ["pythonhosted", "org"],
        ["golang", "org"],
    ]
    .map(|parts| parts.join("."));
    let index = format!(
        "source = \"registry+https://github.com/rust-lang/{}-index\"",
        hosts[0]
    );
    let absolute = |line: &str, directory: &str| {
        line.match_indices(directory).any(|(at, _)| {
            line[..at]
                .chars()
                .next_back()
                .is_none_or(|c| c.is_whitespace() || "\"'`(=:,<>[|".contains(c))
        })
    };
    numbered(text)
        .filter(|(_, line)| !(path == "Cargo.lock" && *line == index))
        .filter(|(_, line)| {
            directories
                .iter()
                .any(|directory| absolute(line, directory))
                || hosts.iter().any(|host| line.contains(host))
                || (path == "Cargo.lock" && line.contains("://"))
        })
        .map(|(at, line)| format!("{path}:{}: names a place: {}", at + 1, line.trim()))
        .collect()
}

fn other_versions(source: &Source, version: &str) -> Vec<String> {
    let names_it = |requirement: &str| {
        let prefix = version.strip_prefix(requirement);
        // "0" names every breaking version before 1.0.
        prefix.is_some_and(|rest| rest.is_empty() || rest.starts_with('.')) && requirement != "0"
    };
    requirements(&source.text)
        .into_iter()
        .filter(|(_, requirement)| !names_it(requirement))
        .map(|(at, other)| source.violation(at, &format!("names {other}, this is {version}")))
        .collect()
}

/// `tower-defer = "0.1"`, `tower-defer = { version = "0.1", … }`, `tower-defer@0.1`.
fn requirements(text: &str) -> Vec<(usize, String)> {
    let name = env!("CARGO_PKG_NAME");
    numbered(text)
        .filter_map(|(at, line)| {
            let table = format!("{name} = {{");
            let rest = line
                .split_once(&format!("{name} = \""))
                .map(|(_, rest)| rest)
                .or_else(|| {
                    let (_, fields) = line.split_once(&table)?;
                    fields.split_once("version = \"").map(|(_, rest)| rest)
                });
            let rest =
                rest.or_else(|| line.split_once(&format!("{name}@")).map(|(_, rest)| rest))?;
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !".-+^=~".contains(c));
            Some((
                at,
                rest[..end.unwrap_or(rest.len())]
                    .trim_end_matches('.')
                    .to_owned(),
            ))
        })
        .collect()
}

fn unexplained(manifest: &str, readme: &str) -> Vec<String> {
    let mut violations = Vec::new();
    let (mut inside, mut previous) = (false, "");
    for (at, line) in numbered(manifest) {
        if line.starts_with('[') {
            inside = line.trim() == "[features]";
        }
        let feature = line
            .split_once('=')
            .map(|(name, _)| name.trim().trim_matches('"'));
        // A line inside of an array is indented, or closes it.
        if let Some(feature) = feature
            .filter(|name| inside && !line.starts_with([' ', '#', ']']) && *name != "default")
        {
            if !previous.starts_with('#') {
                violations.push(format!("Cargo.toml:{}: `{feature}` has no comment", at + 1));
            }
            if ![format!("`{feature}`"), format!("\"{feature}\"")]
                .iter()
                .any(|n| readme.contains(n))
            {
                violations.push(format!(
                    "README.md: the feature `{feature}` is not mentioned"
                ));
            }
        }
        previous = line;
    }
    violations
}

// What the rules read.

fn expect_none(violations: impl IntoIterator<Item = String>) {
    let violations: Vec<_> = violations.into_iter().collect();
    assert!(
        violations.is_empty(),
        "{} violations:\n{}",
        violations.len(),
        violations.join("\n")
    );
}

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(top().join(path))
        .unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
}

fn rust_files(directories: &[&str]) -> Vec<Source> {
    let paths = directories.iter().flat_map(|directory| walk(directory));
    paths
        .filter(|path| path.ends_with(".rs"))
        .map(|path| Source::new(&path, &read(&path)))
        .collect()
}

/// Files below a directory of the repository, as paths from its top; none if it is not there.
fn walk(directory: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(top().join(directory)) else {
        return Vec::new();
    };
    let mut files = Vec::new();
    for entry in entries.flatten() {
        let name = entry
            .file_name()
            .into_string()
            .expect("file names are UTF-8");
        let path = if directory == "." {
            name
        } else {
            format!("{directory}/{name}")
        };
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && ![".git", "target"].contains(&&*path) => {
                files.extend(walk(&path));
            }
            Ok(kind) if kind.is_file() => files.push(path),
            _ => {}
        }
    }
    files
}

/// What git tracks; in an unpacked archive every file is.
fn tracked_files() -> Vec<String> {
    let git = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(top())
        .output();
    match git {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            let names = String::from_utf8(output.stdout).expect("file names are UTF-8");
            names.split_terminator('\0').map(str::to_owned).collect()
        }
        _ => walk("."),
    }
}

#[test]
fn the_rules_bite() {
    let long = "fn f() {}\n".repeat(MAX_LINES + 1);
    let tests = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{\n{long}}}\n");
    assert_eq!(too_long(&Source::new("src/a.rs", &long)).len(), 1);
    assert_eq!(too_long(&Source::new("src/a.rs", &tests)).len(), 0);

    for line in [
        "#[allow(dead_code)]",
        "#![cfg_attr(docsrs, allow(unused))]",
        "#[ignore]",
        "#[ignore = \"slow\"]",
        "todo!()",
        "let x = dbg!(y);",
        "unimplemented!(\"later\")",
    ] {
        assert_eq!(silenced(&Source::new("src/a.rs", line)).len(), 1, "{line}");
    }
    for line in [
        "budget.allow(1)",
        "// todo!()",
        "\"#[ignore]\"",
        "let ignored = 1;",
    ] {
        assert_eq!(silenced(&Source::new("src/a.rs", line)).len(), 0, "{line}");
    }

    for line in [
        "std::thread::sleep(D);",
        "tokio::time::sleep(D).await;",
        "sleep_until(t).await;",
    ] {
        assert_eq!(
            bare_sleeps(&Source::new("tests/a.rs", line)).len(),
            1,
            "{line}"
        );
        assert_eq!(
            bare_sleeps(&Source::new("src/a.rs", line)).len(),
            0,
            "{line}"
        );
        let test = format!("#[cfg(test)]\nmod tests {{ fn f() {{ {line} }} }}");
        assert_eq!(
            bare_sleeps(&Source::new("src/a.rs", &test)).len(),
            1,
            "{line}"
        );
        for reason in SLEEP_REASONS {
            let excused = format!("{line} {reason}");
            assert_eq!(
                bare_sleeps(&Source::new("tests/a.rs", &excused)).len(),
                0,
                "{line}"
            );
        }
    }

    for line in [
        "use std::sync::atomic::{AtomicU8, Ordering::Relaxed};",
        "use std::sync::{Arc, Mutex};",
        "use std::{fmt, sync::{Arc, Condvar as Bell}};",
        "use std::sync;",
        "use std::sync::{self};",
        "pub(crate) use core::sync::atomic::AtomicBool;",
        "struct S { lock: std::sync::RwLock<u8> }",
        "use loom::thread;",
        "fn f() { loom::thread::yield_now() }",
    ] {
        assert!(
            !primitives(&Source::new("src/a.rs", line)).is_empty(),
            "{line}"
        );
        for room in ["src/sync.rs", "src/sync/model.rs"] {
            assert!(primitives(&Source::new(room, line)).is_empty(), "{line}");
        }
        assert!(
            !primitives(&Source::new("src/task/sync.rs", line)).is_empty(),
            "{line}"
        );
        let test = format!("#[cfg(test)]\nmod tests {{ {line} }}");
        assert!(
            primitives(&Source::new("src/a.rs", &test)).is_empty(),
            "{line}"
        );
    }
    for line in [
        "use std::sync::{Arc, OnceLock};",
        "use crate::sync::{Mutex, atomic::AtomicU8};",
        "use tokio::sync::Notify;",
        "/// Why not `std::sync::Mutex`?",
    ] {
        assert!(
            primitives(&Source::new("src/a.rs", line)).is_empty(),
            "{line}"
        );
    }

    for line in [
        "let now = Instant::now();",
        "std::time::SystemTime::now()",
        "fastrand::f64()",
    ] {
        assert_eq!(
            clock_reads(&Source::new("src/a.rs", line)).len(),
            1,
            "{line}"
        );
        assert_eq!(
            clock_reads(&Source::new("src/clock.rs", line)).len(),
            0,
            "{line}"
        );
    }

    let name = env!("CARGO_PKG_NAME");
    for (requirement, stale) in [
        ("0.1", 0),
        ("0.1.0", 0),
        ("0.2", 1),
        ("0.1.1", 1),
        ("0", 1),
        ("^0.1", 1),
    ] {
        for line in [
            format!("{name} = \"{requirement}\""),
            format!("{name} = {{ version = \"{requirement}\", features = [\"axum\"] }}"),
            format!("cargo add {name}@{requirement}."),
        ] {
            assert_eq!(
                other_versions(&Source::new("a.md", &line), "0.1.0").len(),
                stale,
                "{line}"
            );
        }
    }

    let manifest =
        "[features]\ndefault = []\n# Why.\na = [\n  \"x=y\",\n]\nb = []\n[dependencies]\nc = \"1\"";
    assert_eq!(
        unexplained(manifest, "`a`, `b`"),
        ["Cargo.toml:7: `b` has no comment"]
    );
    assert_eq!(
        unexplained(manifest, "a, `b`"),
        [
            "README.md: the feature `a` is not mentioned",
            "Cargo.toml:7: `b` has no comment"
        ]
    );

    let index = format!(
        "registry+https://github.com/rust-lang/{}.io-index",
        "crates"
    );
    for (path, line, bad) in [
        ("a", format!("cd /{}/main", "work"), 1),
        ("a", format!("see src/{}/main", "work"), 0),
        ("a", format!("\"/{}/.cargo\"", "root"), 1),
        ("a", format!("https://index.{}.io/", "crates"), 1),
        ("a", format!("URIs: http://deb.{}.org/debian", "debian"), 1),
        ("Cargo.lock", format!("source = \"{index}\""), 0),
        (
            "Cargo.lock",
            "source = \"registry+https://mirror.example/index\"".to_owned(),
            1,
        ),
    ] {
        assert_eq!(places(path, &line).len(), bad, "{line}");
    }
}
