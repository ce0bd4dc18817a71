//! A keeper of descriptors and of nothing else, for tests.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nave_proto::pb;
use parking_lot::Mutex;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Answer, Asked, CallError, KeeperHandle, Taken};

/// See the module's description.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shelf {
    held: Arc<Mutex<BTreeMap<String, Taken>>>,
}

impl Shelf {
    /// A connection, for as long as there is somebody at its other end.
    pub(crate) fn connect(&self, tasks: &mut JoinSet<()>) -> KeeperHandle {
        let (requests, mut asked) = mpsc::channel::<Asked>(16);
        let shelf = self.clone();
        tasks.spawn(async move {
            while let Some(asked) = asked.recv().await {
                shelf.answer(asked);
            }
        });
        KeeperHandle { requests }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.held.lock().keys().cloned().collect()
    }

    /// As a keeper does while there is no agent.
    pub(crate) fn hears(&self, name: &str, said: &[u8]) {
        self.held.lock().get_mut(name).unwrap().1 = said.to_vec();
    }

    fn answer(&self, Asked { request, descriptor, answer }: Asked) {
        let mut held = self.held.lock();
        let done = Reply::Done(pb::KeeperDone::default());
        let reply = match request {
            Request::StoreDescriptor(store) => {
                held.insert(store.name, (descriptor.unwrap(), Vec::new()));
                Ok(done)
            }
            Request::DropDescriptor(drop) => held.remove(&drop.name).map(|_| done).ok_or_else(not_there),
            Request::ListDescriptors(_) => {
                Ok(Reply::Descriptors(pb::DescriptorList { names: held.keys().cloned().collect() }))
            }
            Request::TakeDescriptor(take) => {
                let again = |(kept, heard): &mut (OwnedFd, Vec<u8>)| {
                    (kept.try_clone().unwrap(), std::mem::take(heard))
                };
                let taken = held.get_mut(&take.name).map(again).ok_or_else(not_there);
                if let Answer::Taker(taker) = answer {
                    taker.send(taken).unwrap();
                }
                return;
            }
            _ => Err(CallError::Unsupported),
        };
        if let Answer::Caller(caller) = answer {
            caller.send(reply).unwrap();
        }
    }
}

fn not_there() -> CallError {
    CallError::Refused(pb::KeeperError { kind: pb::KeeperErrorKind::NotFound.into(), ..Default::default() })
}
