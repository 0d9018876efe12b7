//! gRPC, through tonic's own server and client: case 7, and what gRPC makes of its neighbours.
#![cfg(all(feature = "tonic", feature = "hyper"))]

mod support;

use bytes::{BufMut, Bytes, BytesMut};
use http::{Request, StatusCode};
use prost::Message;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::transport::Server as Tonic;
use tower::Layer;
use tower_defer::{DeferLayer, End};

use support::client::Manual;
use support::grpc::{Ask, Echo, EchoClient, STREAM, UNARY, all};
use support::ran::quiet;
use support::{Http, Server, Setting, over};

const WELL: &str = "always complete default success";
const FAILED: &str = "always failure";

/// Where the layer is.
#[derive(Clone, Copy, Debug)]
enum Around {
    /// `Server::layer`: all services.
    Server,
    /// The one service, in `add_service`.
    Service,
}

fn serve(setting: Setting, around: Around, layer: &DeferLayer, echo: &Echo) -> Server {
    let (layer, echo) = (layer.clone(), echo.clone());
    Server::start(setting.flavor, move |listener: TcpListener| async move {
        let incoming = TcpListenerStream::new(listener);
        let served = match around {
            Around::Server => {
                let mut server = Tonic::builder().layer(layer);
                server.add_service(echo).serve_with_incoming(incoming).await
            }
            Around::Service => {
                let echo = layer.layer(echo);
                let mut server = Tonic::builder();
                server.add_service(echo).serve_with_incoming(incoming).await
            }
        };
        served.expect("the server serves");
    })
}

/// With the layer in both places.
fn everywhere<F: AsyncFn(Setting, Around)>(body: F) {
    for around in [Around::Server, Around::Service] {
        over(Http::Two, |setting| body(setting, around));
    }
}

#[test]
fn case_07_a_call_that_ends_well_is_a_success() {
    everywhere(async |setting, around| {
        for streams in [false, true] {
            // Given a method that registers tasks.
            let (layer, echo) = (DeferLayer::new(), Echo::new());
            let server = serve(setting, around, &layer, &echo);
            let mut client = EchoClient::connect(server.addr).await;

            // When it ends well.
            if streams {
                let stream = client.stream("well").await.expect("a stream");
                assert_eq!(all(stream).await, ("once twice".to_owned(), Code::Ok));
            } else {
                assert_eq!(client.unary("well").await.expect("an answer"), "once");
            }

            // Then the tasks for success run, and know the status.
            quiet(&layer, 6).await;
            assert_eq!(echo.ran.names(), WELL, "{around:?}");
            let info = echo.ran.info("always");
            assert_eq!(
                (info.status, info.grpc_status),
                (Some(StatusCode::OK), Some(0))
            );
            // Five bytes of frame and six of message for "once", one more for "twice".
            let bytes = if streams { 11 + 12 } else { 11 };
            assert_eq!((info.end, info.bytes), (End::Complete, bytes));
        }
    });
}

#[test]
fn case_07_an_error_in_the_trailers_is_a_failure() {
    everywhere(async |setting, around| {
        // Given a stream that sends a message, and then fails, on HTTP 200.
        let (layer, echo) = (DeferLayer::new(), Echo::new());
        let server = serve(setting, around, &layer, &echo);
        let mut client = EchoClient::connect(server.addr).await;

        // When it is read.
        let stream = client.stream("fail-late").await.expect("a stream");
        assert_eq!(all(stream).await, ("once".to_owned(), Code::Internal));

        // Then the tasks for failure run, and know the code.
        quiet(&layer, 6).await;
        assert_eq!(echo.ran.names(), FAILED, "{around:?}");
        let info = echo.ran.info("failure");
        assert_eq!(
            (info.status, info.grpc_status),
            (Some(StatusCode::OK), Some(13))
        );
        assert_eq!((info.end, info.bytes), (End::Complete, 11));
    });
}

#[test]
fn case_07_an_error_without_a_body_is_a_failure() {
    everywhere(async |setting, around| {
        for streams in [false, true] {
            // Given a method that fails before its first message: the status is in the head.
            let (layer, echo) = (DeferLayer::new(), Echo::new());
            let server = serve(setting, around, &layer, &echo);
            let mut client = EchoClient::connect(server.addr).await;

            // When it is called.
            let failed = match streams {
                true => client.stream("fail").await.map(drop),
                false => client.unary("fail").await.map(drop),
            };
            assert_eq!(failed.expect_err("a failure").code(), Code::Internal);

            // Then the tasks for failure run, and know the code.
            quiet(&layer, 6).await;
            assert_eq!(echo.ran.names(), FAILED, "{around:?}");
            let info = echo.ran.info("failure");
            assert_eq!(
                (info.status, info.grpc_status),
                (Some(StatusCode::OK), Some(13))
            );
            assert_eq!((info.end, info.bytes), (End::Complete, 0));
        }
    });
}

#[test]
fn a_stream_holds_its_tasks_to_its_trailers() {
    everywhere(async |setting, around| {
        // Given a stream that waits between its messages.
        let (layer, echo) = (DeferLayer::new(), Echo::new());
        let server = serve(setting, around, &layer, &echo);
        let mut client = EchoClient::connect(server.addr).await;
        let mut stream = client.stream("wait").await.expect("a stream");
        assert!(stream.message().await.expect("a message").is_some());

        // When another call has been answered, and its task has run.
        client.clone().unary("witness").await.expect("an answer");
        echo.ran.awaits("witness").await;
        assert_eq!(echo.ran.names(), "witness", "{around:?}");

        // Then the stream's tasks still wait for its end.
        echo.gate.open();
        assert_eq!(all(stream).await, ("twice".to_owned(), Code::Ok));
        quiet(&layer, 7).await;
        assert_eq!(echo.ran.names(), format!("{WELL} witness"));
    });
}

#[test]
fn a_client_that_drops_a_stream_aborts_it() {
    everywhere(async |setting, around| {
        // Given a stream that has sent its first message and never sends another.
        let (layer, echo) = (DeferLayer::new(), Echo::new());
        let server = serve(setting, around, &layer, &echo);
        let mut client = EchoClient::connect(server.addr).await;
        let mut stream = client.stream("never").await.expect("a stream");
        assert!(stream.message().await.expect("a message").is_some());

        // When the client drops it, which resets it.
        drop(stream);

        // Then it was aborted, and there is no status.
        quiet(&layer, 6).await;
        assert_eq!(
            echo.ran.names(),
            "aborted always default success",
            "{around:?}"
        );
        let info = echo.ran.info("always");
        assert_eq!((info.end, info.bytes), (End::Aborted, 11));
        assert_eq!(info.grpc_status, None);
    });
}

/// A call by hand, with a deadline that only the server looks at.
fn call(path: &str, what: &str, timeout: &str) -> (Request<()>, Bytes) {
    let request = Request::post(format!("http://test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(())
        .expect("a request");
    let message = Ask {
        what: what.to_owned(),
    };
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).expect("a short message"));
    message.encode(&mut bytes).expect("room");
    (request, bytes.freeze())
}

#[test]
fn the_deadline_of_a_call_cancels_its_handler() {
    over(Http::Two, |setting| async move {
        // Given a method that is pending, and tonic's own timeout, which is outside `Server::layer`.
        let (layer, echo) = (DeferLayer::new(), Echo::new());
        let server = serve(setting, Around::Server, &layer, &echo);
        let mut client = Manual::connect(server.addr, 65_535).await;

        // When the deadline of the call passes.
        let (request, message) = call(UNARY, "never", "50m");
        let (response, mut stream) = client
            .sender
            .send_request(request, false)
            .expect("a stream");
        stream.send_data(message, true).expect("a stream");
        let response = support::soon("a head", response).await.expect("a head");

        // Then tonic answers, and the tasks know that the handler was dropped.
        let code = response.headers()["grpc-status"]
            .to_str()
            .expect("a number");
        assert!(["1", "4"].contains(&code), "{code}");
        quiet(&layer, 6).await;
        assert_eq!(echo.ran.names(), "aborted always default");
        let info = echo.ran.info("always");
        assert_eq!((info.end, info.status), (End::Cancelled, None));
    });
}

#[test]
fn the_deadline_of_a_call_does_not_cut_its_stream() {
    over(Http::Two, |setting| async move {
        // Given a stream that has begun: tonic's timeout is over with its head.
        let (layer, echo) = (DeferLayer::new(), Echo::new());
        let server = serve(setting, Around::Server, &layer, &echo);
        let mut client = Manual::connect(server.addr, 65_535).await;
        let (request, message) = call(STREAM, "wait", "5S");
        let (response, mut stream) = client
            .sender
            .send_request(request, false)
            .expect("a stream");
        stream.send_data(message, true).expect("a stream");
        let response = support::soon("a head", response).await.expect("a head");

        // When it ends well.
        echo.gate.open();
        let mut body = response.into_body();
        let read = support::client::drain(&mut body)
            .await
            .expect("a whole body");
        let trailers = body.trailers().await.expect("no error").expect("trailers");

        // Then it is a success.
        assert_eq!(
            (read, &trailers["grpc-status"]),
            (23, &"0".parse().expect("a value"))
        );
        quiet(&layer, 6).await;
        assert_eq!(echo.ran.names(), WELL);
        assert_eq!(echo.ran.info("always").grpc_status, Some(0));
    });
}

#[test]
fn case_16_layers_in_both_places_are_one() {
    over(Http::Two, |setting| async move {
        // Given a layer around the server, and one around the service with an executor of its own.
        let (layer, echo, inner) = (DeferLayer::new(), Echo::new(), DeferLayer::new());
        let server = Server::start(setting.flavor, {
            let (layer, echo) = (layer.clone(), echo.clone());
            let within = inner.clone();
            move |listener| async move {
                let mut server = Tonic::builder().layer(layer);
                let router = server.add_service(within.layer(echo));
                let served = router.serve_with_incoming(TcpListenerStream::new(listener));
                served.await.expect("the server serves");
            }
        });

        // When a stream fails late.
        let mut client = EchoClient::connect(server.addr).await;
        let stream = client.stream("fail-late").await.expect("a stream");
        assert_eq!(all(stream).await.1, Code::Internal);

        // Then each task runs once, on the inner executor, with the status of the trailers.
        quiet(&inner, 6).await;
        assert_eq!(echo.ran.names(), FAILED);
        assert_eq!(echo.ran.info("always").grpc_status, Some(13));
        assert_eq!(layer.get_executor().snapshot().accepted, 0);
    });
}

#[test]
fn case_19_without_the_layer_the_status_names_the_line_to_add() {
    over(Http::Two, |setting| async move {
        // Given a server without the layer.
        let echo = Echo::new();
        let server = Server::start(setting.flavor, {
            let echo = echo.clone();
            move |listener| async move {
                let router = Tonic::builder().add_service(echo);
                let served = router.serve_with_incoming(TcpListenerStream::new(listener));
                served.await.expect("the server serves");
            }
        });

        // When a method asks for the handle.
        let mut client = EchoClient::connect(server.addr).await;
        let status = client.unary("well").await.expect_err("no layer");

        // Then its status says what is missing.
        assert_eq!(status.code(), Code::Internal);
        let line = ".layer(tower_defer::DeferLayer::new())";
        assert!(status.message().contains(line), "{status}");
        assert_eq!(echo.ran.names(), "");
    });
}
