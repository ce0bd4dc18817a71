//! The two files beside a keeper's program that an upgrade needs: `NAME.new`, which is to take its place by renaming,
//! and `NAME.previous`, a copy of what runs now, to be put back. The latter is taken from the running image, so that
//! it is right also when somebody has replaced the file already.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::context::plain;
use crate::failure::Failure;

/// Both files; the staged one is removed with this unless the keeper took it.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) staged: PathBuf,
    pub(super) previous: PathBuf,
}

impl Stage {
    /// Copies `new` and the image of process `keeper` beside `program`, durably.
    pub(super) fn make(new: &Path, program: &Path, keeper: u32) -> Result<Self, Failure> {
        let stage = Self { staged: beside(program, "new"), previous: beside(program, "previous") };
        copy(new, &stage.staged)?;
        copy(Path::new(&format!("/proc/{keeper}/exe")), &stage.previous)?;
        Ok(stage)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Gone when it was taken.
        let _ = fs::remove_file(&self.staged);
    }
}

/// `/usr/bin/nave.new`.
fn beside(program: &Path, what: &str) -> PathBuf {
    let mut name = program.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(what);
    program.with_file_name(name)
}

/// Written under another name first, as the target may be a program that still runs.
fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    let partial = beside(to, "part");
    let copied = (|| {
        fs::copy(from, &partial)?;
        let mode = fs::metadata(&partial)?.permissions().mode();
        fs::set_permissions(&partial, fs::Permissions::from_mode(mode | 0o111))?;
        File::open(&partial)?.sync_all()?;
        fs::rename(&partial, to)
    })();
    copied.map_err(|error| {
        let _ = fs::remove_file(&partial);
        Failure::refused(format!("cannot copy {} to {}: {}", from.display(), to.display(), plain(&error)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lie_beside_the_program_and_what_was_not_taken_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (new, program) = (dir.path().join("download"), dir.path().join("nave"));
        fs::write(&new, "new").unwrap();
        fs::write(&program, "old").unwrap();
        let stage = Stage::make(&new, &program, std::process::id()).unwrap();
        assert_eq!(stage.staged, dir.path().join("nave.new"));
        assert_eq!(fs::read(&stage.staged).unwrap(), b"new");
        assert_ne!(fs::metadata(&stage.staged).unwrap().permissions().mode() & 0o111, 0, "can be executed");
        let own = fs::metadata("/proc/self/exe").unwrap().len();
        assert_eq!(fs::metadata(&stage.previous).unwrap().len(), own, "the image that runs");
        let staged = stage.staged.clone();
        drop(stage);
        assert!(!staged.exists() && program.exists());
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = Stage::make(&dir.path().join("none"), &dir.path().join("nave"), std::process::id());
        assert!(error.unwrap_err().to_string().contains("none"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    }
}
