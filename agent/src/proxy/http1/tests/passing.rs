//! What goes through unharmed.

use nave_agent_core::directory::PortRules;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::harness::{Stage, read_head, within};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn requests_follow_each_other_on_one_connection_both_ways() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|number, mut stream| async move {
            let mut count = 0;
            while read_head(&mut stream).await.is_some() {
                count += 1;
                let body = format!("{number}/{count}");
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    for count in 1..=5 {
        caller.say("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        caller.hear_head().await;
        assert_eq!(caller.hear(3).await, format!("0/{count}"), "the endpoint's connection is used again");
    }
    let ask = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
    caller.say(&ask.repeat(3)).await;
    for count in 6..=8 {
        caller.hear_head().await;
        assert_eq!(caller.hear(3).await, format!("0/{count}"), "pipelined requests are answered in order");
    }
    let mut other = stage.call_route(&caller.route.clone()).await;
    other.say(ask).await;
    other.hear_head().await;
    assert_eq!(other.hear(3).await, "0/9", "callers share the endpoint's connections");
}

#[tokio::test]
async fn bodies_of_every_framing_go_both_ways() {
    let mut stage = Stage::default();
    let echo = stage
        .endpoint(|_, mut stream| async move {
            // Answers before it has read the body, as a server may, and then byte for byte.
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        })
        .await;
    let piece = "x".repeat(0xffff);
    let body = format!("{}0\r\nDigest: abc\r\n\r\n", format!("ffff\r\n{piece}\r\n").repeat(64));
    let mut caller = stage.call(&[echo], PortRules::default()).await;
    let head = "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
    let (mut read, mut write) = caller.stream.split();
    let say = async {
        write.write_all(head.as_bytes()).await.unwrap();
        write.write_all(body.as_bytes()).await.unwrap();
    };
    let hear = async {
        let mut heard = String::new();
        read.read_to_string(&mut heard).await.unwrap();
        heard
    };
    let ((), heard) = within(async { tokio::join!(say, hear) }).await;
    let (head, echoed) = heard.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"), "{head}");
    assert!(echoed == body, "{} bytes of {} came back", echoed.len(), body.len());
}

#[tokio::test]
async fn an_answer_that_ends_with_its_connection_closes_the_callers() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nto the end").await.unwrap();
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    let heard = caller.ask("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
    assert_eq!(heard, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end");
}

#[tokio::test]
async fn continue_is_said_by_the_endpoint() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|_, mut stream| async move {
            assert!(read_head(&mut stream).await.unwrap().contains("Expect: 100-continue"));
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
            let mut body = [0; 4];
            stream.read_exact(&mut body).await.unwrap();
            assert_eq!(&body, b"body");
            stream.write_all(OK.as_bytes()).await.unwrap();
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n").await;
    assert_eq!(caller.hear_head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    caller.say("body").await;
    assert_eq!(caller.hear(OK.len()).await, OK);
}

#[tokio::test]
async fn a_switch_of_protocols_becomes_a_tunnel() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|_, mut stream| async move {
            assert!(read_head(&mut stream).await.unwrap().contains("Connection: Upgrade\r\n"));
            let switch = b"HTTP/1.1 101 Go\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\nhello ";
            stream.write_all(switch).await.unwrap();
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\nearly ").await;
    assert!(caller.hear_head().await.contains("Upgrade: echo\r\n"));
    assert_eq!(caller.hear(12).await, "hello early ");
    caller.say("late").await;
    assert_eq!(caller.hear(4).await, "late");
    caller.stream.shutdown().await.unwrap();
    assert_eq!(caller.hear_all().await, "");
}

#[tokio::test]
async fn head_has_no_body_and_204_neither() {
    let mut stage = Stage::default();
    let long = stage.answering("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n").await;
    let mut caller = stage.call(&[long], PortRules::default()).await;
    for _ in 0..2 {
        caller.say("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(caller.hear_head().await.contains("Content-Length: 1000\r\n"));
    }
    let empty = stage.answering("HTTP/1.1 204 None\r\n\r\n").await;
    let mut caller = stage.call(&[empty], PortRules::default()).await;
    for _ in 0..2 {
        caller.say("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(caller.hear_head().await, "HTTP/1.1 204 None\r\n\r\n");
    }
}

#[tokio::test]
async fn an_early_answer_ends_the_request() {
    let mut stage = Stage::default();
    let endpoint = stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream
                .write_all(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .await
                .unwrap();
            // Reads on, so that the answer is not lost to a reset.
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.ok();
        })
        .await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nsome").await;
    assert!(caller.hear_head().await.starts_with("HTTP/1.1 413 No\r\n"));
    assert_eq!(caller.hear_all().await, "", "the rest of the body is not taken for a request");
}

#[tokio::test]
async fn a_caller_that_half_closes_is_answered() {
    let mut stage = Stage::default();
    let endpoint = stage.answering(OK).await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    caller.stream.shutdown().await.unwrap();
    assert_eq!(caller.hear_all().await, OK);
}

#[tokio::test]
async fn an_agent_that_ends_says_so_with_its_last_answer() {
    let mut stage = Stage::default();
    let endpoint = stage.answering(OK).await;
    let mut caller = stage.call(&[endpoint], PortRules::default()).await;
    caller.say("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(caller.hear(OK.len()).await, OK);
    stage.ending.cancel();
    caller.say("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(caller.hear_all().await.contains("Connection: close\r\n"));
}
