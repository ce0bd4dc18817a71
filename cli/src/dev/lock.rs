//! One `nave dev` per directory: a lock that the kernel takes back when its holder dies, however it dies.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::context::plain;
use crate::failure::Failure;

/// Held as long as it lives. Close-on-exec, so that what dev starts does not hold it.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn take(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join("dev.lock");
        let cannot = |error: &std::io::Error| {
            Failure::refused(format!("cannot lock {}: {}", path.display(), plain(error)))
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| cannot(&error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                // Without the number the message is still true.
                drop(file.read_to_string(&mut pid));
                let holder =
                    if pid.trim().is_empty() { String::new() } else { format!(" (pid {})", pid.trim()) };
                return Err(Failure::refused(format!(
                    "another `nave dev`{holder} runs in {}",
                    dir.display()
                ))
                .next("use that one, or give this one its own --data-dir and --port"));
            }
            Err(error) => return Err(cannot(&error.into())),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|error| cannot(&error))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_refused_and_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        let failure = Lock::take(dir.path()).unwrap_err();
        assert!(failure.to_string().contains(&format!("pid {}", std::process::id())), "{failure}");
        drop(first);
        Lock::take(dir.path()).unwrap();
    }
}
