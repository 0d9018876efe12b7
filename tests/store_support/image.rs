//! A crash without a crash: an image of the files, taken while the store has them open.

use std::path::{Path, PathBuf};

/// Copies a database and its logs, as a killed process leaves them.
pub(crate) fn copy_store(from: &Path, to: &Path) {
    for suffix in ["", "-wal", "-log"] {
        let name = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        if name(from).exists() {
            std::fs::copy(name(from), name(to)).unwrap();
        }
    }
}
