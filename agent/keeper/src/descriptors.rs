//! Named descriptors that the keeper holds for the agent: sockets that must outlive it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use crate::ear::Ear;

/// Enough for a thousand services that say how they are and the listeners of some thousand more; each costs a descriptor
/// in keeper and agent, and their names fit into one frame.
const DESCRIPTORS_MAX: usize = 8192;
const NAME_BYTES_MAX: usize = 120;

/// The store.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    held: BTreeMap<String, Held>,
}

#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) fd: OwnedFd,
    /// Where processes speak into it.
    pub(crate) ear: Option<Ear>,
}

impl Descriptors {
    /// Keeps a descriptor; one of the same name is closed.
    ///
    /// # Errors
    /// What is wrong with the name or the number of them.
    pub(crate) fn store(
        &mut self,
        name: String,
        descriptor: OwnedFd,
        ear: Option<Ear>,
    ) -> Result<(), &'static str> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err("a descriptor's name has 1 to 120 bytes");
        }
        if self.held.len() >= DESCRIPTORS_MAX && !self.held.contains_key(&name) {
            return Err("8192 descriptors are stored already");
        }
        self.held.insert(name, Held { fd: descriptor, ear });
        Ok(())
    }

    /// A second hold on all of them.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let again = |(name, held): (&String, &Held)| {
            Ok((name.clone(), Held { fd: held.fd.try_clone()?, ear: held.ear.clone() }))
        };
        Ok(Self { held: self.held.iter().map(again).collect::<io::Result<_>>()? })
    }

    /// A duplicate; the stored one stays.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn duplicate(&self, name: &str) -> io::Result<Option<OwnedFd>> {
        self.held.get(name).map(|held| held.fd.try_clone()).transpose()
    }

    /// Closes it; `false` when there is none.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        self.held.remove(name).is_some()
    }

    /// All of them, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Held)> {
        self.held.iter()
    }

    /// Those that processes speak into.
    pub(crate) fn ears(&mut self) -> impl Iterator<Item = (&String, &OwnedFd, &mut Ear)> {
        self.held.iter_mut().filter_map(|(name, held)| Some((name, &held.fd, held.ear.as_mut()?)))
    }

    /// One of those.
    pub(crate) fn ear(&mut self, name: &str) -> Option<(&OwnedFd, &mut Ear)> {
        self.held.get_mut(name).and_then(|held| Some((&held.fd, held.ear.as_mut()?)))
    }
}
