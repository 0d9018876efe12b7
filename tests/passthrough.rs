//! With nothing deferred the layer is not there: what comes out is what the service and its body say.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::marker::PhantomPinned;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use tower::{Layer, Service, service_fn};
use tower_defer::{Defer, DeferLayer, DeferService};

/// A body that says what it is told to, also where that makes no sense; and it is not `Unpin`.
#[pin_project]
#[derive(Clone)]
struct Said {
    /// One for each poll, with the size hint and the end mark that hold after it.
    answers: VecDeque<(Answer, SizeHint, bool)>,
    hint: SizeHint,
    at_end: bool,
    #[pin]
    pinned: PhantomPinned,
}

#[derive(Clone)]
enum Answer {
    Pending,
    Data(Bytes),
    Trailers(&'static str),
    Error(&'static str),
    End,
}

impl Body for Said {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        let said = self.project();
        let Some((answer, hint, at_end)) = said.answers.pop_front() else {
            return Poll::Ready(None);
        };
        (*said.hint, *said.at_end) = (hint, at_end);
        match answer {
            Answer::Pending => Poll::Pending,
            Answer::Data(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Answer::Trailers(value) => {
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", HeaderValue::from_static(value));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Answer::Error(error) => Poll::Ready(Some(Err(error))),
            Answer::End => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.at_end
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

fn bodies() -> Vec<(&'static str, Said)> {
    let none = SizeHint::default;
    let exact = SizeHint::with_exact;
    let between = |lower, upper| {
        let mut hint = SizeHint::new();
        hint.set_upper(upper);
        hint.set_lower(lower);
        hint
    };
    let data = |size: usize| Answer::Data(Bytes::from(vec![7; size]));
    let body = |hint, at_end, answers: Vec<_>| Said {
        answers: answers.into(),
        hint,
        at_end,
        pinned: PhantomPinned,
    };
    vec![
        ("empty", body(exact(0), true, vec![])),
        (
            "full",
            body(exact(9), false, vec![(data(9), exact(0), true)]),
        ),
        (
            "a stream of unknown length, with a wait",
            body(
                none(),
                false,
                vec![
                    (data(3), none(), false),
                    (Answer::Pending, none(), false),
                    (data(0), none(), false),
                    (data(4), none(), false),
                    (Answer::End, none(), true),
                ],
            ),
        ),
        (
            "a hint that is a range, and shrinks",
            body(
                between(2, 50),
                false,
                vec![
                    (data(5), between(0, 45), false),
                    (data(5), between(0, 40), false),
                    (Answer::End, exact(0), false),
                ],
            ),
        ),
        (
            "trailers",
            body(
                none(),
                false,
                vec![
                    (data(5), none(), false),
                    (Answer::Trailers("12"), exact(0), true),
                ],
            ),
        ),
        (
            "an error, and something after it",
            body(
                exact(8),
                false,
                vec![
                    (data(5), exact(3), false),
                    (Answer::Error("disk"), exact(3), false),
                    (data(3), exact(0), true),
                ],
            ),
        ),
        (
            "one that goes on after its end",
            body(
                none(),
                false,
                vec![
                    (Answer::End, none(), false),
                    (data(1), none(), false),
                    (Answer::End, none(), true),
                ],
            ),
        ),
    ]
}

/// What a server sees of a body: each answer, with the hint and the mark before it.
fn seen<B>(body: B) -> Vec<String>
where
    B: Body<Data = Bytes, Error = &'static str>,
{
    let mut body = pin!(body);
    let mut cx = Context::from_waker(Waker::noop());
    let mut seen = Vec::new();
    for _ in 0..8 {
        let (hint, at_end) = (body.size_hint(), body.is_end_stream());
        let answer = match body.as_mut().poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                // The very same bytes: nothing is copied.
                Ok(data) => format!("{} bytes at {:p}", data.len(), data.as_ptr()),
                Err(frame) => format!("{:?}", frame.into_trailers().expect("trailers")),
            },
            other => format!("{other:?}"),
        };
        let bounds = (hint.lower(), hint.upper());
        seen.push(format!("{bounds:?}, at its end: {at_end}: {answer}"));
    }
    seen
}

/// Whether the handle is still there when the response is on its way, and from where.
#[derive(Clone, Copy, Debug)]
enum Handle {
    /// Dropped unseen: the layer takes no part in the body.
    Dropped,
    /// A clone lives on, so the layer watches the body.
    Kept,
}

fn answer_with(layer: &DeferLayer, body: Said, handle: Handle) -> Vec<String> {
    let kept = Rc::new(std::cell::RefCell::new(None));
    let keep = kept.clone();
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        if let Handle::Kept = handle {
            *keep.borrow_mut() = Defer::from_extensions(request.extensions()).ok();
        }
        let response = Response::builder()
            .status(StatusCode::IM_A_TEAPOT)
            .header("x-said", "yes")
            .body(body.clone());
        ready(response)
    }));
    let mut future = pin!(service.call(Request::new(())));
    let mut cx = Context::from_waker(Waker::noop());
    let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else {
        panic!("the service is ready at once");
    };
    assert_eq!(response.status(), StatusCode::IM_A_TEAPOT);
    assert_eq!(response.headers().len(), 1);
    seen(response.into_body())
}

#[test]
fn the_body_is_that_of_the_service() {
    let layer = DeferLayer::new();
    for (name, body) in bodies() {
        let expected = seen(body.clone());
        for handle in [Handle::Dropped, Handle::Kept] {
            let found = answer_with(&layer, body.clone(), handle);
            assert_eq!(found, expected, "{name}, handle {handle:?}");
        }
        // An inner layer as well.
        let twice = service_fn(move |_: Request<()>| {
            ready(Ok::<_, Infallible>(Response::new(body.clone())))
        });
        let mut service = layer.layer(DeferLayer::new().layer(twice));
        let mut future = pin!(service.call(Request::new(())));
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else {
            panic!("the service is ready at once");
        };
        assert_eq!(seen(response.into_body()), expected, "{name}, two layers");
    }
    assert_eq!(layer.get_executor().snapshot().open_requests, 0);
}

/// Not an `Error`, not `Send`, not `Display`: none of our business.
#[derive(Debug, PartialEq)]
struct Odd(Rc<u8>);

/// Ready at the third question, then broken.
#[derive(Clone)]
struct Moody {
    asked: u32,
}

impl<B> Service<Request<B>> for Moody {
    type Response = Response<Said>;
    type Error = Odd;
    type Future = Ready<Result<Response<Said>, Odd>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Odd>> {
        self.asked += 1;
        match self.asked {
            1 | 2 => Poll::Pending,
            3 => Poll::Ready(Ok(())),
            n => Poll::Ready(Err(Odd(Rc::new(n as u8)))),
        }
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        ready(Err(Odd(Rc::new(0))))
    }
}

#[test]
fn readiness_and_errors_are_those_of_the_service() {
    let mut service = DeferLayer::new().layer(Moody { asked: 0 });
    let mut cx = Context::from_waker(Waker::noop());
    // A request body of any type: neither `Send` nor a body.
    let mut ask = |service: &mut DeferService<Moody>| {
        Service::<Request<Rc<str>>>::poll_ready(service, &mut cx)
    };
    assert!(ask(&mut service).is_pending());
    // A clone is a clone of the inner service, with its state.
    let mut clone = service.clone();
    assert!(ask(&mut service).is_pending());
    assert_eq!(ask(&mut service), Poll::Ready(Ok(())));
    assert_eq!(ask(&mut service), Poll::Ready(Err(Odd(Rc::new(4)))));
    assert!(ask(&mut clone).is_pending());
    assert_eq!(ask(&mut clone), Poll::Ready(Ok(())));

    let mut future = pin!(clone.call(Request::new(Rc::<str>::from("any"))));
    let Poll::Ready(Err(error)) = future.as_mut().poll(&mut cx) else {
        panic!("it fails at once");
    };
    assert_eq!(error, Odd(Rc::new(0)));
}

#[test]
fn clones_share_their_executor() {
    let layer = DeferLayer::new();
    let hold = service_fn(|request: Request<()>| async move {
        std::future::pending::<()>().await;
        Ok::<_, Infallible>(Response::new(request.map(|()| String::new()).into_body()))
    });
    let mut service = layer.layer(hold);
    let mut other = service.clone();
    let open = || layer.get_executor().snapshot().open_requests;
    let (first, second) = (service.call(Request::new(())), other.call(Request::new(())));
    assert_eq!(open(), 2);
    drop((first, second));
    assert_eq!(open(), 0);
}

/// Compile-time: the inner error type is unchanged, whatever it is, and a body goes through that is
/// neither `Unpin` nor `Send`.
const _: fn() = || {
    fn same_error<S, E>()
    where
        S: Service<Request<()>, Response = Response<Said>, Error = E>,
        DeferService<S>: Service<Request<()>, Error = E>,
        DeferService<DeferService<S>>: Service<Request<()>, Error = E>,
    {
    }
    same_error::<Moody, Odd>();
};
