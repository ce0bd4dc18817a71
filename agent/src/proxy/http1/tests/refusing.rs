//! What ends in bounded time, with a reason.

use std::time::Duration;

use nave_agent_core::directory::PortRules;
use tokio::io::AsyncWriteExt as _;

use super::harness::{Stage, read_head, within};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";

#[tokio::test]
async fn nobody_left_is_said_with_all_that_was_tried() {
    let mut stage = Stage::default();
    let gone = [stage.nobody(), stage.nobody()];
    let mut caller = stage.call(&gone, PortRules::default()).await;
    caller.say(GET).await;
    let head = caller.hear_head().await;
    assert!(head.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{head}");
    assert!(!head.contains("Connection: close"), "the caller may ask again on the same connection");
    let length =
        head.split_once("Content-Length: ").unwrap().1.split_once("\r\n").unwrap().0.parse().unwrap();
    let text = caller.hear(length).await;
    assert!(
        text.contains("i-0: it cannot be reached") && text.contains("i-1: it cannot be reached"),
        "{text}"
    );
}

#[tokio::test]
async fn smuggling_shapes_reach_nobody() {
    let mut stage = Stage::default();
    let never = stage.endpoint(|_, _| async { panic!("a refused request was sent") }).await;
    for bad in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n",
    ] {
        let mut caller = stage.call(&[never], PortRules::default()).await;
        let heard = caller.ask(bad).await;
        assert!(heard.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{bad:?} -> {heard}");
        assert!(
            heard.contains("Nave-Refused: malformed\r\n") && heard.contains("Connection: close\r\n"),
            "{heard}"
        );
    }
}

#[tokio::test]
async fn a_head_without_end_or_in_no_hurry_is_refused() {
    let mut stage = Stage::default();
    let endpoint = stage.answering(OK).await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    let heard = caller.ask(&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(70_000))).await;
    assert!(heard.starts_with("HTTP/1.1 431 "), "{heard}");
    let rules = PortRules { header_timeout: Duration::from_millis(50), ..PortRules::default() };
    let mut caller = stage.call(&[endpoint], rules).await;
    let heard = caller.ask("GET / HTTP/1.1\r\nHo").await;
    assert!(heard.starts_with("HTTP/1.1 408 "), "{heard}");
}

#[tokio::test]
async fn an_endpoint_that_takes_the_request_and_says_nothing_is_given_up() {
    let mut stage = Stage::default();
    let mute =
        stage.endpoint(|_, mut stream| async move { while read_head(&mut stream).await.is_some() {} }).await;
    let rules = PortRules { request_timeout: Some(Duration::from_millis(50)), ..PortRules::default() };
    let mut caller = stage.call(&[mute], rules).await;
    caller.say(GET).await;
    let head = caller.hear_head().await;
    assert!(head.starts_with("HTTP/1.1 504 Gateway Timeout\r\n"), "{head}");
    let there = stage.answering(OK).await;
    let rules = PortRules { try_timeout: Some(Duration::from_millis(50)), ..PortRules::default() };
    let mut caller = stage.call(&[mute, there], rules).await;
    caller.say(GET).await;
    assert_eq!(caller.hear(OK.len()).await, OK, "one that may be repeated goes elsewhere");
}

#[tokio::test]
async fn nonsense_is_not_passed_on() {
    let mut stage = Stage::default();
    for answer in [
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ] {
        let endpoint = stage.answering(answer).await;
        let mut caller = stage.call(&[endpoint], PortRules::default()).await;
        let heard = caller.ask("POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
        assert!(heard.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer:?} -> {heard}");
    }
}

#[tokio::test]
async fn a_caller_that_vanishes_ends_its_request() {
    let mut stage = Stage::default();
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let endpoint = stage
        .endpoint(move |_, mut stream| {
            let tell = tell.clone();
            async move {
                read_head(&mut stream).await.unwrap();
                tell.send("asked").await.unwrap();
                assert_eq!(read_head(&mut stream).await, None);
                tell.send("ended").await.unwrap();
            }
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nsome").await;
    assert_eq!(within(told.recv()).await, Some("asked"));
    drop(caller);
    assert_eq!(within(told.recv()).await, Some("ended"));
}

#[tokio::test]
async fn a_waiting_caller_is_let_go_after_its_time() {
    let mut stage = Stage::default();
    let endpoint = stage.answering(OK).await;
    let rules = PortRules { idle_timeout: Duration::from_millis(50), ..PortRules::default() };
    let mut caller = stage.call(&[endpoint], rules).await;
    caller.say(GET).await;
    assert_eq!(caller.hear(OK.len()).await, OK);
    assert_eq!(caller.hear_all().await, "");
    caller.stream.shutdown().await.ok();
}
