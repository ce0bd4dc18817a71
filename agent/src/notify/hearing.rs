//! One process, heard. What it says stays where the next agent finds it until the main loop has it in its ledger, where
//! that is to have it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use nave_agent_core::supervisor::Notification;
use nave_agent_core::{Input, ProcessKey};
use nave_keeper::notice::{self, NOTICE_BYTES_MAX, Notice};
use nave_proto::ids::InstanceId;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::ears::{EarName, Ears, Way};
use super::message::parse;
use crate::keeper::KeeperHandle;

/// For the main loop: what a process has said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) instance: InstanceId,
    pub(crate) key: ProcessKey,
    pub(crate) messages: Vec<Notification>,
    /// To be told once what follows from it is in the ledger.
    pub(crate) noted: oneshot::Sender<()>,
}

/// What it takes to hear one process.
#[derive(Debug)]
pub(super) struct Hearing {
    pub(super) name: EarName,
    /// The cgroup whose processes are heard; nothing where there are none.
    pub(super) group: Option<String>,
    pub(super) ears: Ears,
    pub(super) keeper: KeeperHandle,
    pub(super) said: mpsc::Sender<Said>,
    pub(super) inputs: mpsc::Sender<(InstanceId, Input)>,
}

impl Hearing {
    /// Until the agent or the keeper ends. `anew` makes what neither of them has.
    pub(super) async fn run(self, anew: impl FnOnce() -> io::Result<OwnedFd>) {
        match self.ears.take_over(&self.keeper, self.name).await {
            Ok(true) => {}
            Ok(false) => {
                if let Err(error) = self.begin_anew(anew).await {
                    let instance = self.name.instance;
                    warn!(%instance, %error, "its notify socket cannot be made, so it will not be heard");
                    return;
                }
            }
            // The next one is asked again.
            Err(_) => return,
        }
        let heard = parse(&self.ears.heard(self.name));
        if !self.say(heard).await {
            return;
        }
        self.ears.noted(self.name);
        let Some(descriptor) = self.ears.get(self.name) else { return };
        let ended = match self.name.way {
            Way::Socket => self.hear_notices(descriptor).await,
            Way::Line => self.hear_line(descriptor).await,
        };
        if let Err(error) = ended {
            warn!(instance = %self.name.instance, %error, "what this process says is not heard any more");
        }
    }

    /// The process may know only what there was before.
    async fn begin_anew(&self, anew: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<()> {
        self.ears.open(self.name, anew()?);
        if self.name.way == Way::Socket {
            let unheard = Input::Unheard { key: self.name.key };
            let _ending = self.inputs.send((self.name.instance, unheard)).await;
        }
        // A keeper that is lost gets it when the next one has come.
        let _lost = self.ears.keep(&self.keeper, self.name).await;
        Ok(())
    }

    async fn hear_notices(&self, socket: OwnedFd) -> io::Result<()> {
        let socket = UnixDatagram::from_std(socket.into())?;
        let mut buffer = [0; NOTICE_BYTES_MAX];
        loop {
            let Notice { length, sender } =
                socket.async_io(Interest::READABLE, || notice::peek(socket.as_fd(), &mut buffer)).await?;
            let instance = self.name.instance;
            if self.group.as_ref().is_some_and(|group| !notice::is_of(sender, group)) {
                warn!(%instance, pid = sender, "a process of another instance spoke for this one and was not heard");
            } else if !self.say(parse(&buffer[..length])).await {
                return Ok(());
            }
            let taken = socket.try_io(Interest::READABLE, || notice::take(socket.as_fd(), &mut buffer));
            // That it is not there any more is as good.
            taken.map(drop).or_else(|error| would_block(&error).then_some(()).ok_or(error))?;
        }
    }

    /// Reads on for as long as the process may write; the first line says that it is ready.
    async fn hear_line(&self, fifo: OwnedFd) -> io::Result<()> {
        let back = fifo.try_clone()?;
        let fifo = pipe::Receiver::from_owned_fd(fifo)?;
        while !read(&fifo).await? {}
        // For the next agent, until it is in the ledger. A FIFO that is full is not empty either.
        let _full = nix::unistd::write(&back, b"\n");
        if !self.say(vec![Notification::Ready]).await {
            return Ok(());
        }
        loop {
            read(&fifo).await?;
        }
    }

    /// Whether it is said, and in the ledger where it has to be; if not, the agent ends.
    async fn say(&self, messages: Vec<Notification>) -> bool {
        if messages.is_empty() {
            return true;
        }
        let waits = messages.iter().any(outlives);
        let (noted, is_noted) = oneshot::channel();
        let EarName { instance, key, .. } = self.name;
        let is_said = self.said.send(Said { instance, key, messages, noted }).await.is_ok();
        is_said && (!waits || is_noted.await.is_ok())
    }
}

/// Whether the next agent has to know it. A process that says something else again and again is held up by no disk.
fn outlives(message: &Notification) -> bool {
    match message {
        Notification::Ready
        | Notification::Stopping
        | Notification::WatchdogTrigger
        | Notification::ExtendTimeout(_) => true,
        Notification::Reloading
        | Notification::Watchdog
        | Notification::MainPid(_)
        | Notification::Status(_) => false,
    }
}

/// Whether what there was to read held the end of a line.
async fn read(fifo: &pipe::Receiver) -> io::Result<bool> {
    let mut buffer = [0; 256];
    loop {
        fifo.readable().await?;
        match fifo.try_read(&mut buffer) {
            Ok(length) => return Ok(buffer[..length].contains(&b'\n')),
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
