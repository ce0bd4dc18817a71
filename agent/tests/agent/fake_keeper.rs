//! A keeper that only pretends: it keeps a table of processes, answers as the real one does, and lets the test end
//! processes. It outlives agents, as a keeper does.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nave_keeper::client::{FrameBuffer, encode, socket_path};
use nave_proto::pb;
use parking_lot::Mutex;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) spawns: Vec<pb::Spawn>,
    running: BTreeMap<u64, pb::KeptProcess>,
    exits: Vec<pb::ExitRecord>,
    /// Newest exit sequence that the agent has acknowledged.
    pub(crate) acknowledged: u64,
    told: u64,
    /// What it says of its own files.
    pub(crate) damages: Vec<String>,
    next_pid: u32,
}

pub(crate) struct FakeKeeper {
    pub(crate) kept: Arc<Mutex<Kept>>,
    news: Arc<Notify>,
    _tasks: JoinSet<()>,
}

impl FakeKeeper {
    pub(crate) fn start(data_dir: &Path) -> Self {
        std::fs::create_dir_all(data_dir).unwrap();
        let listener = UnixListener::bind(socket_path(data_dir)).unwrap();
        let (kept, news) =
            (Arc::new(Mutex::new(Kept { next_pid: 1000, ..Kept::default() })), Arc::new(Notify::new()));
        let mut tasks = JoinSet::new();
        let (table, signal) = (kept.clone(), news.clone());
        tasks.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                serve(stream, &table, &signal).await;
            }
        });
        Self { kept, news, _tasks: tasks }
    }

    /// A process ends by itself.
    pub(crate) fn end(&self, instance: u64, code: i32) {
        end(&mut self.kept.lock(), instance, pb::ExitCause::Exit, code);
        self.news.notify_one();
    }
}

fn end(kept: &mut Kept, instance: u64, cause: pb::ExitCause, code: i32) {
    let Some(process) = kept.running.remove(&instance) else { return };
    let sequence = u64::try_from(kept.exits.len()).unwrap() + 1;
    kept.exits.push(pb::ExitRecord {
        instance_id: instance,
        service: process.service,
        epoch: process.epoch,
        attempt: process.attempt,
        process: process.process,
        cause: cause.into(),
        code,
        sequence,
        ..pb::ExitRecord::default()
    });
}

/// One agent at a time, until it hangs up.
async fn serve(mut stream: UnixStream, kept: &Mutex<Kept>, news: &Notify) {
    let mut frames = FrameBuffer::default();
    let mut buffer = [0; 4096];
    kept.lock().told = u64::MAX; // nothing before the hello
    loop {
        tokio::select! {
            read = stream.read(&mut buffer) => match read {
                Ok(length) if length > 0 => frames.push(&buffer[..length]),
                _ => return,
            },
            () = news.notified() => {}
        }
        while let Some(request) = frames.next_message::<pb::KeeperRequest>().unwrap() {
            let reply = answer(&mut kept.lock(), request.request.unwrap());
            send(&mut stream, request.id, reply).await;
        }
        let untold: Vec<_> = {
            let mut kept = kept.lock();
            let untold: Vec<_> =
                kept.exits.iter().filter(|exit| exit.sequence > kept.told).cloned().collect();
            kept.told = untold.last().map_or(kept.told, |exit| exit.sequence);
            untold
        };
        for exit in untold {
            send(&mut stream, 0, Reply::Exited(exit)).await;
        }
    }
}

async fn send(stream: &mut UnixStream, id: u64, reply: Reply) {
    // An agent that has gone is met at the next read.
    stream.write_all(&encode(&pb::KeeperReply { id, reply: Some(reply) }).unwrap()).await.ok();
}

fn answer(kept: &mut Kept, request: Request) -> Reply {
    match request {
        Request::Hello(_) => {
            kept.told = kept.acknowledged;
            Reply::Welcome(pb::KeeperWelcome {
                version: 1,
                keeper_pid: std::process::id(),
                damages: kept.damages.clone(),
                ..Default::default()
            })
        }
        Request::List(_) => {
            Reply::Processes(pb::ProcessList { processes: kept.running.values().cloned().collect() })
        }
        Request::Spawn(spawn) => {
            kept.next_pid += 1;
            let process = pb::ProcessIdentity { pid: kept.next_pid, start_ticks: 1, ..Default::default() };
            let running = pb::KeptProcess {
                instance_id: spawn.instance_id,
                epoch: spawn.epoch,
                attempt: spawn.attempt,
                service: spawn.service.clone(),
                process: Some(process.clone()),
                started_unix_ns: 1,
                ..Default::default()
            };
            kept.running.insert(spawn.instance_id, running);
            kept.spawns.push(spawn);
            Reply::Spawned(pb::Spawned { process: Some(process), started_unix_ns: 1 })
        }
        Request::Signal(signal) => {
            end(kept, signal.instance_id, signal.cause(), 0);
            Reply::Done(pb::KeeperDone::default())
        }
        Request::AcknowledgeExits(acknowledge) => {
            kept.acknowledged = acknowledge.up_to_sequence;
            Reply::Done(pb::KeeperDone::default())
        }
        Request::Forget(_) => Reply::Done(pb::KeeperDone::default()),
        _ => Reply::Unsupported(pb::KeeperUnsupported {}),
    }
}
