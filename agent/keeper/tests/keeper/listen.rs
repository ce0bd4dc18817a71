//! What processes say of themselves while there is no agent: nobody waits, nothing that matters is lost, strangers are
//! not heard.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use nave_keeper::notice::{self, NOTICE_BYTES_MAX};
use nave_proto::pb;
use nix::sys::signal::Signal;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::PassCred;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;

use crate::harness::{Agent, Gate, Host, eventually, kill};

const NAME: &str = "notify/i-1";
/// Far more than a socket holds.
const BEATS: usize = 500;

/// A process that connects once, and at each gate speaks, waiting for room where there is none, and says that it is done.
struct Scene {
    host: Host,
    agent: Agent,
    gates: [Gate; 2],
    path: PathBuf,
    has_cgroup: bool,
}

impl Scene {
    fn start() -> Self {
        let mut host = Host::start();
        let mut agent = host.agent();
        let path = host.dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        setsockopt(&socket, PassCred, &true).unwrap();
        let speaker = Some(pb::Speaker { instance_id: 1, epoch: 1 });
        let store = Request::StoreDescriptor(pb::StoreDescriptor { name: NAME.to_owned(), speaker });
        agent.client.request(store, Some(socket.as_fd())).unwrap();
        let gates = [host.gate("first"), host.gate("second")];
        let speaks = |said: &str, gate: &Gate| {
            format!(
                "subprocess.run(['sh', '-c', '''{}'''])\n{said}\nprint('done', flush=True)\n",
                gate.wait()
            )
        };
        let program = format!(
            "import socket, subprocess\ns = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
             s.connect('{}')\nprint('up', flush=True)\n{}{}import time\ntime.sleep(1000)",
            path.display(),
            speaks(&format!("s.send(b'READY=1')\nfor _ in range({BEATS}): s.send(b'WATCHDOG=1')"), &gates[0]),
            speaks("s.send(b'STATUS=second')", &gates[1]),
        );
        let spawn = pb::Spawn {
            argv: ["python3".to_owned(), "-c".to_owned(), program].to_vec(),
            ..host.script(1, "")
        };
        agent.spawn(&spawn);
        host.line(1, "up");
        Self { host, agent, gates, path, has_cgroup: !spawn.cgroup2.is_empty() }
    }

    fn done(&self, times: usize) {
        eventually("it has spoken", || {
            let log = self.host.log(1);
            (log.iter().filter(|line| line.ends_with("done")).count() == times).then_some(())
        });
    }

    /// What the keeper has heard, and the socket.
    fn take(&mut self) -> (String, UnixDatagram) {
        self.agent = self.host.agent();
        let take = Request::TakeDescriptor(pb::TakeDescriptor { name: NAME.to_owned() });
        let (reply, socket) = self.agent.client.request(take, None).unwrap();
        let Reply::Done(done) = reply else { panic!("{reply:?}") };
        (String::from_utf8(done.heard).unwrap(), UnixDatagram::from(socket.unwrap()))
    }
}

#[test]
fn what_is_said_without_an_agent_holds_up_nobody_and_is_heard_by_the_next() {
    let mut scene = Scene::start();
    // It takes the place of the one before, and its end leaves nobody.
    drop(scene.host.agent());
    let stranger = UnixDatagram::unbound().unwrap();
    stranger.send_to(b"STATUS=of a stranger", &scene.path).unwrap();
    scene.gates[0].open();
    scene.done(1);
    let (heard, socket) = scene.take();
    let ours = heard.lines().filter(|line| !line.starts_with("STATUS")).collect::<Vec<_>>();
    let mut buffer = [0; NOTICE_BYTES_MAX];
    // What came last may have been on its way.
    while let Ok(notice) = notice::take(socket.as_fd(), &mut buffer) {
        assert_eq!(&buffer[..notice.length], b"WATCHDOG=1");
    }
    assert_eq!(ours, ["READY=1", "WATCHDOG=1"]);
    assert!(!scene.has_cgroup || !heard.contains("stranger"), "{heard}");

    // From now on it is the agent's.
    scene.gates[1].open();
    scene.done(2);
    scene.agent.client.list().unwrap();
    let notice = notice::take(socket.as_fd(), &mut buffer).unwrap();
    assert_eq!(&buffer[..notice.length], b"STATUS=second");
    assert!(notice.sender.is_some());
    let (heard, _) = scene.take();
    assert_eq!(heard, "", "nothing is heard twice");
}

#[test]
fn it_is_heard_also_while_the_keeper_becomes_another() {
    let mut scene = Scene::start();
    drop(scene.host.agent());
    let mut visitor = scene.host.connect();
    scene.gates[0].open();
    scene.done(1);
    kill(scene.host.keeper_pid(), Signal::SIGUSR2);
    eventually("the old image's end", || visitor.list().is_err().then_some(()));
    scene.gates[1].open();
    scene.done(2);
    let (heard, socket) = scene.take();
    let mut heard: Vec<String> = heard.lines().map(str::to_owned).collect();
    let mut buffer = [0; NOTICE_BYTES_MAX];
    while let Ok(notice) = notice::take(socket.as_fd(), &mut buffer) {
        heard.push(String::from_utf8(buffer[..notice.length].to_vec()).unwrap());
    }
    heard.dedup();
    assert_eq!(heard, ["READY=1", "WATCHDOG=1", "STATUS=second"]);
}
