//! Promise: a call that is wrong, or goes where nothing answers, ends in bounded time with a reason that is counted, and
//! harms no other.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::socket::{setsockopt, sockopt};

use crate::deploy_and_serve::get;
use crate::manifests::{python, web, web_with};

/// Takes every connection and says nothing, ever.
const MUTE: &str = r#"
import os, socket
listener = socket.create_server((os.environ["HOST"], int(os.environ["PORT"])), backlog=100)
taken = []
while True:
    taken.append(listener.accept()[0])
"#;

/// Heads and bodies that two readers could understand in two ways, or nobody at all.
const MALFORMED: [&str; 8] = [
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "GET / HTTP/1.1\nHost: a\n\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\x0d\x0a\x0d\x0a",
];

#[test]
fn what_is_wrong_ends_with_a_counted_reason_and_harms_no_other() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 2), &["--wait"]).expect(0);
    let impatient = "protocol = \"http\"\n\n[ports.main.calls]\ntry_timeout = \"300ms\"";
    cluster.apply(&python("mute", MUTE, impatient, ""), &["--wait"]).expect(0);
    let patient = "[ports.http.calls]\ntimeout = \"10s\"";
    cluster.apply(&web_with("none", 1, "", patient), &["--wait"]).expect(0);
    let [web, mute, none] = ["web", "mute", "none"].map(|name| cluster.address(name));
    cluster.nave(&["scale", "none", "0"]).expect(0);
    eventually("nobody is left", SOON, || cluster.ps("none").is_empty());
    eventually_some("it answers", SOON, || {
        asked(web, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").ok()
    });

    let (over, well, failed) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    let heard = asked(web, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
                    let count = if heard.is_ok_and(|heard| heard.starts_with("HTTP/1.1 200 ")) {
                        &well
                    } else {
                        &failed
                    };
                    count.fetch_add(1, SeqCst);
                }
            });
        }
        // Also when it panics the callers end.
        let ended = std::panic::catch_unwind(|| {
            // The slow ones first: they have ten seconds.
            let slow = slow_heads(web);
            refused_for_what_they_are(web);
            those_that_vanish(web);
            half_open_is_answered(web);
            nobody_answers(mute, none);
            for mut stream in slow {
                let heard = rest(&mut stream);
                assert!(heard.starts_with("HTTP/1.1 408 "), "{heard}");
            }
        });
        let before = well.load(SeqCst);
        eventually("others are answered", SOON, || well.load(SeqCst) > before + 20);
        over.store(true, SeqCst);
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
    assert_eq!(failed.load(SeqCst), 0, "of {} calls that were well", well.load(SeqCst));
    all_is_counted(&cluster);
}

fn connected(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the agent listens");
    stream.set_read_timeout(Some(SOON)).expect("a socket has a time-out");
    stream
}

/// All that comes until the connection ends.
fn rest(stream: &mut TcpStream) -> String {
    let mut heard = Vec::new();
    // What was heard before a reset counts.
    let _ends = stream.read_to_end(&mut heard);
    String::from_utf8_lossy(&heard).into_owned()
}

fn asked(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(request.as_bytes())?;
    Ok(rest(&mut stream))
}

/// Two hundred that have begun a head and say no more.
fn slow_heads(web: SocketAddr) -> Vec<TcpStream> {
    let begin = |_| {
        let mut stream = connected(web);
        stream.write_all(b"GET / HTTP/1.1\r\nHo").expect("it is taken");
        stream
    };
    (0..200).map(begin).collect()
}

fn refused_for_what_they_are(web: SocketAddr) {
    for bad in MALFORMED {
        let heard = asked(web, bad).expect("it is answered");
        assert!(heard.starts_with("HTTP/1.1 400 "), "{bad:?} -> {heard}");
        assert!(heard.contains("Nave-Refused: malformed\r\n"), "{heard}");
        assert_eq!(heard.matches("HTTP/1.1 ").count(), 1, "what follows is not a request: {heard}");
    }
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let heard = asked(web, &long).expect("it is answered");
    assert!(
        heard.starts_with("HTTP/1.1 431 ") && heard.contains("Nave-Refused: header_too_large"),
        "{heard}"
    );
}

/// In the middle of a body: some by an end, some by a reset.
fn those_that_vanish(web: SocketAddr) {
    for turn in 0..20 {
        let mut stream = connected(web);
        stream
            .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nten bytes.")
            .expect("it is taken");
        if turn % 2 == 0 {
            let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&stream, sockopt::Linger, &at_once).expect("a socket can linger");
        }
    }
}

/// A caller that has closed its half has asked all the same.
fn half_open_is_answered(web: SocketAddr) {
    let mut stream = connected(web);
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("it is taken");
    stream.shutdown(Shutdown::Write).expect("it is open");
    let heard = rest(&mut stream);
    assert!(heard.starts_with("HTTP/1.1 200 "), "{heard}");
}

fn nobody_answers(mute: SocketAddr, none: SocketAddr) {
    let heard = asked(mute, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    let heard = heard.expect("it is answered");
    assert!(heard.starts_with("HTTP/1.1 504 ") && heard.contains("mute"), "{heard}");
    let heard =
        asked(none, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("it is answered");
    assert!(heard.starts_with("HTTP/1.1 503 ") && heard.contains("none"), "{heard}");
}

fn all_is_counted(cluster: &Cluster) {
    let metrics = get(u64::from(cluster.agent_metrics_port(0)), "/metrics").expect("the agent counts");
    let counted = |service: &str, reason: &str| -> usize {
        let of = |line: &&str| {
            line.starts_with("nave_agent_proxy_refusals_total{")
                && line.contains(&format!("service=\"{service}\""))
                && line.contains(&format!("reason=\"{reason}\""))
        };
        let line = metrics.lines().find(of);
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    };
    let reasons = [
        ("web", "malformed", MALFORMED.len()),
        ("web", "header_too_large", 1),
        ("web", "header_timeout", 200),
        ("mute", "request_timeout", 1),
        ("none", "no_endpoint", 1),
    ];
    let found = reasons.map(|(service, reason, _)| (service, reason, counted(service, reason)));
    assert_eq!(found, reasons);
}
