//! A small file system of its own, where we may mount one.

use std::path::PathBuf;
use std::process::Command;

pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    pub(crate) fn small(path: PathBuf) -> Option<Self> {
        std::fs::create_dir_all(&path).unwrap();
        let mount = Self(path);
        mount
            .run(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .then_some(mount)
    }

    pub(crate) fn remount(&self, options: &str) {
        assert!(
            self.run(&["-o", &format!("remount,{options}")]),
            "remount,{options}"
        );
    }

    fn run(&self, args: &[&str]) -> bool {
        let output = Command::new("mount").args(args).arg(&self.0).output();
        output.is_ok_and(|output| output.status.success())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}
