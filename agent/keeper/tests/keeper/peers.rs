//! Who may ask what, descriptors, and shutting down.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use nave_keeper::client::{ClientError, connect, socket_path};
use nave_proto::pb;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;

use crate::harness::{Host, runs};

#[test]
fn a_new_hello_replaces_the_agent_and_others_may_only_look() {
    let mut host = Host::start();
    let mut first = host.agent();
    let service = first.spawn(&host.script(1, "exec sleep 1000"));
    let mut visitor = host.connect();
    assert_eq!(visitor.list().unwrap().len(), 1);
    let refused = visitor.request(Request::ListDescriptors(pb::ListDescriptors {}), None).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(_)), "{refused}");
    let mut second = host.agent();
    assert_eq!(second.kept(1).unwrap().process.unwrap().pid, service);
    let cut = first.client.list().unwrap_err();
    assert!(matches!(cut, ClientError::Io(_)), "{cut}");
}

#[test]
fn what_a_newer_agent_asks_is_answered_unsupported() {
    let host = Host::start();
    host.agent();
    let mut stream = connect(&socket_path(&host.data_dir())).unwrap();
    // KeeperRequest { id: 9, <field 99>: {} }
    let body = [0x08, 9, 0x9a, 0x06, 0];
    stream.write_all(&u32::try_from(body.len()).unwrap().to_le_bytes()).unwrap();
    stream.write_all(&body).unwrap();
    let mut frame = [0; 8];
    stream.read_exact(&mut frame).unwrap();
    // KeeperReply { id: 9, unsupported: {} }
    assert_eq!(frame, [4, 0, 0, 0, 0x08, 9, 0x42, 0]);
}

#[test]
fn garbage_is_cut_off_and_harms_nobody() {
    let host = Host::start();
    let mut agent = host.agent();
    let mut stream = connect(&socket_path(&host.data_dir())).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    assert!(agent.client.list().unwrap().is_empty());
}

#[test]
fn descriptors_outlive_the_agent() {
    let host = Host::start();
    let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut agent = host.agent();
    let store =
        |name: &str| Request::StoreDescriptor(pb::StoreDescriptor { name: name.to_owned(), speaker: None });
    agent.client.request(store("listen/web"), Some(far.as_fd())).unwrap();
    let without = agent.refused(store("nothing"));
    assert_eq!(without.kind(), pb::KeeperErrorKind::Invalid);
    drop((agent, far));
    let mut agent = host.agent();
    let Reply::Descriptors(list) = agent.ask(Request::ListDescriptors(pb::ListDescriptors {})).unwrap()
    else {
        panic!("no list")
    };
    assert_eq!(list.names, ["listen/web"]);
    for word in ["one", "two"] {
        let take = Request::TakeDescriptor(pb::TakeDescriptor { name: "listen/web".to_owned() });
        let (_, taken) = agent.client.request(take, None).unwrap();
        let mut taken = std::os::unix::net::UnixStream::from(taken.unwrap());
        taken.write_all(word.as_bytes()).unwrap();
        let mut read = [0; 3];
        near.read_exact(&mut read).unwrap();
        assert_eq!(read, word.as_bytes());
    }
    agent.done(Request::DropDescriptor(pb::DropDescriptor { name: "listen/web".to_owned() }));
    assert_eq!(near.read(&mut [0; 1]).unwrap(), 0, "the last copy is closed");
}

#[test]
fn a_second_keeper_says_who_holds_the_directory() {
    let host = Host::start();
    host.agent();
    let second = std::process::Command::new(crate::harness::PROGRAM)
        .arg("keeper")
        .arg(host.data_dir())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains(&format!("already held by the keeper with pid {}", host.keeper_pid())), "{said}");
    assert!(host.agent().client.list().unwrap().is_empty(), "the first goes on");
}

#[test]
fn shutting_down_stops_services_and_what_they_left() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let polite = host.script(1, "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done");
    let stubborn =
        host.script(2, "trap '' TERM; (setsid sleep 1000 &); echo up; while :; do sleep 0.05; done");
    let cgroups = [polite.cgroup2.clone(), stubborn.cgroup2.clone()];
    let pids = [agent.spawn(&polite), agent.spawn(&stubborn)];
    host.line(1, "up");
    host.line(2, "up");
    host.connect().shutdown(true, Duration::from_millis(300)).unwrap();
    assert_eq!(host.keeper_ends(), 0);
    assert!(pids.iter().all(|pid| !runs(*pid)));
    for dir in cgroups.iter().filter(|dir| !dir.is_empty()) {
        assert!(!std::path::Path::new(dir).exists(), "{dir}");
    }
    // The next agent hears how they ended.
    host.start_keeper(&[] as &[&str]);
    let mut agent = host.agent();
    let (polite, stubborn) = (agent.exit(1), agent.exit(2));
    assert_eq!((polite.cause(), polite.signal), (pb::ExitCause::Operator, 0));
    assert_eq!((stubborn.cause(), stubborn.signal), (pb::ExitCause::Operator, libc::SIGKILL));
    host.line(1, "bye");
}
