//! The server as the one sees it who measures.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::{Counts, on_core};

/// This program, started again with the word `serve`; it ends with this value.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: String,
}

impl Server {
    /// Returns when it listens. The words say what it serves.
    pub fn start(words: &[&str]) -> Self {
        let this = std::env::current_exe().expect("this program");
        let mut child = on_core(0)
            .arg(this)
            .arg("serve")
            .args(words)
            // It ends where this end is closed, whatever becomes of us.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("taskset, which was asked for");
        let mut address = String::new();
        let out = child.stdout.as_mut().expect("piped");
        BufReader::new(out)
            .read_line(&mut address)
            .expect("the server's address");
        Self {
            child,
            address: address.trim().to_owned(),
        }
    }

    /// So far.
    pub fn counts(&self) -> Counts {
        let mut stream = TcpStream::connect(&self.address).expect("the server");
        let ask = "GET /counts HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(ask.as_bytes()).expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        let body = text.rsplit("\r\n").next().unwrap_or_default();
        Counts::parse(body).unwrap_or_else(|| panic!("the server's counts: {text}"))
    }

    /// Waits until no side effect is left, or the time is over. Of a handler that does it inline one is
    /// lost with each client that leaves, so it also ends when nothing has changed for a second.
    pub fn settle(&self, within: Duration) -> Counts {
        let (until, mut last, mut looks) = (Instant::now() + within, self.counts(), 0);
        while last.missing() > 0 && looks < 20 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(50));
            let counts = self.counts();
            looks = if counts == last { looks + 1 } else { 0 };
            last = counts;
        }
        last
    }

    /// User and system time of the process.
    pub fn cpu(&self) -> Duration {
        tower_defer_measure::cpu_of(&self.id().to_string())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
