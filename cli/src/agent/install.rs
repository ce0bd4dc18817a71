//! `nave agent install`: the systemd unit of this host's keeper.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::args;
use crate::context::plain;
use crate::failure::Failure;
use crate::{out, roles};

/// By this we know our own units from what a person wrote.
const MARK: &str = "# Written by `nave agent install`.";

pub(super) fn run(args: &args::AgentInstall) -> Result<(), Failure> {
    // Also a check that it would start.
    roles::agent_config(&args.agent)?;
    let command = roles::agent_command(&args.agent, "agent")?;
    let words: Vec<String> = command
        .into_iter()
        .map(|word| word.into_string().map_err(|word| Failure::refused(format!("{word:?} is not UTF-8"))))
        .collect::<Result<_, _>>()?;
    let unit = unit(&words)?;
    if args.print {
        out::raw(unit.as_bytes());
        return Ok(());
    }
    verify(&unit)?;
    write(&args.unit, &unit)?;
    let name = args.unit.file_name().unwrap_or_default().to_string_lossy().into_owned();
    out::line(format_args!("{} is written", args.unit.display()));
    out::hint(format_args!("systemctl daemon-reload && systemctl enable --now {name}"));
    Ok(())
}

/// The text. `KillMode=process` and `Delegate=yes` are what lets services outlive keeper and agent.
fn unit(command: &[String]) -> Result<String, Failure> {
    let command = command.iter().map(|word| quoted(word)).collect::<Result<Vec<_>, _>>()?.join(" ");
    Ok(format!(
        "{MARK} It is replaced when that is run again.
[Unit]
Description=Nave agent, which runs this host's services
Wants=network-online.target
After=network-online.target
# Whatever happens, it is tried again.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
Restart=always
RestartSec=1
# Services live in cgroups below this one and outlive it: a stop, a restart or an upgrade ends keeper and agent alone.
Delegate=yes
KillMode=process
TimeoutStopSec=30
# A service that runs out of memory is a matter of that service; keeper and agent go last.
OOMPolicy=continue
OOMScoreAdjust=-900
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"
    ))
}

/// One word of a command line as systemd.service(5) reads it.
fn quoted(word: &str) -> Result<String, Failure> {
    if word.contains(char::is_control) {
        return Err(Failure::refused(format!("{word:?} cannot stand in a unit file")));
    }
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=,+@".contains(c);
    Ok(if !word.is_empty() && word.chars().all(plain) { escaped } else { format!("\"{escaped}\"") })
}

/// Asks systemd, where there is one.
fn verify(unit: &str) -> Result<(), Failure> {
    let dir = std::env::temp_dir().join(format!("nave-install-{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
    let file = dir.join("nave-agent.service");
    let verdict = std::fs::write(&file, unit)
        .and_then(|()| Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&file).output());
    let _ = std::fs::remove_dir_all(&dir);
    match verdict {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(Failure::refused("systemd-analyze does not accept the unit")
                .details(said.lines().map(str::to_owned)))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            out::note("systemd-analyze is not there: the unit was not verified");
            Ok(())
        }
        Err(error) => Err(Failure::refused(format!("cannot run systemd-analyze: {}", plain(&error)))),
    }
}

/// Whole or not at all, and never over what somebody else wrote.
fn write(path: &Path, unit: &str) -> Result<(), Failure> {
    let cannot = |error: std::io::Error| {
        Failure::refused(format!("cannot write {}: {}", path.display(), plain(&error)))
    };
    match std::fs::read_to_string(path) {
        Ok(text) if !text.starts_with(MARK) => {
            return Err(Failure::refused(format!("{} is not one of ours", path.display()))
                .next("move it away, or choose another with --unit"));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(cannot(error)),
    }
    let beside: PathBuf = path.with_extension("service.new");
    std::fs::write(&beside, unit).and_then(|()| std::fs::rename(&beside, path)).map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_systemd_reads_them() {
        for (word, wanted) in [
            ("/usr/bin/nave", "/usr/bin/nave"),
            ("a b", "\"a b\""),
            ("50%$x", "\"50%%$$x\""),
            ("say \"x\\\"", "\"say \\\"x\\\\\\\"\""),
            ("", "\"\""),
        ] {
            assert_eq!(quoted(word).unwrap(), wanted);
        }
        quoted("a\nExecStart=/bin/evil").unwrap_err();
    }

    #[test]
    fn what_somebody_else_wrote_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nave-agent.service");
        let text = unit(&["/usr/bin/nave".to_owned(), "agent".to_owned()]).unwrap();
        write(&path, &text).unwrap();
        write(&path, &text).unwrap();
        std::fs::write(&path, "[Unit]\n").unwrap();
        assert!(write(&path, &text).unwrap_err().to_string().contains("not one of ours"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[Unit]\n");
    }
}
