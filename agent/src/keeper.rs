//! The agent's connection to its keeper: requests with ids answered whenever they are done, events as they come.
//!
//! One task reads and one writes, so that neither side can block the other into a deadlock. When the connection
//! breaks, every waiting caller hears `Lost` and the agent begins anew with the next keeper (see `run`), from its
//! ledger and what that keeper says runs. Listening sockets, which must outlive the agent, are passed here both ways.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::ProcessKey;
use nave_keeper::client::{FrameBuffer, FrameError, PROTOCOL_VERSION, encode, receive, send, socket_path};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use parking_lot::Mutex;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// Requests on their way: one per instance at a time, so this is a burst over hundreds of instances.
const REQUESTS: usize = 256;
/// Read at once; frames are hundreds of bytes.
const READ_BYTES: usize = 4096;
/// A keeper that answers nothing for so long is treated as gone.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two looks for a keeper.
const RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("no keeper at {path}; the agent is started by `nave agent`, never on its own")]
    Absent { path: String, source: io::Error },
    #[error("the keeper's connection is lost")]
    Lost,
    #[error("the keeper's connection failed")]
    Io(#[from] io::Error),
    #[error("the keeper sent what is no frame")]
    Frame(#[from] FrameError),
    #[error("the keeper answered the hello with something else")]
    Hello,
    #[error("the keeper did not answer within {0:?}")]
    Silent(Duration),
}

/// Why one request has no good answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum CallError {
    /// The connection broke first: whether it was done is unknown.
    Lost,
    Refused(pb::KeeperError),
    /// An older keeper that does not know the request.
    Unsupported,
}

/// What the main loop hears from the keeper, in the keeper's own order: that order is what makes an exit, a list
/// and the answer to a spawn agree with each other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum KeeperEvent {
    Exited(Box<pb::ExitRecord>),
    OutputDropped(pb::OutputDropped),
    Answered { purpose: Purpose, result: Box<Result<Reply, CallError>> },
}

/// What a request that the main loop waits for was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Spawn { instance: InstanceId, key: ProcessKey },
    Signal { instance: InstanceId, key: ProcessKey, signal: i32 },
    List,
    OomKills,
}

/// Who gets the answer.
#[derive(Debug)]
enum Answer {
    Caller(oneshot::Sender<Result<Reply, CallError>>),
    /// With the descriptor that comes with a good answer.
    Taker(oneshot::Sender<Result<Taken, CallError>>),
    MainLoop(Purpose),
    Nobody,
}

/// A descriptor that the keeper held, and what it has heard there.
pub(crate) type Taken = (OwnedFd, Vec<u8>);

/// A request on its way, with the descriptor that goes with it.
#[derive(Debug)]
struct Asked {
    request: Request,
    descriptor: Option<OwnedFd>,
    answer: Answer,
}

/// For everybody who asks the keeper for something.
#[derive(Debug, Clone)]
pub(crate) struct KeeperHandle {
    requests: mpsc::Sender<Asked>,
}

impl KeeperHandle {
    pub(crate) async fn call(&self, request: Request) -> Result<Reply, CallError> {
        self.call_with(request, None).await
    }

    async fn call_with(&self, request: Request, descriptor: Option<OwnedFd>) -> Result<Reply, CallError> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked { request, descriptor, answer: Answer::Caller(answer) };
        self.requests.send(asked).await.map_err(|_| CallError::Lost)?;
        answered.await.map_err(|_| CallError::Lost)?
    }

    /// The keeper holds it under this name, instead of what it held there before.
    pub(crate) async fn store_descriptor(&self, name: String, descriptor: OwnedFd) -> Result<(), CallError> {
        self.store_heard(name, None, descriptor).await
    }

    /// The same of a socket that processes of this placement speak into; the keeper hears them while there is no agent.
    pub(crate) async fn store_heard(
        &self,
        name: String,
        speaker: Option<pb::Speaker>,
        descriptor: OwnedFd,
    ) -> Result<(), CallError> {
        let request = Request::StoreDescriptor(pb::StoreDescriptor { name, speaker });
        self.call_with(request, Some(descriptor)).await.map(|_| ())
    }

    /// Another end of what the keeper holds under this name.
    pub(crate) async fn take_descriptor(&self, name: String) -> Result<OwnedFd, CallError> {
        self.take_heard(name).await.map(|(descriptor, _)| descriptor)
    }

    /// The same with what the keeper has heard there, where processes speak into it; it hears no more then.
    pub(crate) async fn take_heard(&self, name: String) -> Result<Taken, CallError> {
        let (answer, answered) = oneshot::channel();
        let request = Request::TakeDescriptor(pb::TakeDescriptor { name });
        let asked = Asked { request, descriptor: None, answer: Answer::Taker(answer) };
        self.requests.send(asked).await.map_err(|_| CallError::Lost)?;
        answered.await.map_err(|_| CallError::Lost)?
    }

    /// The keeper closes it.
    pub(crate) async fn drop_descriptor(&self, name: String) -> Result<(), CallError> {
        self.call(Request::DropDescriptor(pb::DropDescriptor { name })).await.map(|_| ())
    }

    /// The names of all that the keeper holds.
    pub(crate) async fn descriptors(&self) -> Result<Vec<String>, CallError> {
        match self.call(Request::ListDescriptors(pb::ListDescriptors {})).await? {
            Reply::Descriptors(list) => Ok(list.names),
            other => Err(unexpected(&other)),
        }
    }

    /// The answer comes as `KeeperEvent::Answered`; when the connection is lost there is none, and the agent ends.
    pub(crate) async fn ask(&self, request: Request, purpose: Purpose) {
        let _lost =
            self.requests.send(Asked { request, descriptor: None, answer: Answer::MainLoop(purpose) }).await;
    }

    /// No answer is waited for.
    pub(crate) async fn tell(&self, request: Request) {
        let _lost = self.requests.send(Asked { request, descriptor: None, answer: Answer::Nobody }).await;
    }

    pub(crate) async fn list(&self) -> Result<Vec<pb::KeptProcess>, CallError> {
        match self.call(Request::List(pb::ListProcesses {})).await? {
            Reply::Processes(list) => Ok(list.processes),
            other => Err(unexpected(&other)),
        }
    }
}

/// A reply of the wrong kind, as an error of the call.
pub(crate) fn unexpected(reply: &Reply) -> CallError {
    CallError::Refused(pb::KeeperError {
        kind: pb::KeeperErrorKind::System.into(),
        errno: 0,
        message: format!("the keeper answered with something else: {reply:?}"),
    })
}

/// The connection, to be run by its owner.
#[derive(Debug)]
pub(crate) struct KeeperTask {
    read: OwnedReadHalf,
    received: Received,
    write: OwnedWriteHalf,
    requests: mpsc::Receiver<Asked>,
    waiting: Arc<Mutex<BTreeMap<u64, Answer>>>,
    /// Events that came together with the welcome.
    early: Vec<pb::KeeperReply>,
    last_id: u64,
}

/// What has come and is not used yet. Descriptors come in the order of the answers they belong to.
#[derive(Debug, Default)]
struct Received {
    frames: FrameBuffer,
    descriptors: VecDeque<OwnedFd>,
}

/// Connects and says hello; a keeper that is not there is waited for as long as `patience`.
pub(crate) async fn connect(
    data_dir: &Path,
    patience: Duration,
) -> Result<(KeeperHandle, KeeperTask, pb::KeeperWelcome), KeeperError> {
    let path = socket_path(data_dir);
    let until = tokio::time::Instant::now() + patience;
    let stream = loop {
        match UnixStream::connect(&path).await {
            Ok(stream) => break stream,
            Err(_) if tokio::time::Instant::now() < until => tokio::time::sleep(RETRY).await,
            Err(source) => return Err(KeeperError::Absent { path: path.display().to_string(), source }),
        }
    };
    tokio::time::timeout(HELLO_TIMEOUT, hello(stream))
        .await
        .map_err(|_| KeeperError::Silent(HELLO_TIMEOUT))?
}

async fn hello(stream: UnixStream) -> Result<(KeeperHandle, KeeperTask, pb::KeeperWelcome), KeeperError> {
    let (read, write) = stream.into_split();
    let (requests, receiver) = mpsc::channel(REQUESTS);
    let mut task = KeeperTask {
        read,
        received: Received::default(),
        write,
        requests: receiver,
        waiting: Arc::default(),
        early: Vec::new(),
        last_id: 1,
    };
    let hello =
        pb::KeeperHello { version: PROTOCOL_VERSION, agent_version: env!("CARGO_PKG_VERSION").to_owned() };
    let frame = encode(&pb::KeeperRequest { id: task.last_id, request: Some(Request::Hello(hello)) })?;
    task.write.write_all(&frame).await?;
    loop {
        let message = next_message(&mut task.read, &mut task.received).await?;
        match message {
            pb::KeeperReply { id: 1, reply: Some(Reply::Welcome(welcome)) } => {
                return Ok((KeeperHandle { requests }, task, welcome));
            }
            pb::KeeperReply { id: 0, .. } => task.early.push(message),
            _ => return Err(KeeperError::Hello),
        }
    }
}

impl KeeperTask {
    /// Runs until the connection breaks or nobody is left to ask or to hear.
    pub(crate) async fn run(self, events: mpsc::Sender<KeeperEvent>) -> KeeperError {
        let waiting = self.waiting.clone();
        let error = tokio::select! {
            error = read_on(self.read, self.received, self.early, &waiting, &events) => error,
            error = write_on(self.write, self.requests, self.last_id, &waiting, &events) => error,
        };
        // Dropping the answers tells the callers.
        waiting.lock().clear();
        error
    }
}

async fn read_on(
    mut read: OwnedReadHalf,
    mut received: Received,
    early: Vec<pb::KeeperReply>,
    waiting: &Mutex<BTreeMap<u64, Answer>>,
    events: &mpsc::Sender<KeeperEvent>,
) -> KeeperError {
    for message in early {
        if forward(message, &mut received.descriptors, waiting, events).await.is_err() {
            return KeeperError::Lost;
        }
    }
    loop {
        match next_message(&mut read, &mut received).await {
            Ok(message) => {
                if forward(message, &mut received.descriptors, waiting, events).await.is_err() {
                    return KeeperError::Lost;
                }
            }
            Err(error) => return error,
        }
    }
}

/// A reply to its caller, an event to the main loop. `Err`: nobody hears events any more.
async fn forward(
    message: pb::KeeperReply,
    descriptors: &mut VecDeque<OwnedFd>,
    waiting: &Mutex<BTreeMap<u64, Answer>>,
    events: &mpsc::Sender<KeeperEvent>,
) -> Result<(), mpsc::error::SendError<KeeperEvent>> {
    let Some(reply) = message.reply else { return Ok(()) }; // of a newer keeper
    if message.id == 0 {
        return match reply {
            Reply::Exited(record) => events.send(KeeperEvent::Exited(Box::new(record))).await,
            Reply::OutputDropped(dropped) => events.send(KeeperEvent::OutputDropped(dropped)).await,
            _ => Ok(()),
        };
    }
    let Some(answer) = waiting.lock().remove(&message.id) else { return Ok(()) };
    let result = match reply {
        Reply::Done(done) if matches!(answer, Answer::Taker(_)) => {
            let Answer::Taker(taker) = answer else { return Ok(()) };
            let taken = descriptors.pop_front().map(|descriptor| (descriptor, done.heard));
            let _given_up = taker.send(taken.ok_or(CallError::Lost));
            return Ok(());
        }
        Reply::Error(error) => Err(CallError::Refused(error)),
        Reply::Unsupported(_) => Err(CallError::Unsupported),
        reply => Ok(reply),
    };
    deliver(answer, result, events).await
}

async fn deliver(
    answer: Answer,
    result: Result<Reply, CallError>,
    events: &mpsc::Sender<KeeperEvent>,
) -> Result<(), mpsc::error::SendError<KeeperEvent>> {
    match answer {
        Answer::MainLoop(purpose) => {
            events.send(KeeperEvent::Answered { purpose, result: Box::new(result) }).await
        }
        Answer::Caller(caller) => {
            // One that has given up is no loss.
            let _given_up = caller.send(result);
            Ok(())
        }
        Answer::Taker(taker) => {
            let _given_up = taker.send(result.and_then(|reply| Err(unexpected(&reply))));
            Ok(())
        }
        Answer::Nobody => Ok(()),
    }
}

async fn write_on(
    mut write: OwnedWriteHalf,
    mut requests: mpsc::Receiver<Asked>,
    mut last_id: u64,
    waiting: &Mutex<BTreeMap<u64, Answer>>,
    events: &mpsc::Sender<KeeperEvent>,
) -> KeeperError {
    while let Some(Asked { request, descriptor, answer }) = requests.recv().await {
        last_id += 1;
        let frame = match encode(&pb::KeeperRequest { id: last_id, request: Some(request) }) {
            Ok(frame) => frame,
            Err(error) => {
                let refused = CallError::Refused(pb::KeeperError {
                    kind: pb::KeeperErrorKind::Invalid.into(),
                    errno: 0,
                    message: format!("the order is too large for the keeper: {error}"),
                });
                if deliver(answer, Err(refused), events).await.is_err() {
                    return KeeperError::Lost;
                }
                continue;
            }
        };
        waiting.lock().insert(last_id, answer);
        let sent = match descriptor {
            Some(descriptor) => send_with(&mut write, &frame, &descriptor).await,
            None => write.write_all(&frame).await,
        };
        if let Err(error) = sent {
            return error.into();
        }
    }
    KeeperError::Lost
}

/// The descriptor rides on the first byte that goes.
async fn send_with(write: &mut OwnedWriteHalf, frame: &[u8], descriptor: &OwnedFd) -> io::Result<()> {
    let stream = write.as_ref();
    let sent =
        stream.async_io(Interest::WRITABLE, || send(stream.as_fd(), frame, &[descriptor.as_fd()])).await?;
    write.write_all(&frame[sent..]).await
}

async fn next_message(
    read: &mut OwnedReadHalf,
    received: &mut Received,
) -> Result<pb::KeeperReply, KeeperError> {
    let stream = read.as_ref();
    loop {
        if let Some(message) = received.frames.next_message()? {
            return Ok(message);
        }
        let taken = stream.async_io(Interest::READABLE, || {
            let mut buffer = [0; READ_BYTES];
            let (length, descriptors) = receive(stream.as_fd(), &mut buffer)?;
            received.frames.push(&buffer[..length]);
            received.descriptors.extend(descriptors);
            Ok(length)
        });
        if taken.await? == 0 {
            return Err(KeeperError::Lost);
        }
    }
}

#[cfg(test)]
pub(crate) mod shelf;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::UnixListener;
    use tokio::task::JoinSet;

    /// A keeper that sends two events before its welcome and answers lists out of order.
    async fn fake_keeper(listener: UnixListener) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut frames = FrameBuffer::default();
        let mut lists = Vec::new();
        let mut buffer = [0; 512];
        loop {
            let length = stream.read(&mut buffer).await.unwrap();
            if length == 0 {
                return;
            }
            frames.push(&buffer[..length]);
            while let Some(request) = frames.next_message::<pb::KeeperRequest>().unwrap() {
                match request.request.unwrap() {
                    Request::Hello(_) => {
                        let exit = pb::ExitRecord { instance_id: 7, sequence: 1, ..Default::default() };
                        send(&mut stream, 0, Reply::Exited(exit)).await;
                        send(&mut stream, request.id, Reply::Welcome(pb::KeeperWelcome::default())).await;
                    }
                    Request::List(_) => lists.push(request.id),
                    Request::Forget(_) => {
                        for id in lists.drain(..).rev() {
                            let process = pb::KeptProcess { instance_id: id, ..Default::default() };
                            send(
                                &mut stream,
                                id,
                                Reply::Processes(pb::ProcessList { processes: vec![process] }),
                            )
                            .await;
                        }
                        send(&mut stream, request.id, Reply::Unsupported(pb::KeeperUnsupported {})).await;
                    }
                    _ => return, // hangs up
                }
            }
        }
    }

    async fn send(stream: &mut UnixStream, id: u64, reply: Reply) {
        stream.write_all(&encode(&pb::KeeperReply { id, reply: Some(reply) }).unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn each_caller_gets_its_own_answer_and_events_go_to_the_main_loop() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket_path(dir.path())).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(fake_keeper(listener));
        let (handle, task, _) = connect(dir.path(), Duration::ZERO).await.unwrap();
        let (events, mut heard) = mpsc::channel(8);
        let mut ends = JoinSet::new();
        ends.spawn(task.run(events));
        assert!(matches!(heard.recv().await, Some(KeeperEvent::Exited(exit)) if exit.instance_id == 7));

        let forget = || Request::Forget(pb::Forget::default());
        let (first, second, third) =
            tokio::join!(handle.list(), handle.list(), async { handle.call(forget()).await });
        // The fake names the request's id in its answer.
        assert_ne!(first.unwrap()[0].instance_id, second.unwrap()[0].instance_id);
        assert_eq!(third.unwrap_err(), CallError::Unsupported);

        let lost = handle.call(Request::ListDescriptors(pb::ListDescriptors {})).await;
        assert_eq!(lost.unwrap_err(), CallError::Lost);
        assert!(matches!(ends.join_next().await, Some(Ok(KeeperError::Lost))));
        assert_eq!(handle.list().await.unwrap_err(), CallError::Lost);
    }

    /// A keeper that hands back, to whoever takes, what was stored last, together with an event.
    async fn storing_keeper(listener: UnixListener) {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut received = Received::default();
        let mut buffer = [0; 512];
        loop {
            let taken =
                read.as_ref().async_io(Interest::READABLE, || receive(read.as_ref().as_fd(), &mut buffer));
            let (length, descriptors) = taken.await.unwrap();
            if length == 0 {
                return;
            }
            received.frames.push(&buffer[..length]);
            received.descriptors.extend(descriptors);
            while let Some(request) = received.frames.next_message::<pb::KeeperRequest>().unwrap() {
                let (reply, descriptor) = match request.request.unwrap() {
                    Request::Hello(_) => (Reply::Welcome(pb::KeeperWelcome::default()), None),
                    Request::TakeDescriptor(take) if take.name == "kept" => {
                        (Reply::Done(pb::KeeperDone::default()), received.descriptors.pop_back())
                    }
                    Request::TakeDescriptor(_) => (Reply::Error(pb::KeeperError::default()), None),
                    _ => (Reply::Done(pb::KeeperDone::default()), None),
                };
                let frame = encode(&pb::KeeperReply { id: request.id, reply: Some(reply) }).unwrap();
                match descriptor {
                    Some(descriptor) => send_with(&mut write, &frame, &descriptor).await.unwrap(),
                    None => write.write_all(&frame).await.unwrap(),
                }
            }
            read.as_ref().readable().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_descriptor_goes_to_the_keeper_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(storing_keeper(UnixListener::bind(socket_path(dir.path())).unwrap()));
        let (handle, task, _) = connect(dir.path(), Duration::ZERO).await.unwrap();
        let (events, _heard) = mpsc::channel(8);
        let mut ends = JoinSet::new();
        ends.spawn(task.run(events));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        handle.store_descriptor("kept".to_owned(), listener.into()).await.unwrap();
        let unknown = handle.take_descriptor("other".to_owned()).await.unwrap_err();
        assert!(matches!(unknown, CallError::Refused(_)), "{unknown:?}");
        let taken = handle.take_descriptor("kept".to_owned()).await.unwrap();
        assert_eq!(std::net::TcpListener::from(taken).local_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn without_a_keeper_the_error_says_how_to_start_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = connect(dir.path(), Duration::ZERO).await.unwrap_err();
        assert!(error.to_string().contains("started by `nave agent`"), "{error}");
    }
}
