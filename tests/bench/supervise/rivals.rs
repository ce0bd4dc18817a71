//! The same instances under other supervisors, as Debian packages them and with their defaults. Their system services
//! are not used: each is a child of this program, with a folder of its own.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nave_tests::process::Process;
use nix::sys::signal::Signal;

use super::exits::{INSTANCES, Notes, program};

/// One other supervisor.
pub(super) struct Rival {
    pub(super) name: &'static str,
    binary: &'static str,
    /// Writes its configuration into a folder and says how to start it.
    prepare: fn(&Path, &Path) -> anyhow::Result<Command>,
    /// Asks it to end, with its services.
    stop: Signal,
}

pub(super) const RIVALS: [Rival; 3] = [
    Rival { name: "runit", binary: "/usr/bin/runsvdir", prepare: runit, stop: Signal::SIGHUP },
    Rival { name: "s6", binary: "/usr/bin/s6-svscan", prepare: s6, stop: Signal::SIGTERM },
    Rival {
        name: "supervisord",
        binary: "/usr/bin/supervisord",
        prepare: supervisord,
        stop: Signal::SIGTERM,
    },
];

impl Rival {
    /// None when it is not installed.
    pub(super) fn measure(&self) -> anyhow::Result<Option<Vec<Duration>>> {
        if !Path::new(self.binary).exists() {
            return Ok(None);
        }
        let folder = tempfile::tempdir()?;
        let notes = Notes::new()?;
        let mut command = (self.prepare)(folder.path(), notes.dir())?;
        let mut process = Process::start(self.name, &mut command, &folder.path().join("said"))?;
        let gaps = notes.gaps();
        process.signal(self.stop);
        let _ = process.wait();
        gaps.map(Some)
    }
}

/// A folder per service with an executable `run`, which both know.
fn folders(folder: &Path, notes: &Path) -> anyhow::Result<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let services = folder.join("services");
    for number in 0..INSTANCES {
        let service = services.join(format!("i-{number}"));
        std::fs::create_dir_all(&service)?;
        let run = service.join("run");
        let text = format!("#!/bin/sh\nexec {} {} i-{number}\n", program().display(), notes.display());
        std::fs::write(&run, text)?;
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(services)
}

fn runit(folder: &Path, notes: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new("runsvdir");
    command.arg(folders(folder, notes)?);
    Ok(command)
}

fn s6(folder: &Path, notes: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new("s6-svscan");
    command.arg(folders(folder, notes)?);
    Ok(command)
}

fn supervisord(folder: &Path, notes: &Path) -> anyhow::Result<Command> {
    let mut text = format!(
        "[supervisord]\nnodaemon=true\nminfds=4096\nlogfile={0}/log\npidfile={0}/pid\nchildlogdir={0}\n",
        folder.display()
    );
    for number in 0..INSTANCES {
        text += &format!(
            "[program:i-{number}]\ncommand={} {} i-{number}\nautorestart=true\n",
            program().display(),
            notes.display()
        );
    }
    let config = folder.join("supervisord.conf");
    std::fs::write(&config, text)?;
    let mut command = Command::new("supervisord");
    command.arg("-c").arg(config);
    Ok(command)
}
