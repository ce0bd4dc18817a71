//! Sockets that processes speak into: read here while no agent has them.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{Keeper, Source};
use crate::cgroup;
use crate::notice::{self, NOTICE_BYTES_MAX};

/// Read in one go, so that one that never stops talking holds up nobody.
const NOTICES_PER_TURN: usize = 64;

impl Keeper {
    /// No agent reads them any more.
    pub(crate) fn open_ears(&mut self) {
        for (name, fd, ear) in self.descriptors.ears() {
            if ear.open.is_some() {
                continue;
            }
            self.last_ear = self.last_ear.wrapping_add(1);
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Ear(self.last_ear).token());
            match self.epoll.add(fd, event) {
                Ok(()) => {
                    ear.open = Some(self.last_ear);
                    self.ears.insert(self.last_ear, name.clone());
                }
                Err(error) => crate::say!("what is said to {name:?} cannot be heard: {error}"),
            }
        }
    }

    /// An agent has this one, or nobody any longer. What we know of it goes with it.
    pub(super) fn close_ear(&mut self, name: &str) -> Vec<u8> {
        let Some((fd, ear)) = self.descriptors.ear(name) else { return Vec::new() };
        if let Some(number) = ear.open.take() {
            self.ears.remove(&number);
            // Closing our descriptor would not end it: others have the same socket.
            let _ = self.epoll.delete(fd);
        }
        let heard = ear.heard.message();
        ear.heard.clear();
        heard
    }

    pub(super) fn hear(&mut self, number: u32) {
        let Some(name) = self.ears.get(&number).cloned() else { return };
        let Some((fd, ear)) = self.descriptors.ear(&name) else { return };
        // Nobody is believed to be of a placement that we do not keep, and everybody where there are no cgroups.
        let Some(kept) = self.table.get(&ear.speaker) else { return drop(self.close_ear(&name)) };
        let group = cgroup::membership(&kept.spawn).and_then(Path::file_name).and_then(OsStr::to_str);
        let mut buffer = [0; NOTICE_BYTES_MAX];
        for _ in 0..NOTICES_PER_TURN {
            match notice::take(fd.as_fd(), &mut buffer) {
                Ok(notice) if group.is_none_or(|group| notice::is_of(notice.sender, group)) => {
                    ear.heard.take(&buffer[..notice.length]);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    crate::say!("what is said to {name:?} cannot be heard any more: {error}");
                    return drop(self.close_ear(&name));
                }
            }
        }
    }
}
