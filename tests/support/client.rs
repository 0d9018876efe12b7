//! Clients that speak the protocol: hyper's for both versions, and h2's, which reads when it is told to.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::{Http, soon};

/// A connection of hyper's client.
pub(crate) struct Client {
    sender: Sender,
    http: Http,
    connection: JoinHandle<()>,
}

enum Sender {
    One(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Two(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: http::response::Parts,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<http::HeaderMap>,
}

impl Client {
    pub(crate) async fn connect(addr: SocketAddr, http: Http) -> Self {
        Self::with_window(addr, http, None).await
    }

    /// With another flow-control window than hyper's, for each stream (HTTP/2 only).
    pub(crate) async fn with_window(addr: SocketAddr, http: Http, window: Option<u32>) -> Self {
        let stream = TcpStream::connect(addr).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let io = TokioIo::new(stream);
        match http {
            Http::One => {
                let made = hyper::client::conn::http1::handshake(io).await;
                let (sender, connection) = made.expect("a handshake");
                // An upgrade needs the connection to go on.
                let connection = connection.with_upgrades();
                Self {
                    sender: Sender::One(sender),
                    http,
                    connection: tokio::spawn(async move { drop(connection.await) }),
                }
            }
            Http::Two => {
                let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
                if window.is_some() {
                    builder.initial_stream_window_size(window);
                }
                let made = builder.handshake(io).await;
                let (sender, connection) = made.expect("a handshake");
                Self {
                    sender: Sender::Two(sender),
                    http,
                    connection: tokio::spawn(async move { drop(connection.await) }),
                }
            }
        }
    }

    /// The head, with the body still to be read.
    pub(crate) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        soon("a head", async {
            match &mut self.sender {
                Sender::One(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Sender::Two(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
            }
        })
        .await
    }

    /// As the version wants it: a path for HTTP/1.1, a whole URI for HTTP/2.
    pub(crate) fn request(&self, method: Method, path: &str) -> Request<Full<Bytes>> {
        let builder = match self.http {
            Http::One => Request::builder().uri(path).header("host", "test"),
            Http::Two => Request::builder().uri(format!("http://test{path}")),
        };
        builder
            .method(method)
            .body(Full::default())
            .expect("a request")
    }

    /// GET, without the body.
    pub(crate) async fn head_of(&mut self, path: &str) -> Response<Incoming> {
        let request = self.request(Method::GET, path);
        self.send(request).await.expect("a response")
    }

    /// GET, to the last byte.
    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.ask(Method::GET, path).await
    }

    /// Any method, to the last byte.
    pub(crate) async fn ask(&mut self, method: Method, path: &str) -> Answer {
        let request = self.request(method, path);
        let response = self.send(request).await.expect("a response");
        read(response).await.expect("a whole body")
    }

    /// Closes the connection, whatever is under way.
    pub(crate) async fn leave(self) {
        self.connection.abort();
        // The socket is closed when the task has been dropped.
        let _ = self.connection.await;
    }
}

/// Reads a response to its end.
pub(crate) async fn read(response: Response<Incoming>) -> hyper::Result<Answer> {
    let (head, body) = response.into_parts();
    let collected = soon("the end of a body", body.collect()).await?;
    Ok(Answer {
        head,
        trailers: collected.trailers().cloned(),
        body: collected.to_bytes(),
    })
}

/// A connection of h2's client: a stream's window opens only by the hand of the test
/// (`body.flow_control().release_capacity(n)`), and `send_reset` resets it.
pub(crate) struct Manual {
    pub(crate) sender: h2::client::SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

impl Manual {
    /// With this window for each stream, and one of 1 GiB for the connection.
    pub(crate) async fn connect(addr: SocketAddr, window: u32) -> Self {
        let stream = TcpStream::connect(addr).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let made = h2::client::Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(1 << 30)
            .handshake(stream)
            .await;
        let (sender, connection) = made.expect("a handshake");
        Self {
            sender,
            connection: tokio::spawn(async move { drop(connection.await) }),
        }
    }

    /// A GET whose answer has not come: the future of its head, and the stream to reset it by.
    pub(crate) async fn start(
        &mut self,
        path: &str,
    ) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
        let request = Request::get(format!("http://test{path}"));
        let mut sender = self.sender.clone().ready().await.expect("a connection");
        sender
            .send_request(request.body(()).expect("a request"), true)
            .expect("a stream")
    }

    /// A GET, up to its head.
    pub(crate) async fn get(
        &mut self,
        path: &str,
    ) -> (Response<h2::RecvStream>, h2::SendStream<Bytes>) {
        let (response, stream) = self.start(path).await;
        (soon("a head", response).await.expect("a head"), stream)
    }

    pub(crate) async fn leave(self) {
        self.connection.abort();
        let _ = self.connection.await;
    }
}

/// Opens the window as the data comes, to the end. Returns how many bytes there were.
pub(crate) async fn drain(body: &mut h2::RecvStream) -> Result<usize, h2::Error> {
    let mut bytes = 0;
    while let Some(chunk) = soon("a chunk", body.data()).await {
        let chunk = chunk?;
        bytes += chunk.len();
        body.flow_control().release_capacity(chunk.len())?;
    }
    Ok(bytes)
}
