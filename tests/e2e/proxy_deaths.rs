//! Promise: a caller that uses a service's own address notices neither the death of an instance nor that of the agent,
//! but for the one call that it had under way there.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use nave_tests::cluster::SOON;
use nave_tests::machine::free_ports;
use nave_tests::nave::hello;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually};
use nix::sys::signal::Signal;
use parking_lot::Mutex;

use crate::deploy_and_serve::pid;

/// Each has one call under way at a time, so a death can cut as many calls as there are callers.
const CALLERS: usize = 3;

#[derive(Debug, Default)]
struct Counts {
    answered: AtomicUsize,
    /// Connected, and then half an answer: its head has left, so nobody can ask again.
    parted: AtomicUsize,
    /// Connected, and then nothing, or an answer that says why there is none.
    cut: AtomicUsize,
    /// No connection at all.
    refused: AtomicUsize,
    /// What came instead of each answer that was not whole.
    instead: Mutex<Vec<String>>,
}

impl Counts {
    fn not_whole(&self, answer: String, error: Option<std::io::Error>) {
        let begun = answer.starts_with("HTTP/1.1 200");
        let kind = if begun { &self.parted } else { &self.cut };
        kind.fetch_add(1, SeqCst);
        self.instead.lock().push(format!("{answer:?} {error:?}"));
    }

    fn broken(&self) -> usize {
        self.cut.load(SeqCst) + self.parted.load(SeqCst)
    }
}

/// As an instance speaks: plain bytes of a stream, which HTTP/1.1 is as well.
fn manifest(name: &str, protocol: &str, service_port: u16) -> String {
    format!(
        "name = \"{name}\"\ncommand = [\"{}\"]\ncount = 3\n\n[ports.main]\nprotocol = \"{protocol}\"\n\
         service_port = {service_port}\n\n[health]\nhttp = \"/ready\"\nport = \"main\"\ninterval = \"200ms\"\n",
        hello().display()
    )
}

fn call(address: SocketAddr, counts: &Counts) {
    let Ok(mut stream) = TcpStream::connect(address) else {
        counts.refused.fetch_add(1, SeqCst);
        return;
    };
    let mut answer = String::new();
    let asked = stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .and_then(|()| stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"))
        .and_then(|()| stream.read_to_string(&mut answer));
    if asked.is_ok() && answer.starts_with("HTTP/1.1 200") && answer.contains("hello from i-") {
        counts.answered.fetch_add(1, SeqCst);
    } else {
        counts.not_whole(answer, asked.err());
    }
}

/// What callers of each address see while `meanwhile` goes on.
fn under_load(addresses: [SocketAddr; 2], meanwhile: impl FnOnce(&[Counts; 2])) -> [Counts; 2] {
    let (counts, over) = (<[Counts; 2]>::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for (address, counts) in addresses.iter().zip(&counts) {
            for _ in 0..CALLERS {
                scope.spawn(|| {
                    while !over.load(SeqCst) {
                        call(*address, counts);
                    }
                });
            }
        }
        // Also when it panics the callers end.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| meanwhile(&counts)));
        over.store(true, SeqCst);
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
    counts
}

/// So many more calls of each.
fn answered_more(counts: &[Counts; 2], more: usize) {
    for one in counts {
        let before = one.answered.load(SeqCst);
        eventually("calls are answered", SOON, || one.answered.load(SeqCst) >= before + more);
    }
}

#[test]
fn callers_outlive_instances_and_the_agent() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let services = [("web", "http"), ("raw", "tcp")];
    for (name, protocol) in services {
        cluster.apply(&manifest(name, protocol, free_ports()), &["--wait"]).expect(0);
    }
    let addresses = services.map(|(name, _)| cluster.address(name));
    for address in addresses {
        eventually("the address answers", SOON, || match TcpStream::connect(address) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => false,
            Err(error) => panic!("{address}: {error}"),
        });
    }

    let [web, raw] = under_load(addresses, |counts| {
        answered_more(counts, 50);
        for (name, _) in services {
            let row = cluster.wait_ready(name, 3).remove(0);
            send(pid(&row), Signal::SIGKILL);
            answered_more(counts, 50);
        }
    });
    assert_eq!((web.refused.load(SeqCst), raw.refused.load(SeqCst)), (0, 0), "{web:?} {raw:?}");
    assert_eq!(web.cut.load(SeqCst), 0, "a GET may be asked twice, so it is: {web:?}");
    assert!(web.parted.load(SeqCst) <= CALLERS, "only answers that had begun there: {web:?}");
    assert!(raw.broken() <= CALLERS, "of streams only those that were under way there: {raw:?}");

    let counts = under_load(addresses, |counts| {
        answered_more(counts, 50);
        let agent = cluster.agents[0].agent_pid();
        send(agent, Signal::SIGKILL);
        eventually("another agent", SOON, || {
            cluster.agents[0].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
        });
        answered_more(counts, 50);
    });
    for counts in counts {
        assert_eq!(counts.refused.load(SeqCst), 0, "the keeper has the sockets too: {counts:?}");
        assert!(counts.broken() <= CALLERS, "only what was under way, once: {counts:?}");
    }
}
