//! A command run as a service itself is: its user, environment, cgroup, limits and view of the files. A health check or
//! a hook. It is a child of the agent, through `nave exec-check`, which enters all of that and becomes the command.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

/// The end of a failed command's output, for the reason.
const OUTPUT_CHARS_MAX: usize = 200;
/// As much of it is remembered while it runs.
const TAIL_BYTES: usize = 4096;
/// For what is still in the pipe when the command has ended. Others that it started may keep it open for ever.
const LAST_WORDS: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ServiceCommand {
    pub(crate) command: Vec<String>,
    /// `NAME=value`, the whole environment.
    pub(crate) env: Vec<String>,
    pub(crate) working_dir: String,
    /// For `nave exec-check`; empty: the command is run as it is.
    pub(crate) orders: Vec<u8>,
}

impl ServiceCommand {
    /// Runs it to its end. `Err` says why it failed. When this is dropped before, it is killed with its group.
    pub(crate) async fn run(&self) -> Result<(), String> {
        let program = self.command.first().ok_or("the command is empty")?;
        let failed = |error: std::io::Error| format!("{program}: {error}");
        let mut child = self.prepare(program).spawn().map_err(failed)?;
        let mut group = Group(child.id());
        let mut stdin = child.stdin.take().expect("stdin is piped above");
        // A command that does not read gets its end all the same.
        let _unread = stdin.write_all(&self.orders).await;
        drop(stdin);
        let mut stderr = child.stderr.take().expect("stderr is piped above");
        let mut tail = Tail::default();
        let status = {
            let reading = tail.read(&mut stderr);
            tokio::pin!(reading);
            tokio::select! {
                status = child.wait() => {
                    // Best effort: what is said later is lost.
                    let _open = tokio::time::timeout(LAST_WORDS, reading).await;
                    status
                }
                () = &mut reading => child.wait().await,
            }
        };
        group.0 = None;
        let status = status.map_err(failed)?;
        match status.success() {
            true => Ok(()),
            false => Err(format!("{program} ended with {status}{}", tail.last_line())),
        }
    }

    fn prepare(&self, program: &str) -> tokio::process::Command {
        let mut command = if self.orders.is_empty() {
            let mut command = tokio::process::Command::new(program);
            command.args(&self.command[1..]).env_clear();
            command.envs(self.env.iter().filter_map(|pair| pair.split_once('=')));
            if !self.working_dir.is_empty() {
                command.current_dir(&self.working_dir);
            }
            command
        } else {
            // This very program, also when its file was replaced since.
            let mut command = tokio::process::Command::new("/proc/self/exe");
            command.arg("exec-check").env_clear();
            command
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        command
    }
}

/// A command that is given up goes with all that it has started. Its pid is not reaped before this is dropped, so
/// nobody else's group has that number.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.and_then(|pid| i32::try_from(pid).ok()) {
            let _gone = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
        }
    }
}

/// The last that a command has said. All is read, so that it never waits for us, and little is kept.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            self.0.extend_from_slice(&buffer[..count]);
            if self.0.len() > TAIL_BYTES {
                let excess = self.0.len() - TAIL_BYTES;
                self.0.drain(..excess);
            }
        }
    }

    fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        match text.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!(": {}", line.trim().chars().take(OUTPUT_CHARS_MAX).collect::<String>()),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> ServiceCommand {
        ServiceCommand {
            command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            env: vec!["PORT=7".into()],
            working_dir: "/".into(),
            orders: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_command_runs_with_the_given_environment() {
        assert_eq!(shell("[ \"$PORT\" = 7 ] && [ -z \"$HOME\" ]").run().await, Ok(()));
        let said = shell("echo starting >&2; echo no database >&2; exit 3").run().await.unwrap_err();
        assert_eq!(said, "/bin/sh ended with exit status: 3: no database");
    }

    #[tokio::test]
    async fn all_that_it_says_is_read_and_nobody_waits_for_what_it_leaves_behind() {
        // Far more than a pipe holds, by one that leaves its stderr open.
        let script =
            "head -c 1000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo the end >&2; sleep 60 & exit 4";
        let said = tokio::time::timeout(Duration::from_secs(30), shell(script).run()).await.unwrap();
        assert_eq!(said.unwrap_err(), "/bin/sh ended with exit status: 4: the end");
    }

    #[tokio::test]
    async fn a_command_that_is_given_up_takes_its_children_along() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let script = format!("sleep 60 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display());
        let child = loop {
            let late = tokio::time::timeout(Duration::from_millis(300), shell(&script).run()).await;
            late.unwrap_err();
            if let Ok(pid) = std::fs::read_to_string(&file) {
                break pid.trim().to_owned();
            }
        };
        let runs = || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        tokio::time::timeout(Duration::from_secs(20), async {
            while runs() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .unwrap();
    }
}
