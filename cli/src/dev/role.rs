//! One member or one host of a dev cluster: how it is started, where it writes, how it is known again.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::process::Process;
use crate::context::plain;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Member,
    /// The process that dev watches is the keeper; the agent is the keeper's child.
    Agent,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Role {
    pub(super) kind: Kind,
    /// `member-1`, `agent-1`.
    pub(super) name: String,
    pub(super) folder: PathBuf,
    pub(super) config: PathBuf,
    /// All that it listens on, on the loopback.
    pub(super) ports: Vec<u16>,
}

/// A log that is older than this is put aside when a role starts.
const LOG_BYTES_MAX: u64 = 10 * 1024 * 1024;

impl Role {
    /// The process of an earlier dev, when it still runs.
    pub(super) fn running(&self) -> Option<Process> {
        let verb = match self.kind {
            Kind::Member => "orchestrator",
            Kind::Agent => "agent",
        };
        Process::of_pid_file(&self.pid_file(), &[verb, "--config", self.config.to_str()?])
    }

    /// The agent below a keeper, when it still runs.
    pub(super) fn agent_process(&self) -> Option<Process> {
        Process::of_pid_file(&self.folder.join("nave.pid"), &["agent-process", self.config.to_str()?])
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.join(match self.kind {
            Kind::Member => "nave.pid",
            Kind::Agent => "keeper.pid",
        })
    }

    /// Starts it in a process group of its own, so that Ctrl-C reaches dev alone and the order of stopping is dev's.
    ///
    /// # Errors
    /// Why it cannot be started, in words.
    pub(super) fn start(&self) -> Result<Process, String> {
        let program = std::env::current_exe()
            .map_err(|error| format!("dev cannot find its own program: {}", plain(&error)))?;
        let mut command = self.command(&program).map_err(|error| {
            format!("its log {} cannot be opened: {}", self.log_file().display(), plain(&error))
        })?;
        let child = command.spawn().map_err(|error| cannot_run(&program, &error))?;
        Process::of_child(child).map_err(|error| format!("it cannot be watched: {}", plain(&error)))
    }

    fn command(&self, program: &Path) -> io::Result<Command> {
        let log = self.log()?;
        let mut command = Command::new(program);
        match self.kind {
            Kind::Member => command
                .arg("orchestrator")
                .arg("--config")
                .arg(&self.config)
                .arg("--pid-file")
                .arg(self.pid_file()),
            Kind::Agent => command.arg("agent").arg("--config").arg(&self.config),
        };
        command
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        Ok(command)
    }

    fn log(&self) -> io::Result<std::fs::File> {
        let path = self.log_file();
        if std::fs::metadata(&path).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
            std::fs::rename(&path, path.with_extension("log.1"))?;
        }
        OpenOptions::new().create(true).append(true).open(path)
    }

    pub(super) fn log_file(&self) -> PathBuf {
        self.folder.join("nave.log")
    }

    /// A member that was removed from the cluster; it wrote that down itself.
    pub(super) fn has_left(&self) -> bool {
        self.folder.join("data/removed").exists()
    }

    /// What it said last, which is often why it ended.
    pub(super) fn last_words(&self) -> Option<String> {
        const TAIL_BYTES: u64 = 4096;
        let mut file = std::fs::File::open(self.log_file()).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }
}

/// Linux calls a program so whose file is no longer where it was when the program began.
const DELETED: &str = " (deleted)";

fn cannot_run(program: &Path, error: &io::Error) -> String {
    let gone = program.to_str().and_then(|path| path.strip_suffix(DELETED));
    let Some(path) = gone else { return format!("{} cannot be run: {}", program.display(), plain(error)) };
    let was = if Path::new(path).exists() { "replaced by another" } else { "deleted" };
    format!("{path} was {was} since `nave dev` began; end `nave dev` and start it again")
}

/// Each role with its running process, if there is one.
pub(super) fn with_running(roles: &[Role]) -> Vec<(Role, Option<Process>)> {
    roles.iter().map(|role| (role.clone(), role.running())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_be_run_is_told_with_why() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("nave");
        let gone = PathBuf::from(format!("{} (deleted)", program.display()));
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(
            cannot_run(&program, &error),
            format!("{} cannot be run: no such file or directory", program.display())
        );
        assert!(cannot_run(&gone, &error).starts_with(&format!("{} was deleted since", program.display())));
        std::fs::write(&program, "").unwrap();
        let text = cannot_run(&gone, &error);
        assert!(text.starts_with(&format!("{} was replaced by another since", program.display())), "{text}");
    }

    #[test]
    fn the_last_line_of_the_log_is_what_a_role_said_last() {
        let dir = tempfile::tempdir().unwrap();
        let role = Role {
            kind: Kind::Member,
            name: "member-1".into(),
            folder: dir.path().into(),
            config: dir.path().join("member.toml"),
            ports: Vec::new(),
        };
        assert_eq!(role.last_words(), None);
        std::fs::write(role.log_file(), format!("{}\nerror: disk full\n\n", "x".repeat(9000))).unwrap();
        assert_eq!(role.last_words().as_deref(), Some("error: disk full"));
    }
}
