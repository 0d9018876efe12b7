//! What the compiler says to a task that cannot be one: the message is a part of the product.
//!
//! Not trybuild: it compares whole texts, which each compiler words differently, and checks all
//! dependencies anew in a project of its own (minutes). Here the compiler that built this test is called
//! on each program with the library as it is, and what it says must contain the phrases that help.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Each program of `tests/compile_fail`, and what its message must contain, whoever words the rest.
const PHRASES: &[(&str, &[&str])] = &[
    (
        "future_for_a_closure",
        &[
            "is not a task",
            "expected a closure that makes a future, or a `Task`",
            "Task::once(future)",
        ],
    ),
    (
        "task_is_not_send",
        &["Rc<i32>", "cannot be sent between threads safely"],
    ),
    ("future_is_not_send", &["Rc<i32>", "is not `Send`"]),
    ("borrowed_capture", &["borrow", "name", "move"]),
    (
        "borrowed_from_the_closure",
        &["captured variable", "escape"],
    ),
    ("capture_is_moved_out", &["FnOnce", "Fn", "name"]),
    (
        "wrong_return_type",
        &[
            "a task cannot return",
            "a task returns `()` or `Result<(), E>`",
        ],
    ),
    ("error_that_is_none", &["NotAnError", "std::error::Error"]),
    ("not_async", &["`()` is not a future"]),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile_fail")
}

/// The library that this test is linked to: the newest one beside it.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("this test is a file");
    let beside = test.parent().expect("in a directory");
    let libraries = beside.read_dir().expect("which can be read").flatten();
    libraries
        .filter(|file| {
            let name = file.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libtower_defer-") && name.ends_with(".rlib")
        })
        .max_by_key(|file| file.metadata().and_then(|data| data.modified()).ok())
        .expect("the library has been built")
        .path()
}

/// Whether the program compiles, and what was said.
fn compile(program: &Path) -> (bool, String) {
    let library = library();
    let beside = library.parent().expect("in a directory");
    let mut external = std::ffi::OsString::from("tower_defer=");
    external.push(&library);
    let mut search = std::ffi::OsString::from("dependency=");
    search.push(beside);
    let compiled = Command::new("rustc")
        .args([
            "--edition",
            "2024",
            "--emit",
            "metadata",
            "-A",
            "dead_code",
            "-o",
        ])
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("messages.rmeta"))
        .arg("--extern")
        .arg(external)
        .arg("-L")
        .arg(search)
        .arg(program)
        .output()
        .expect("rustc is there, as it was for this test");
    let said = String::from_utf8_lossy(&compiled.stderr).into_owned();
    assert!(
        !said.contains("E0514") && !said.contains("E0463"),
        "this is not the compiler that built the library:\n{said}"
    );
    (compiled.status.success(), said)
}

#[test]
fn the_compiler_says_what_is_missing() {
    let mut wrong = String::new();
    for (name, phrases) in PHRASES {
        let (compiles, said) = compile(&directory().join(format!("{name}.rs")));
        let missing: Vec<_> = phrases
            .iter()
            .filter(|phrase| !said.contains(**phrase))
            .collect();
        if compiles || !missing.is_empty() {
            wrong.push_str(&format!(
                "{name}: compiles: {compiles}, not said: {missing:?}\n{said}\n"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn each_program_has_its_phrases() {
    let programs = directory()
        .read_dir()
        .expect("the directory is there")
        .flatten();
    let mut names: Vec<String> = programs
        .map(|file| file.path())
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    let mut phrased: Vec<String> = PHRASES.iter().map(|(name, _)| (*name).to_owned()).collect();
    names.sort_unstable();
    phrased.sort_unstable();
    assert_eq!(names, phrased);
}

/// Else a program that fails for another reason would pass for one that fails for its own.
#[test]
fn what_is_meant_compiles() {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("meant.rs");
    let text = "
        use tower_defer::{Defer, Executor, Task};
        async fn welcome(user: i64) -> Result<(), std::io::Error> { drop(user); Ok(()) }
        fn handler(defer: &Defer, executor: &Executor) {
            defer.run(|| welcome(17));
            defer.run(|| async {});
            defer.run(Task::once(welcome(17)));
            let _ = defer.try_run(Task::new(|| welcome(17)).name(\"welcome\"));
            executor.submit(|| welcome(17));
            let task: Task = (|| welcome(17)).into();
            executor.submit(task);
        }
        fn main() {}
    ";
    std::fs::write(&program, text).expect("a file of our own");
    let (compiles, said) = compile(&program);
    assert!(compiles, "{said}");
}
