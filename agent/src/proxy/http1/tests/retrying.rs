//! What is tried again, and what is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nave_agent_core::directory::PortRules;
use nave_proto::ids::InstanceId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::harness::{Stage, crowd, narrow, read_head, within};

/// Of two endpoints each is asked first in half of the tries; that one is never asked in so many is not seen in a life.
const CHANCES: usize = 64;
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody";

#[tokio::test]
async fn what_was_never_sent_goes_elsewhere_whatever_it_is() {
    let mut stage = Stage::default();
    let (gone, there) = (stage.nobody(), stage.answering(OK).await);
    for ask in [GET, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"] {
        let mut caller = stage.call(&[gone, there], PortRules::default()).await;
        assert!(caller.ask(ask).await.starts_with("HTTP/1.1 200 OK"));
    }
}

#[tokio::test]
async fn an_endpoint_with_a_full_queue_is_asked_until_it_has_room() {
    let mut stage = Stage::default();
    let listener = narrow();
    let address = listener.local_addr().unwrap();
    let crowd = crowd(address).await;
    let rules =
        PortRules { connect_timeout: Duration::from_millis(30), retries_max: 0, ..PortRules::default() };
    let mut caller = stage.call(&[address], rules).await;
    caller.say(POST).await;
    within(async {
        while caller.route.meter.totals().retries == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(crowd);
    stage.serve(listener, |_, mut stream| async move {
        if read_head(&mut stream).await.is_some() {
            stream.write_all(OK.as_bytes()).await.unwrap();
        }
    });
    assert!(caller.hear_all().await.starts_with("HTTP/1.1 200 OK"));
}

#[tokio::test]
async fn a_connection_that_comes_free_is_taken_while_another_is_being_made() {
    let mut stage = Stage::default();
    let listener = narrow();
    let address = listener.local_addr().unwrap();
    let rules = PortRules { connect_timeout: Duration::from_secs(300), ..PortRules::default() };
    let mut first = stage.call(&[address], rules).await;
    first.say("GET /first HTTP/1.1\r\nHost: web\r\n\r\n").await;
    let (mut served, _) = within(listener.accept()).await.unwrap();
    assert!(within(read_head(&mut served)).await.unwrap().starts_with("GET /first "));
    let _crowd = crowd(address).await;
    let route = first.route.clone();
    let mut second = stage.call_route(&route).await;
    second.say("GET /second HTTP/1.1\r\nHost: web\r\n\r\n").await;
    within(async {
        while route.balancer.in_flight(InstanceId(0)) < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    served.write_all(OK.as_bytes()).await.unwrap();
    assert_eq!(first.hear(OK.len()).await, OK);
    assert!(within(read_head(&mut served)).await.unwrap().starts_with("GET /second "));
    served.write_all(OK.as_bytes()).await.unwrap();
    assert_eq!(second.hear(OK.len()).await, OK);
}

#[tokio::test]
async fn a_body_is_sent_again_with_its_head() {
    let mut stage = Stage::default();
    let gone = stage.nobody();
    let echo = stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            let mut body = [0; 4];
            stream.read_exact(&mut body).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n").await.unwrap();
            stream.write_all(&body).await.unwrap();
        })
        .await;
    let mut caller = stage.call(&[gone, gone, echo], PortRules::default()).await;
    assert!(caller.ask(POST).await.ends_with("\r\n\r\nbody"));
}

#[tokio::test]
async fn only_what_may_be_done_twice_is_sent_twice() {
    let mut stage = Stage::default();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let dropping = stage
        .endpoint(move |_, mut stream| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                read_head(&mut stream).await;
            }
        })
        .await;
    let there = stage.answering(OK).await;
    let met = || asked.load(Ordering::Relaxed);
    for _ in 0..CHANCES {
        let mut caller = stage.call(&[dropping, there], PortRules::default()).await;
        assert!(caller.ask(GET).await.starts_with("HTTP/1.1 200 OK"));
    }
    assert!(met() > 0, "it was never asked");
    for _ in 0..CHANCES {
        let before = met();
        let mut caller = stage.call(&[dropping, there], PortRules::default()).await;
        let heard = caller.ask(POST).await;
        if met() == before {
            continue;
        }
        assert!(heard.starts_with("HTTP/1.1 502 Bad Gateway"), "{heard}");
        assert!(heard.contains("i-0: it closed the connection without an answer"), "{heard}");
        return;
    }
    panic!("it was never asked");
}

#[tokio::test]
async fn an_endpoint_that_is_unwell_is_passed_over() {
    let mut stage = Stage::default();
    let unwell = stage.answering("HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy").await;
    let there = stage.answering(OK).await;
    for _ in 0..CHANCES {
        let mut caller = stage.call(&[unwell, there], PortRules::default()).await;
        assert!(caller.ask(GET).await.starts_with("HTTP/1.1 200 OK"));
    }
    let mut caller = stage.call(&[unwell], PortRules::default()).await;
    assert!(
        caller.ask(GET).await.ends_with("\r\n\r\nbusy"),
        "its own answer is passed on when there is no other"
    );
}

#[tokio::test]
async fn those_that_were_not_reached_leave_a_retry_for_one_that_is_unwell() {
    let mut stage = Stage::default();
    let (gone, there) = (stage.nobody(), stage.answering(OK).await);
    let unwell = stage.answering("HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy").await;
    let rules = PortRules { retries_max: 1, ..PortRules::default() };
    for _ in 0..CHANCES {
        let mut caller = stage.call(&[gone, gone, unwell, there], rules.clone()).await;
        assert!(caller.ask(GET).await.starts_with("HTTP/1.1 200 OK"));
    }
}

#[tokio::test]
async fn a_connection_that_the_endpoint_closed_meanwhile_is_not_used() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            // Says nothing of closing, and closes.
            stream.write_all(OK.as_bytes()).await.unwrap();
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    for _ in 0..20 {
        caller.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        assert_eq!(caller.hear(OK.len()).await, OK);
    }
}

#[tokio::test]
async fn the_only_endpoint_is_asked_again_when_an_old_connection_ends_under_a_request() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(OK.as_bytes()).await.unwrap();
            // As an agent that is killed: the second was taken, and nothing comes.
            read_head(&mut stream).await;
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    for _ in 0..5 {
        caller.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        assert_eq!(caller.hear(OK.len()).await, OK);
    }
    let ejected = caller.route.balancer.view(crate::clock::monotonic())[0].ejected;
    assert!(!ejected, "old connections say nothing of it");
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
    assert_eq!(caller.hear(OK.len()).await, OK);
    let heard = caller.ask(POST).await;
    assert!(heard.contains("502 Bad Gateway") && heard.contains("it closed a waiting connection"), "{heard}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_made_whole() {
    let mut stage = Stage::default();
    let broken = stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart").await.unwrap();
        })
        .await;
    let there = stage.answering(OK).await;
    let mut broken_off = 0;
    for _ in 0..CHANCES {
        let mut caller = stage.call(&[broken, there], PortRules::default()).await;
        let heard = caller.ask(GET).await;
        broken_off += usize::from(heard.ends_with("\r\n\r\npart"));
        assert!(heard.ends_with("\r\n\r\npart") || heard.ends_with("\r\n\r\nok"), "{heard}");
    }
    assert!(broken_off > 0, "it was never asked");
}
