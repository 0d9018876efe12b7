//! The embedded store by a bare name, as README.md opens it. The working directory is the process's: a test of
//! its own, in a file of its own.
#![cfg(feature = "sqlite")]

use std::collections::BTreeSet;
use std::path::Path;

use tower_defer::event::store::{Sqlite, Store};

#[tokio::test]
async fn a_bare_name_means_the_directory_that_was_there_when_it_was_opened() {
    let directory = std::env::temp_dir().join(format!("defer-directory-{}", std::process::id()));
    let elsewhere = directory.join("elsewhere");
    std::fs::create_dir_all(&elsewhere).expect("a directory");
    std::env::set_current_dir(&directory).expect("it is there");

    // When a file is opened that is not there yet,
    let store = Sqlite::open("events.db").expect("a store");
    // then it has its redo log at once,
    let all = ["", "-lock", "-log", "-shm", "-wal"];
    assert_eq!(files(&directory), named(&all));
    // and stays where it is, wherever the process goes.
    std::env::set_current_dir(&elsewhere).expect("it is there");
    store.close().await.expect("closed");
    assert_eq!(files(&directory), named(&["", "-lock"]));
    assert_eq!(files(&elsewhere), BTreeSet::new());

    std::env::set_current_dir(std::env::temp_dir()).expect("it is there");
    std::fs::remove_dir_all(&directory).expect("nobody has it open");
}

fn files(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    entries
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn named(suffixes: &[&str]) -> BTreeSet<String> {
    let named = suffixes.iter().map(|suffix| format!("events.db{suffix}"));
    named.collect()
}
