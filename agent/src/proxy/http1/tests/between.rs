//! Requests from one host to another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nave_agent_core::balancer::Reach;
use nave_agent_core::directory::{EndpointState, Protocol};
use nave_proto::ids::{HostId, InstanceId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

use super::harness::{Caller, Stage, read_head};
use crate::proxy::two_hosts::{FAR, TwoHosts, endpoint, local, remote};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\nbody";
struct Hosts {
    stage: Stage,
    hosts: TwoHosts,
}

impl Hosts {
    /// `shown`: which host the far agent's certificate is of.
    async fn new(shown: HostId) -> Self {
        Self { stage: Stage::default(), hosts: TwoHosts::new(shown, Protocol::Http).await }
    }

    async fn call(&mut self) -> Caller {
        self.stage.call_route(&self.hosts.near).await
    }
}

impl std::ops::Deref for Hosts {
    type Target = TwoHosts;

    fn deref(&self) -> &TwoHosts {
        &self.hosts
    }
}

#[tokio::test]
async fn a_call_crosses_with_its_callers_name_on_connections_that_are_shared() {
    let mut hosts = Hosts::new(FAR).await;
    let there = hosts
        .stage
        .endpoint(|number, mut stream| async move {
            while let Some(head) = read_head(&mut stream).await {
                assert!(head.contains("Nave-Caller: unknown\r\n") && !head.contains("Nave-To"), "{head}");
                let mut body = [0; 4];
                stream.read_exact(&mut body).await.unwrap();
                assert_eq!(&body, b"body");
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{number}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        })
        .await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    for _ in 0..3 {
        let mut caller = hosts.call().await;
        for _ in 0..3 {
            caller.say(POST).await;
            caller.hear_head().await;
            assert_eq!(caller.hear(1).await, "0", "the endpoint sees one connection");
        }
    }
    assert_eq!(hosts.far.balancer.in_flight(InstanceId(1)), 0);
}

#[tokio::test]
async fn a_body_larger_than_any_buffer_crosses_both_ways() {
    let mut hosts = Hosts::new(FAR).await;
    let echo = hosts
        .stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n").await.unwrap();
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        })
        .await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, echo)]);
    let mut caller = hosts.call().await;
    let (mut read, mut write) = caller.stream.split();
    let say = async {
        write.write_all(b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4000000\r\n\r\n").await.unwrap();
        write.write_all(&vec![b'x'; 4_000_000]).await.unwrap();
    };
    let hear = async {
        let mut heard = vec![0; 4_000_000 + "HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n".len()];
        read.read_exact(&mut heard).await.unwrap();
        assert!(heard.ends_with(b"xxxx"));
    };
    super::harness::within(async { tokio::join!(say, hear) }).await;
}

#[tokio::test]
async fn what_reached_no_process_there_goes_elsewhere_whatever_it_is() {
    let mut hosts = Hosts::new(FAR).await;
    let here = hosts.stage.answering(OK).await;
    let gone = hosts.stage.nobody();
    for there in [vec![], vec![local(1, gone)]] {
        hosts.far.update(there);
        hosts.near.update(vec![remote(1), local(2, here)]);
        for _ in 0..8 {
            let mut caller = hosts.call().await;
            caller.say("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n").await;
            assert_eq!(caller.hear(OK.len()).await, OK);
        }
        hosts.near.update(vec![remote(1)]);
        let mut caller = hosts.call().await;
        caller.say(GET).await;
        let head = caller.hear_head().await;
        assert!(head.starts_with("HTTP/1.1 503 ") && !head.contains("Nave-Not-Processed"), "{head}");
    }
}

#[tokio::test]
async fn an_instance_that_is_not_ready_is_stood_in_for_on_its_host() {
    let mut hosts = Hosts::new(FAR).await;
    let there = hosts.stage.answering(OK).await;
    let gone = hosts.stage.nobody();
    hosts.near.update(vec![remote(1)]);
    let draining = endpoint(1, Reach::Local(gone), EndpointState::Draining);
    hosts.far.update(vec![draining, local(2, there)]);
    let mut caller = hosts.call().await;
    caller.say(GET).await;
    assert_eq!(caller.hear(OK.len()).await, OK);
}

#[tokio::test]
async fn the_callees_agent_keeps_the_list() {
    let mut hosts = Hosts::new(FAR).await;
    let there = hosts.stage.answering(OK).await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    hosts.far.set_allow(Some(vec!["jobs".to_owned()]));
    let mut caller = hosts.call().await;
    caller.say(GET).await;
    let head = caller.hear_head().await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
}

#[tokio::test]
async fn an_agent_that_ends_loses_no_request_and_does_none_twice() {
    const POSTS: usize = 400;
    let mut hosts = Hosts::new(FAR).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let there = hosts
        .stage
        .endpoint(move |_, mut stream| {
            let counted = counted.clone();
            async move {
                while read_head(&mut stream).await.is_some() {
                    stream.read_exact(&mut [0; 4]).await.unwrap();
                    counted.fetch_add(1, Ordering::Relaxed);
                    stream.write_all(OK.as_bytes()).await.unwrap();
                }
            }
        })
        .await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    let (mut caller, done) = (hosts.call().await, CancellationToken::new());
    let posts = async {
        for post in 0..POSTS {
            caller.say(POST).await;
            let head = caller.hear_head().await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{post}: {head}");
            caller.hear(2).await;
        }
        done.cancel();
    };
    let restarts = async {
        let mut pause = 0;
        while !done.is_cancelled() {
            hosts.hosts.restart();
            pause = (pause + 37) % 211; // now between requests, now within one
            for _ in 0..100 + pause {
                tokio::task::yield_now().await;
            }
        }
    };
    super::harness::within(async { tokio::join!(posts, restarts) }).await;
    assert_eq!(asked.load(Ordering::Relaxed), POSTS);
}

#[tokio::test]
async fn what_an_endpoint_there_has_had_is_not_sent_again_whatever_became_of_it() {
    let mut hosts = Hosts::new(FAR).await;
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n";
    for answer in ["", head, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbroken"] {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = asked.clone();
        let there = hosts
            .stage
            .endpoint(move |_, mut stream| {
                counted.fetch_add(1, Ordering::Relaxed);
                async move {
                    read_head(&mut stream).await.unwrap();
                    stream.read_exact(&mut [0; 4]).await.unwrap();
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            })
            .await;
        for number in 0..20 {
            hosts.near.update(vec![remote(number)]);
            hosts.far.update(vec![local(number, there)]);
            let mut caller = hosts.call().await;
            caller.say(POST).await;
            caller.stream.shutdown().await.unwrap();
            assert!(!caller.hear_all().await.ends_with("ok"));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 20);
    }
}

#[tokio::test]
async fn an_agent_of_another_host_is_not_spoken_to() {
    let mut hosts = Hosts::new(HostId(3)).await;
    let there = hosts.stage.answering(OK).await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    let mut caller = hosts.call().await;
    caller.say(GET).await;
    assert!(caller.hear_head().await.starts_with("HTTP/1.1 503 "));
}
