//! What processes speak into: one socket or FIFO for each process, open here and with the keeper, so that it stays open
//! when either of them ends and nothing that is said is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use nave_agent_core::ProcessKey;
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use parking_lot::Mutex;
use tracing::warn;

use crate::keeper::{CallError, KeeperHandle};

/// What the keeper calls them.
const NAME_PREFIX: &str = "notify/";

/// How a process says how it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// In datagrams (sd_notify).
    Socket,
    /// In a line on a descriptor (s6).
    Line,
}

/// Of one process. The keeper's name for it is its text, so that no process is ever heard through another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EarName {
    pub(crate) instance: InstanceId,
    pub(crate) key: ProcessKey,
    pub(crate) way: Way,
}

impl fmt::Display for EarName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { instance, key: ProcessKey { epoch, attempt }, way } = self;
        let way = match way {
            Way::Socket => "socket",
            Way::Line => "line",
        };
        write!(f, "{NAME_PREFIX}{instance}/{epoch}.{attempt}/{way}")
    }
}

/// Those that are open here. They go on from one keeper to the next.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ears {
    open: Arc<Mutex<BTreeMap<EarName, Ear>>>,
}

#[derive(Debug, Clone)]
struct Ear {
    descriptor: Arc<OwnedFd>,
    /// By the keeper, while there was no agent, and not in the ledger yet.
    heard: Vec<u8>,
}

impl Ears {
    pub(crate) fn open(&self, name: EarName, descriptor: OwnedFd) {
        let ear = Ear { descriptor: descriptor.into(), heard: Vec::new() };
        self.open.lock().insert(name, ear);
    }

    /// A second end.
    pub(crate) fn get(&self, name: EarName) -> Option<OwnedFd> {
        let open = self.open.lock().get(&name).map(|ear| ear.descriptor.clone())?;
        open.as_fd().try_clone_to_owned().ok()
    }

    /// What was said before whatever is in the socket now.
    pub(crate) fn heard(&self, name: EarName) -> Vec<u8> {
        self.open.lock().get(&name).map(|ear| ear.heard.clone()).unwrap_or_default()
    }

    /// That is in the ledger.
    pub(crate) fn noted(&self, name: EarName) {
        if let Some(ear) = self.open.lock().get_mut(&name) {
            ear.heard = Vec::new();
        }
    }

    /// Closes those, and returns their names for the keeper to do the same.
    pub(crate) fn close(&self, goes: impl Fn(&EarName) -> bool) -> Vec<EarName> {
        let mut open = self.open.lock();
        let gone: Vec<EarName> = open.keys().copied().filter(|name| goes(name)).collect();
        open.retain(|name, _| !gone.contains(name));
        gone
    }

    /// From the keeper, which stops listening and says what it has heard. `false`: it has no such thing, and neither has
    /// this agent.
    ///
    /// # Errors
    /// The keeper is lost.
    pub(crate) async fn take_over(&self, keeper: &KeeperHandle, name: EarName) -> Result<bool, CallError> {
        let here = self.open.lock().contains_key(&name);
        match keeper.take_heard(name.to_string()).await {
            Ok((descriptor, heard)) => {
                let mut open = self.open.lock();
                let ear = open
                    .entry(name)
                    .or_insert_with(|| Ear { descriptor: descriptor.into(), heard: Vec::new() });
                ear.heard.extend(heard);
                ear.heard.push(b'\n');
                Ok(true)
            }
            Err(CallError::Lost) => Err(CallError::Lost),
            Err(_) if !here => Ok(false),
            // Another keeper than the one that had it.
            Err(_) => self.keep(keeper, name).await.map(|()| true),
        }
    }

    /// The keeper holds it now.
    ///
    /// # Errors
    /// The keeper is lost. One that does not hold it is complained of.
    pub(crate) async fn keep(&self, keeper: &KeeperHandle, name: EarName) -> Result<(), CallError> {
        let Some(descriptor) = self.get(name) else { return Ok(()) };
        let speaker = pb::Speaker { instance_id: name.instance.0, epoch: name.key.epoch };
        let speaker = (name.way == Way::Socket).then_some(speaker);
        match keeper.store_heard(name.to_string(), speaker, descriptor).await {
            Err(CallError::Lost) => Err(CallError::Lost),
            Err(error) => {
                let instance = name.instance;
                warn!(%instance, ?error, "the keeper does not hold this notify socket: a restart of the agent ends it");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// The keeper closes all but those that are open here and `wanted`.
    ///
    /// # Errors
    /// The keeper is lost, or holds nothing.
    pub(crate) async fn tidy(&self, keeper: &KeeperHandle, wanted: &[EarName]) -> Result<(), CallError> {
        let held = keeper.descriptors().await?;
        // Looked at after that: whatever the keeper got meanwhile is among them.
        let open: Vec<EarName> = self.open.lock().keys().copied().collect();
        let stay: BTreeSet<String> = open.iter().chain(wanted).map(EarName::to_string).collect();
        for name in held.into_iter().filter(|name| name.starts_with(NAME_PREFIX) && !stay.contains(name)) {
            keeper.drop_descriptor(name).await?;
        }
        Ok(())
    }
}
