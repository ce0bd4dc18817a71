//! Agents come and go, a process speaks on.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::time::Duration;

use nave_agent_core::supervisor::Notification;
use tempfile::TempDir;

use super::*;
use crate::keeper::shelf::Shelf;

const INSTANCE: InstanceId = InstanceId(42);
const SOON: Duration = Duration::from_secs(20);

fn name(attempt: u32, way: Way) -> EarName {
    EarName { instance: INSTANCE, key: ProcessKey { epoch: 1, attempt }, way }
}

/// A host: its keeper, and where the sockets are.
struct Scene {
    _dir: TempDir,
    sockets: NotifySockets,
    shelf: Shelf,
}

/// One agent's ears.
struct Agent {
    tasks: NotifyTasks,
    said: mpsc::Receiver<Said>,
    inputs: mpsc::Receiver<(InstanceId, Input)>,
    keeper: KeeperHandle,
    _connection: JoinSet<()>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sockets = NotifySockets::new(dir.path().join("notify"));
        Self { _dir: dir, sockets, shelf: Shelf::default() }
    }

    fn agent(&self) -> Agent {
        let (said, said_inbox) = mpsc::channel(4);
        let (inputs, inbox) = mpsc::channel(4);
        let mut connection = JoinSet::new();
        let keeper = self.shelf.connect(&mut connection);
        let tasks = NotifyTasks::new(keeper.clone(), Ears::default(), said, inputs);
        Agent { tasks, said: said_inbox, inputs: inbox, keeper, _connection: connection }
    }

    /// An agent that has started this process and hears it.
    async fn started(&self, name: EarName) -> Agent {
        let mut agent = self.agent();
        agent.tasks.make(&self.sockets, name, &Speaker::default()).unwrap();
        agent.tasks.ears().keep(&agent.keeper, name).await.unwrap();
        agent.tasks.hear(&self.sockets, name, Speaker::default());
        agent
    }

    /// The next agent, which finds this process.
    fn next(&self, name: EarName) -> Agent {
        let mut agent = self.agent();
        agent.tasks.hear(&self.sockets, name, Speaker::default());
        agent
    }

    /// A process that has connected once.
    fn process(&self) -> UnixDatagram {
        let process = UnixDatagram::unbound().unwrap();
        process.connect(self.sockets.path(INSTANCE)).unwrap();
        process
    }
}

impl Agent {
    async fn said(&mut self) -> Said {
        tokio::time::timeout(SOON, self.said.recv()).await.unwrap().unwrap()
    }

    /// What is said next; it is in the ledger then.
    async fn hears(&mut self) -> Vec<Notification> {
        let said = self.said().await;
        // Of what need not be there nobody asks.
        said.noted.send(()).ok();
        said.messages
    }

    /// It ends, and all that it had open is closed.
    async fn ends(mut self) {
        self.tasks.tasks.shutdown().await;
    }
}

fn status(text: &str) -> Vec<Notification> {
    vec![Notification::Status(text.to_owned())]
}

#[tokio::test]
async fn what_a_process_says_reaches_the_main_loop_with_its_key() {
    let scene = Scene::new();
    let mut agent = scene.agent();
    for attempt in 1..=2 {
        let name = name(attempt, Way::Socket);
        let before = agent.tasks.make(&scene.sockets, name, &Speaker::default()).unwrap();
        assert_eq!(before.len(), usize::from(attempt == 2), "that of the attempt before");
        agent.tasks.hear(&scene.sockets, name, Speaker::default());
        scene.process().send(b"READY=1").unwrap();
        let said = agent.said().await;
        assert_eq!((said.instance, said.key, said.messages), (INSTANCE, name.key, vec![Notification::Ready]));
        said.noted.send(()).unwrap();
    }
    assert_eq!(agent.tasks.stop(&scene.sockets, INSTANCE, 0), []);
    assert_eq!(agent.tasks.stop(&scene.sockets, INSTANCE, 1), [name(2, Way::Socket)]);
    assert!(!scene.sockets.path(INSTANCE).exists());
}

#[tokio::test]
async fn a_process_that_connects_once_is_heard_by_every_agent_and_nothing_is_lost_between_them() {
    let scene = Scene::new();
    let name = name(1, Way::Socket);
    let mut agent = scene.started(name).await;
    let process = scene.process();
    process.send(b"STATUS=first").unwrap();
    assert_eq!(agent.hears().await, status("first"));
    agent.ends().await;

    process.send(b"READY=1").unwrap();
    let mut agent = scene.next(name);
    assert_eq!(agent.hears().await, [Notification::Ready]);
    process.send(b"STATUS=second").unwrap();
    assert_eq!(agent.hears().await, status("second"));
    agent.inputs.try_recv().expect_err("it was never out of hearing");

    // Another keeper, which has nothing, gets it from the agent that goes on.
    let other = Scene { shelf: Shelf::default(), ..scene };
    let ears = agent.tasks.ears();
    agent.ends().await;
    let mut agent = other.agent();
    agent.tasks.ears = ears;
    agent.tasks.hear(&other.sockets, name, Speaker::default());
    process.send(b"STATUS=third").unwrap();
    assert_eq!(agent.hears().await, status("third"));
    assert_eq!(other.shelf.names(), ["notify/i-42/1.1/socket"]);
}

#[tokio::test]
async fn what_is_not_in_the_ledger_is_said_to_the_next_agent_again() {
    let scene = Scene::new();
    let name = name(1, Way::Socket);
    let mut agent = scene.started(name).await;
    let process = scene.process();
    process.send(b"READY=1").unwrap();
    process.send(b"STOPPING=1").unwrap();
    assert_eq!(agent.said().await.messages, [Notification::Ready]);
    agent.ends().await;
    let mut agent = scene.next(name);
    assert_eq!(agent.hears().await, [Notification::Ready]);
    let said = agent.said().await;
    assert_eq!(said.messages, [Notification::Stopping], "one at a time");
    agent.ends().await;
    let mut agent = scene.next(name);
    assert_eq!(agent.hears().await, [Notification::Stopping]);
}

#[tokio::test]
async fn one_that_feeds_its_watchdog_waits_for_no_ledger() {
    let scene = Scene::new();
    let mut agent = scene.started(name(1, Way::Socket)).await;
    let process = scene.process();
    for _ in 0..3 {
        process.send(b"WATCHDOG=1\nSTATUS=well").unwrap();
    }
    let mut said = Vec::new();
    for _ in 0..3 {
        said.push(agent.said().await);
    }
    assert!(said.iter().all(|said| said.messages[0] == Notification::Watchdog));
}

#[tokio::test]
async fn what_the_keeper_has_heard_comes_first() {
    let scene = Scene::new();
    let name = name(1, Way::Socket);
    let agent = scene.started(name).await;
    let process = scene.process();
    agent.ends().await;
    scene.shelf.hears(&name.to_string(), b"READY=1\nWATCHDOG=1");
    process.send(b"STATUS=later").unwrap();
    let mut agent = scene.next(name);
    assert_eq!(agent.hears().await, [Notification::Ready, Notification::Watchdog]);
    assert_eq!(agent.hears().await, status("later"));
}

#[tokio::test]
async fn where_nobody_has_kept_it_there_is_a_new_one_and_that_is_told() {
    let scene = Scene::new();
    let name = name(1, Way::Socket);
    let mut agent = scene.next(name);
    let told = tokio::time::timeout(SOON, agent.inputs.recv()).await.unwrap();
    assert_eq!(told, Some((INSTANCE, Input::Unheard { key: name.key })));
    scene.process().send(b"READY=1").unwrap();
    assert_eq!(agent.hears().await, [Notification::Ready]);
    assert_eq!(scene.shelf.names(), [name.to_string()], "the next agent has it");
}

#[tokio::test]
async fn a_stranger_is_not_heard_whatever_it_sends_and_a_barrier_is_opened_when_all_is_noted() {
    let scene = Scene::new();
    let name = name(1, Way::Socket);
    let agent = scene.started(name).await;
    let process = scene.process();
    agent.ends().await;
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let is_open = || (&near).write_all(b"?").is_ok();
    nave_keeper::client::send(process.as_fd(), b"READY=1\nBARRIER=1", &[far.as_fd()]).unwrap();
    drop(far);
    let mut agent = scene.agent();
    // This test is in no cgroup of that name.
    let group = Some("i-42-1".to_owned());
    agent.tasks.hear(&scene.sockets, name, Speaker { group, owner: None });
    let closed = async {
        while is_open() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(SOON, closed).await.unwrap();
    agent.said.try_recv().unwrap_err();
    agent.ends().await;

    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    nave_keeper::client::send(process.as_fd(), b"READY=1\nBARRIER=1", &[far.as_fd()]).unwrap();
    drop(far);
    let mut agent = scene.next(name);
    let said = agent.said().await;
    (&near).write_all(b"?").unwrap();
    said.noted.send(()).unwrap();
    let closed = async {
        while (&near).write_all(b"?").is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(SOON, closed).await.unwrap();
}

#[tokio::test]
async fn a_line_on_the_fifo_says_that_a_process_is_ready_and_no_part_of_one_does() {
    let scene = Scene::new();
    let name = name(1, Way::Line);
    let mut agent = scene.started(name).await;
    let open = || OpenOptions::new().read(true).write(true).open(scene.sockets.fifo(INSTANCE)).unwrap();
    let mut process = open();
    process.write_all(b"almost").unwrap();
    tokio::time::timeout(Duration::from_millis(50), agent.said.recv()).await.unwrap_err();
    process.write_all(b" there\n").unwrap();
    assert_eq!(agent.said().await.messages, [Notification::Ready]);
    agent.ends().await;
    let mut agent = scene.next(name);
    assert_eq!(agent.hears().await, [Notification::Ready], "the first agent had not noted it");
}

#[tokio::test]
async fn a_line_that_was_written_and_closed_while_there_was_no_agent_is_heard() {
    let scene = Scene::new();
    let name = name(1, Way::Line);
    scene.started(name).await.ends().await;
    let mut process = OpenOptions::new().read(true).write(true).open(scene.sockets.fifo(INSTANCE)).unwrap();
    process.write_all(b"\n").unwrap();
    drop(process);
    assert_eq!(scene.next(name).hears().await, [Notification::Ready]);
}

#[tokio::test]
async fn what_belongs_to_no_process_is_closed_here_and_with_the_keeper() {
    let scene = Scene::new();
    scene.started(name(1, Way::Socket)).await.ends().await;
    scene.started(name(2, Way::Socket)).await.ends().await;
    let mut agent = scene.started(name(3, Way::Line)).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    agent.keeper.store_descriptor("proxy/web".to_owned(), listener.into()).await.unwrap();
    agent.tasks.make(&scene.sockets, name(4, Way::Socket), &Speaker::default()).unwrap();
    let wanted = [name(2, Way::Socket), name(3, Way::Line)];
    let ears = agent.tasks.retain(&wanted);
    assert!(ears.get(name(3, Way::Line)).is_some() && ears.get(name(4, Way::Socket)).is_none());
    ears.tidy(&agent.keeper, &wanted).await.unwrap();
    assert_eq!(scene.shelf.names(), ["notify/i-42/1.2/socket", "notify/i-42/1.3/line", "proxy/web"]);
}
