//! A process that dev watches, its child or one that an earlier dev has left: a pidfd cannot come to mean another.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ExitStatus};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A running process.
#[derive(Debug)]
pub(super) struct Process {
    pidfd: OwnedFd,
    /// Ours to reap; an adopted process has another parent.
    child: Option<Child>,
}

impl Process {
    pub(super) fn of_child(child: Child) -> io::Result<Self> {
        let pidfd = open(child.id())?;
        Ok(Self { pidfd, child: Some(child) })
    }

    /// The process that a pid file names, when its command line has all of `words`: a number alone may have gone
    /// to a stranger since.
    pub(super) fn of_pid_file(file: &Path, words: &[&str]) -> Option<Self> {
        let pid: u32 = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        // Opened first: what is read below is then about this very process, or about nobody.
        let pidfd = open(pid).ok()?;
        let line = command_line(pid)?;
        let known = words.iter().all(|word| line.iter().any(|found| found == word));
        known.then_some(Self { pidfd, child: None })
    }

    pub(super) fn signal(&self, signal: Signal) {
        // The only way to fail is that it has ended, which is what the signal is for.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Waits for the end; the status of an adopted process is its parent's to know.
    pub(super) async fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        #[expect(
            deprecated,
            reason = "unsound only for a type that lies about its descriptor; an OwnedFd does not"
        )]
        let watched = AsyncFd::with_interest(self.pidfd.try_clone()?, Interest::READABLE)?;
        // Readable once it has ended, and from then on.
        watched.readable().await?.retain_ready();
        self.child.as_mut().map(Child::wait).transpose()
    }
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(raw, PidfdFlags::NONBLOCK)?)
}

/// The words a process was started with; nothing for one that has ended.
fn command_line(pid: u32) -> Option<Vec<String>> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<String> = bytes
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    (!words.is_empty()).then_some(words)
}

/// Of every process on this machine that may be looked at.
pub(super) fn command_lines() -> impl Iterator<Item = Vec<String>> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(command_line)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_child_is_watched_signalled_and_reaped() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut process = Process::of_child(child).unwrap();
        process.signal(Signal::TERM);
        let status = process.ended().await.unwrap().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15));
    }

    #[tokio::test]
    async fn a_process_is_adopted_only_when_it_is_what_the_file_meant() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("nave.pid");
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        std::fs::write(&file, format!("{}\n", child.id())).unwrap();
        assert!(Process::of_pid_file(&file, &["sleep", "999"]).is_none());
        // A process that has just been started has no command line for a moment.
        let mut adopted = loop {
            if let Some(process) = Process::of_pid_file(&file, &["sleep", "1000"]) {
                break process;
            }
            tokio::task::yield_now().await;
        };
        child.kill().unwrap();
        assert_eq!(adopted.ended().await.unwrap(), None);
        child.wait().unwrap();
        assert!(Process::of_pid_file(&file, &["sleep", "1000"]).is_none());
    }
}
