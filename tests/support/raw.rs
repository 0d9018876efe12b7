//! A client without manners: bytes out, bytes in, and leaving in every way there is.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::soon;

/// A bare connection. It reads nothing unless it is told to; dropped, it is closed.
pub(crate) struct Raw {
    stream: TcpStream,
    /// Read, and not asked for yet.
    ahead: Vec<u8>,
}

impl Raw {
    pub(crate) async fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        Self {
            stream,
            ahead: Vec::new(),
        }
    }

    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let written = self.stream.write_all(bytes.as_ref());
        soon("room to write", written).await.expect("a write");
    }

    /// A GET over HTTP/1.1.
    pub(crate) async fn get(&mut self, path: &str) {
        self.write(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"))
            .await;
    }

    /// Reads up to and including this text.
    ///
    /// # Panics
    ///
    /// If the connection ends first.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        loop {
            let found = find(&self.ahead, text.as_bytes());
            if let Some(at) = found {
                let rest = self.ahead.split_off(at + text.len());
                let taken = std::mem::replace(&mut self.ahead, rest);
                return String::from_utf8_lossy(&taken).into_owned();
            }
            let read = self.more(text).await;
            assert!(
                read > 0,
                "the connection ended without {text:?}: {:?}",
                String::from_utf8_lossy(&self.ahead)
            );
        }
    }

    /// Reads so many bytes.
    ///
    /// # Panics
    ///
    /// If the connection ends first.
    pub(crate) async fn exactly(&mut self, bytes: usize) -> Vec<u8> {
        while self.ahead.len() < bytes {
            let read = self.more("bytes").await;
            assert!(read > 0, "the connection ended at {}", self.ahead.len());
        }
        let rest = self.ahead.split_off(bytes);
        std::mem::replace(&mut self.ahead, rest)
    }

    /// Reads to the end, whether the other side closed or reset.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        while self.more("the end").await > 0 {}
        std::mem::take(&mut self.ahead)
    }

    /// No more bytes from here; it can still read.
    pub(crate) async fn half_close(&mut self) {
        self.stream.shutdown().await.expect("a half-close");
    }

    /// Leaves with RST instead of FIN.
    pub(crate) fn reset(self) {
        self.stream.set_zero_linger().expect("a socket");
    }

    /// The stream itself: for what follows an upgrade.
    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    async fn more(&mut self, what: &str) -> usize {
        let mut buffer = vec![0; 256 * 1024];
        // An error is an end as well.
        let read = soon(what, self.stream.read(&mut buffer)).await.unwrap_or(0);
        self.ahead.extend_from_slice(&buffer[..read]);
        read
    }
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

/// A GET of `/` over HTTP/2, by hand: windows as wide as they can be, and nothing else said. What
/// comes back can then be left in the socket, which no HTTP/2 client does.
pub(crate) fn http2_get() -> Vec<u8> {
    const WIDE: [u8; 4] = (i32::MAX as u32).to_be_bytes();
    const MORE: [u8; 4] = (i32::MAX as u32 - 65_535).to_be_bytes();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // SETTINGS: SETTINGS_INITIAL_WINDOW_SIZE.
    bytes.extend([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4]);
    bytes.extend(WIDE);
    // WINDOW_UPDATE of the connection.
    bytes.extend([0, 0, 4, 8, 0, 0, 0, 0, 0]);
    bytes.extend(MORE);
    // HEADERS with END_STREAM and END_HEADERS on stream 1: GET, http, /, and `test` as the authority.
    bytes.extend([0, 0, 9, 1, 5, 0, 0, 0, 1]);
    bytes.extend([0x82, 0x86, 0x84, 0x41, 4]);
    bytes.extend(b"test");
    bytes
}
