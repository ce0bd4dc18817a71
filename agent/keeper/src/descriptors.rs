//! Named descriptors that the keeper holds for the agent: listening sockets that must outlive it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

/// Enough for a few listeners per service; each costs a descriptor in keeper and agent.
const DESCRIPTORS_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 255;

/// The store.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    held: BTreeMap<String, OwnedFd>,
}

impl Descriptors {
    /// Keeps a descriptor; one of the same name is closed.
    ///
    /// # Errors
    /// What is wrong with the name or the number of them.
    pub(crate) fn store(&mut self, name: String, descriptor: OwnedFd) -> Result<(), &'static str> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err("a descriptor's name has 1 to 255 bytes");
        }
        if self.held.len() >= DESCRIPTORS_MAX && !self.held.contains_key(&name) {
            return Err("4096 descriptors are stored already");
        }
        self.held.insert(name, descriptor);
        Ok(())
    }

    /// A second hold on all of them.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let held = self.held.iter().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?)));
        Ok(Self { held: held.collect::<io::Result<_>>()? })
    }

    /// A duplicate; the stored one stays.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn duplicate(&self, name: &str) -> io::Result<Option<OwnedFd>> {
        self.held.get(name).map(OwnedFd::try_clone).transpose()
    }

    /// Closes it; `false` when there is none.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        self.held.remove(name).is_some()
    }

    /// All of them, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &OwnedFd)> {
        self.held.iter()
    }
}
