//! Clients on connections that are kept alive, and what they saw.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::support::soon;

/// Some of HTTP/1.1, some of HTTP/2.
pub(crate) const CONNECTIONS: usize = 12;

/// What the clients did and saw, over all processes.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Every event that was asked for.
    pub(crate) tried: BTreeSet<String>,
    /// Those whose head came with a 2xx.
    pub(crate) acknowledged: BTreeSet<String>,
    /// Those that the handler refuses after it has emitted them.
    pub(crate) refused: BTreeSet<String>,
}

/// What the clients of one process share.
pub(crate) struct Load {
    pub(crate) seen: RefCell<Seen>,
    heads: RefCell<usize>,
    came: Notify,
}

impl Load {
    pub(crate) fn new() -> Self {
        Self {
            seen: RefCell::default(),
            heads: RefCell::default(),
            came: Notify::new(),
        }
    }

    /// Waits for so many heads.
    pub(crate) async fn heads(&self, count: usize) {
        let target = *self.heads.borrow() + count;
        soon("heads", async {
            loop {
                let came = self.came.notified();
                if *self.heads.borrow() >= target {
                    return;
                }
                came.await;
            }
        })
        .await;
    }

    /// Sends requests until the process is gone.
    pub(crate) async fn run(&self, address: SocketAddr, run: usize, random: &mut fastrand::Rng) {
        let clients = (0..CONNECTIONS).map(|number| {
            let random = random.fork();
            self.client(address, format!("{run}-{number}"), number % 3 == 2, random)
        });
        join_all(clients).await;
    }

    async fn client(
        &self,
        address: SocketAddr,
        name: String,
        two: bool,
        mut random: fastrand::Rng,
    ) -> Option<()> {
        let mut connection = Connection::open(address, two).await?;
        for number in 0.. {
            let id = format!("{name}-{number}");
            let way = ["plain", "plain", "twice", "awaited", "refused"][random.usize(0..5)];
            let ids = match way {
                "twice" => vec![id.clone(), format!("{id}-b")],
                _ => vec![id.clone()],
            };
            self.seen.borrow_mut().tried.extend(ids.clone());
            if way == "refused" {
                self.seen.borrow_mut().refused.insert(id.clone());
            }
            let response = connection.send(&format!("/{way}/{id}")).await?;
            match (way, response.status()) {
                ("refused", StatusCode::UNPROCESSABLE_ENTITY) => {}
                (_, StatusCode::CREATED) => self.seen.borrow_mut().acknowledged.extend(ids),
                (_, status) => panic!("{way} {id}: {status}"),
            }
            *self.heads.borrow_mut() += 1;
            self.came.notify_waiters();
            response.into_body().collect().await.ok()?;
        }
        None
    }
}

/// A connection on which an error is an end: the other side is killed.
pub(crate) enum Connection {
    One(hyper::client::conn::http1::SendRequest<Empty<Bytes>>),
    Two(hyper::client::conn::http2::SendRequest<Empty<Bytes>>),
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr, two: bool) -> Option<Self> {
        let stream = TcpStream::connect(address).await.ok()?;
        stream.set_nodelay(true).ok()?;
        let io = TokioIo::new(stream);
        if two {
            let made = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await;
            let (sender, connection) = made.ok()?;
            tokio::spawn(async move { drop(connection.await) });
            return Some(Self::Two(sender));
        }
        let (sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
        tokio::spawn(async move { drop(connection.await) });
        Some(Self::One(sender))
    }

    /// POST, up to the head.
    pub(crate) async fn send(&mut self, path: &str) -> Option<Response<Incoming>> {
        let uri = match self {
            Self::One(_) => path.to_owned(),
            Self::Two(_) => format!("http://test{path}"),
        };
        let request = Request::post(uri).header("host", "test");
        let request = request.body(Empty::new()).expect("a request");
        soon("a head, or the end of the connection", async {
            match self {
                Self::One(sender) => {
                    sender.ready().await.ok()?;
                    sender.send_request(request).await.ok()
                }
                Self::Two(sender) => {
                    sender.ready().await.ok()?;
                    sender.send_request(request).await.ok()
                }
            }
        })
        .await
    }
}
