//! Runs the binary as a person would, and keeps what it said.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What one run of `nave` did.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: std::time::Duration,
}

impl Output {
    /// Both streams, for messages and searches.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// The output, when the run ended with `code`.
    ///
    /// # Panics
    /// With all that was said when it ended otherwise.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

/// The folder of built programs: the one this test was built into, so that profiles are never mixed.
pub fn target_dir() -> PathBuf {
    let me = std::env::current_exe().expect("/proc is mounted");
    let dir = me.parent().expect("a program lives in a folder");
    if dir.ends_with("deps") { dir.parent().expect("deps has a parent").to_owned() } else { dir.to_owned() }
}

/// The `nave` under test.
pub fn binary() -> PathBuf {
    existing("nave")
}

/// The example service.
pub fn hello() -> PathBuf {
    static HELLO: OnceLock<PathBuf> = OnceLock::new();
    HELLO.get_or_init(|| open_to_all("hello")).clone()
}

/// A service that speaks gRPC and WebSocket, as `speaker/main.rs` says.
pub fn speaker() -> PathBuf {
    static SPEAKER: OnceLock<PathBuf> = OnceLock::new();
    SPEAKER.get_or_init(|| open_to_all("nave-test-speaker")).clone()
}

/// The program, where users of services get to it. A clone below /root is closed to them, so there it is a copy.
fn open_to_all(name: &str) -> PathBuf {
    let path = existing(name);
    let is_open =
        |dir: &Path| std::fs::metadata(dir).is_ok_and(|found| found.permissions().mode() & 0o001 != 0);
    if path.ancestors().skip(1).all(is_open) {
        return path;
    }
    let dir = tempfile::Builder::new().prefix("nave-programs-").tempdir().expect("a folder").keep();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    let copy = dir.join(name);
    std::fs::copy(&path, &copy).expect("copied");
    copy
}

fn existing(name: &str) -> PathBuf {
    let path = target_dir().join(name);
    assert!(path.exists(), "{} is missing: run `make build` first", path.display());
    path
}

/// Runs `nave` with a client file.
pub fn run(context: Option<&Path>, args: &[&str], input: Option<&str>) -> Output {
    let mut command = Command::new(binary());
    command.args(args).env_remove("NAVE_CONTEXT").env("NO_COLOR", "1").env("HOME", "/nonexistent");
    if let Some(context) = context {
        command.env("NAVE_CONTEXT", context);
    }
    run_command(command, input)
}

/// Runs a prepared command to its end.
pub fn run_command(mut command: Command, input: Option<&str>) -> Output {
    use std::io::Write as _;
    use std::process::Stdio;
    let began = tokio::time::Instant::now();
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program under test can be started");
    if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
        // A program that has read enough may close its end.
        let _ = pipe.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().expect("the program under test ends");
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: began.elapsed(),
    }
}
