//! One keeper in a directory of its own, and its end, however the test ends.

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nave_keeper::client::{Client, ClientError, socket_path};
use nave_proto::pb;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_nave-keeper-test");

/// A variable by which a host's keeper and its agents are found.
const MARK: &str = "NAVE_KEEPER_TEST_HOST";

/// Waits for a condition, for at most 20 s.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..4000 {
        if let Some(found) = look() {
            return found;
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    panic!("waited in vain for: {what}");
}

pub(crate) fn runs(pid: u32) -> bool {
    state(pid).is_some_and(|state| state != 'Z')
}

pub(crate) fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

pub(crate) fn kill(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Where instances of this test get their cgroups; `None` when we may not make any.
fn cgroup_root(kind: &str) -> Option<PathBuf> {
    let root = match kind {
        "" => ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(PathBuf::from)
            .find(|dir| dir.join("cgroup.controllers").exists())?,
        controller => Path::new("/sys/fs/cgroup").join(controller),
    };
    nix::unistd::access(&root.join("cgroup.procs"), nix::unistd::AccessFlags::W_OK).ok().map(|()| root)
}

pub(crate) struct Host {
    pub(crate) dir: TempDir,
    pub(crate) keeper: Option<Child>,
    cgroups: Vec<PathBuf>,
    name: String,
    pub(crate) program: PathBuf,
}

impl Host {
    /// A host whose keeper runs, without an agent.
    pub(crate) fn start() -> Self {
        Self::start_with_agent(&[] as &[&str])
    }

    pub(crate) fn start_with_agent(agent: &[impl AsRef<OsStr>]) -> Self {
        let mut host = Self::off();
        host.start_keeper(agent);
        host
    }

    /// A host without a keeper.
    pub(crate) fn off() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("nave-keeper-test-{}", dir.path().file_name().unwrap().to_str().unwrap());
        Self { dir, keeper: None, cgroups: Vec::new(), name, program: PROGRAM.into() }
    }

    /// A copy of the keeper's program in a directory of this host's own.
    pub(crate) fn copy_of_program(&self, name: &str) -> PathBuf {
        let copy = self.dir.path().join(name);
        fs::copy(PROGRAM, &copy).unwrap();
        copy
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn start_keeper(&mut self, agent: &[impl AsRef<OsStr>]) {
        let log = fs::File::options().append(true).create(true).open(self.dir.path().join("stderr")).unwrap();
        // With a descriptor that a careless parent left open, for nobody to pass on. Whatever outlives a failed test
        // holds no pipe of ours open: who reads what the tests say would wait for it.
        let child = Command::new("sh")
            .args(["-c", "exec 9</dev/null; exec \"$0\" \"$@\""])
            .arg(&self.program)
            .arg("keeper")
            .arg(self.data_dir())
            .args(agent)
            .env(MARK, &self.name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.keeper = Some(child);
    }

    pub(crate) fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().unwrap().id()
    }

    /// What the keeper has said.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// kill -9.
    pub(crate) fn kill_keeper(&mut self) {
        let mut keeper = self.keeper.take().unwrap();
        keeper.kill().unwrap();
        keeper.wait().unwrap();
    }

    /// Waits for the keeper to end by itself.
    pub(crate) fn keeper_ends(&mut self) -> i32 {
        let mut keeper = self.keeper.take().unwrap();
        eventually("the keeper's end", || keeper.try_wait().unwrap()).code().unwrap_or(-1)
    }

    /// A connection without a hello.
    pub(crate) fn connect(&self) -> Client {
        let socket = socket_path(&self.data_dir());
        let client = eventually("the keeper's socket", || Client::connect(&socket).ok());
        client.set_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    /// What the keeper tells anybody, from whichever image answers first: one that is about to become another resets
    /// its connections.
    pub(crate) fn status(&self) -> pb::KeeperStatus {
        eventually("the keeper's status", || {
            let mut client = Client::connect(&socket_path(&self.data_dir())).ok()?;
            client.set_timeout(Some(Duration::from_secs(20))).ok()?;
            client.status().ok()
        })
    }

    /// The agent's connection.
    pub(crate) fn agent(&self) -> Agent {
        let mut client = self.connect();
        client.hello("test").unwrap();
        Agent { client, seen: Vec::new() }
    }

    /// A spawn of `sh -c script`, with cgroup and log directory where possible.
    pub(crate) fn script(&mut self, instance_id: u64, script: &str) -> pb::Spawn {
        let cgroup2 = self.cgroup("", instance_id).map_or_else(String::new, text);
        pb::Spawn {
            instance_id,
            epoch: 1,
            attempt: 1,
            service: format!("s{instance_id}"),
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["PATH=/usr/bin:/bin".to_owned()],
            cgroup2,
            log_dir: text(self.log_dir(instance_id)),
            ..Default::default()
        }
    }

    pub(crate) fn cgroup(&mut self, kind: &str, instance_id: u64) -> Option<PathBuf> {
        let above = cgroup_root(kind)?.join(&self.name);
        let dir = above.join(format!("i-{instance_id}"));
        self.cgroups.extend([dir.clone(), above]);
        Some(dir)
    }

    pub(crate) fn log_dir(&self, instance_id: u64) -> PathBuf {
        self.dir.path().join(format!("logs/i-{instance_id}"))
    }

    /// The records of an instance's log, without their stamps.
    pub(crate) fn log(&self, instance_id: u64) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.log_dir(instance_id)) else { return Vec::new() };
        let mut segments: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension() == Some(OsStr::new("log")))
            .collect();
        segments.sort();
        segments
            .iter()
            .flat_map(|path| {
                // The last one may be half written yet.
                let text = fs::read(path).unwrap();
                let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
                let text = String::from_utf8(text[..whole].to_vec()).unwrap();
                text.lines().map(|line| line[31..].to_owned()).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Waits for a line of stdout that starts so, and returns what follows.
    pub(crate) fn line(&self, instance_id: u64, start: &str) -> String {
        let start = format!("stdout F {start}");
        eventually(&start, || {
            self.log(instance_id).iter().find_map(|line| line.strip_prefix(&start).map(str::to_owned))
        })
    }

    /// A path for a script to wait for: `while ! test -e PATH; do sleep 0.01; done`.
    pub(crate) fn gate(&self, name: &str) -> Gate {
        Gate(self.dir.path().join(name))
    }
}

/// A file whose appearance lets a script go on.
pub(crate) struct Gate(PathBuf);

impl Gate {
    pub(crate) fn wait(&self) -> String {
        format!("while ! test -e {}; do sleep 0.01; done;", self.0.display())
    }

    pub(crate) fn open(&self) {
        fs::write(&self.0, "").unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "the keeper said:\n{}", self.said());
        }
        if let Some(mut keeper) = self.keeper.take() {
            // The agent and all services end with it; by force only when that fails.
            let asked = Client::connect(&socket_path(&self.data_dir())).is_ok_and(|mut client| {
                let _ = client.set_timeout(Some(Duration::from_secs(20)));
                client.shutdown(true, Duration::ZERO).is_ok()
            });
            if !asked {
                let _ = keeper.kill();
            }
            let _ = keeper.wait();
        }
        // A keeper that ended otherwise than the test meant has left its agent.
        for pid in marked(&self.name) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        // Those below first.
        self.cgroups.sort_by_key(|dir| std::cmp::Reverse(dir.as_os_str().len()));
        self.cgroups.dedup();
        for dir in &self.cgroups {
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
                let _ = Command::new("kill").args(["-9", pid]).stderr(Stdio::null()).status();
            }
            for _ in 0..400 {
                if !dir.exists() || fs::remove_dir(dir).is_ok() {
                    break;
                }
                std::thread::park_timeout(Duration::from_millis(5));
            }
        }
    }
}

/// Those that were started with [`MARK`] and the name of one host.
fn marked(name: &str) -> Vec<u32> {
    let mark = format!("{MARK}={name}");
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has_it = |pid: &u32| {
        let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        variables.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    pids.filter(has_it).collect()
}

fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().unwrap()
}

/// The agent's side, as a test plays it.
pub(crate) struct Agent {
    pub(crate) client: Client,
    /// Exit records that came while something else was waited for.
    seen: Vec<pb::ExitRecord>,
}

impl Agent {
    pub(crate) fn ask(&mut self, request: Request) -> Result<Reply, ClientError> {
        self.client.request(request, None).map(|(reply, _)| reply)
    }

    pub(crate) fn done(&mut self, request: Request) {
        let reply = self.ask(request).unwrap();
        assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    }

    pub(crate) fn refused(&mut self, request: Request) -> pb::KeeperError {
        match self.ask(request) {
            Err(ClientError::Refused(error)) => error,
            other => panic!("not refused: {other:?}"),
        }
    }

    pub(crate) fn spawn(&mut self, spawn: &pb::Spawn) -> u32 {
        match self.ask(Request::Spawn(spawn.clone())).unwrap() {
            Reply::Spawned(spawned) => spawned.process.unwrap().pid,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn signal(&mut self, instance_id: u64, signal: i32, scope: pb::SignalScope) {
        self.done(signal_request(instance_id, signal, scope));
    }

    pub(crate) fn acknowledge(&mut self, up_to_sequence: u64) {
        self.done(Request::AcknowledgeExits(pb::AcknowledgeExits { up_to_sequence }));
    }

    pub(crate) fn event(&mut self) -> Reply {
        self.client.event().unwrap()
    }

    /// The next exit record of an instance.
    pub(crate) fn exit(&mut self, instance_id: u64) -> pb::ExitRecord {
        loop {
            if let Some(at) = self.seen.iter().position(|exit| exit.instance_id == instance_id) {
                return self.seen.remove(at);
            }
            if let Reply::Exited(exit) = self.event() {
                self.seen.push(exit);
            }
        }
    }

    pub(crate) fn kept(&mut self, instance_id: u64) -> Option<pb::KeptProcess> {
        self.client.list().unwrap().into_iter().find(|kept| kept.instance_id == instance_id)
    }
}

pub(crate) fn signal_request(instance_id: u64, signal: i32, scope: pb::SignalScope) -> Request {
    let scope = scope.into();
    Request::Signal(pb::Signal { instance_id, epoch: 1, attempt: 0, signal, scope, cause: 0 })
}

pub(crate) fn forget_request(instance_id: u64, remove_logs: bool) -> Request {
    Request::Forget(pb::Forget { instance_id, epoch: 1, remove_logs })
}
