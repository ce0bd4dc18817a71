//! `nave agent install`: the systemd units of this host, one for keeper and agent and one for the services.
//!
//! Two, because on cgroup2 a group that limits those below it may hold no process itself: with the services below the
//! agent's own unit, systemd could not start that again while they run (docs/decisions/0004). The agent finds the
//! second by its name.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use nave_agent::services_unit;

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
    let units = units(&words, &args.unit)?;
    if args.print {
        units
            .iter()
            .for_each(|unit| out::raw(format!("# {}\n{}", unit.path.display(), unit.text).as_bytes()));
        return Ok(());
    }
    verify(&units)?;
    let were_there = units.iter().map(Unit::is_there).collect::<Result<Vec<_>, _>>()?;
    units.iter().try_for_each(Unit::write)?;
    units.iter().for_each(|unit| out::line(format_args!("{} is written", unit.path.display())));
    tell_how_to_go_on(&units, were_there == [true, false]);
    Ok(())
}

fn tell_how_to_go_on([agent, services]: &[Unit; 2], is_changed_over: bool) {
    out::hint(format_args!("systemctl daemon-reload && systemctl enable --now {}", agent.name));
    if is_changed_over {
        out::note(format_args!(
            "with cgroup v2, services that run already stay below {}, which systemd cannot start again meanwhile: \
             `systemctl start {}`, then `nave agent upgrade`, then `nave restart` each of them",
            agent.name, services.name
        ));
    }
}

/// One unit file.
struct Unit {
    path: PathBuf,
    name: String,
    text: String,
}

/// That of keeper and agent, which goes to `path`, and that of the services beside it.
fn units(command: &[String], path: &Path) -> Result<[Unit; 2], Failure> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !name.ends_with(".service") || name.contains('@') {
        return Err(Failure::usage(format!("{} is no name of a unit", path.display()))
            .next("choose one that ends with .service and is no template, such as nave-agent.service"));
    }
    let services = services_unit(&name);
    Ok([
        Unit { path: path.to_owned(), text: agent_text(command, &services)?, name: name.clone() },
        Unit { path: path.with_file_name(&services), text: services_text(&name), name: services },
    ])
}

/// `KillMode=process` and `Delegate=yes` are what lets services outlive keeper and agent. Without the other unit they
/// live below this one, as they do where limits are those of cgroup v1.
fn agent_text(command: &[String], services: &str) -> Result<String, Failure> {
    let command = command.iter().map(|word| quoted(word)).collect::<Result<Vec<_>, _>>()?.join(" ");
    Ok(format!(
        "{MARK} It is replaced when that is run again.
[Unit]
Description=Nave agent, which runs this host's services
Wants=network-online.target {services}
After=network-online.target {services}
# It is stopped before that one is, and started again with it.
PartOf={services}
# Whatever happens, it is tried again.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
Restart=always
RestartSec=1
# Services outlive it: a stop, a restart or an upgrade ends keeper and agent alone.
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

/// systemd removes the group of a unit that nobody is in, hence the process that sleeps. `ExitType=cgroup`: when that one
/// is killed, the others are left alone.
fn services_text(agent: &str) -> String {
    format!(
        "{MARK} It is replaced when that is run again.
[Unit]
Description=Nave's services on this host (stopping this ends them all)
# {agent}, which is stopped first, starts them in the control group of this unit and ends
# them there. Its own has to stay free of them: systemd cannot start a unit again whose
# control group hands out limits to others below it.
StartLimitIntervalSec=0

[Service]
Type=exec
# Keeps the control group while no service runs.
ExecStart=/bin/sleep infinity
ExitType=cgroup
Restart=always
RestartSec=1
Delegate=yes
OOMPolicy=continue
OOMScoreAdjust=-1000
TasksMax=infinity
"
    )
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
fn verify(units: &[Unit]) -> Result<(), Failure> {
    let dir = std::env::temp_dir().join(format!("nave-install-{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
    let files: Vec<PathBuf> = units.iter().map(|unit| dir.join(&unit.name)).collect();
    let verdict =
        units.iter().zip(&files).try_for_each(|(unit, file)| std::fs::write(file, &unit.text)).and_then(
            |()| Command::new("systemd-analyze").arg("verify").arg("--man=no").args(&files).output(),
        );
    let _ = std::fs::remove_dir_all(&dir);
    match verdict {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(Failure::refused("systemd-analyze does not accept the units")
                .details(said.lines().map(str::to_owned)))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            out::note("systemd-analyze is not there: the units were not verified");
            Ok(())
        }
        Err(error) => Err(Failure::refused(format!("cannot run systemd-analyze: {}", plain(&error)))),
    }
}

impl Unit {
    /// Whether there is one of ours; never written over is what somebody else wrote.
    fn is_there(&self) -> Result<bool, Failure> {
        match std::fs::read_to_string(&self.path) {
            Ok(text) if !text.starts_with(MARK) => {
                Err(Failure::refused(format!("{} is not one of ours", self.path.display()))
                    .next("move it away, or choose another with --unit"))
            }
            Ok(_) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.cannot_write(&error)),
        }
    }

    /// Whole or not at all.
    fn write(&self) -> Result<(), Failure> {
        let beside = self.path.with_extension("service.new");
        std::fs::write(&beside, &self.text)
            .and_then(|()| std::fs::rename(&beside, &self.path))
            .map_err(|error| self.cannot_write(&error))
    }

    fn cannot_write(&self, error: &std::io::Error) -> Failure {
        Failure::refused(format!("cannot write {}: {}", self.path.display(), plain(error)))
    }
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

    fn written(path: &Path) -> Result<[Unit; 2], Failure> {
        let units = units(&["/usr/bin/nave".to_owned(), "agent".to_owned()], path)?;
        units.iter().try_for_each(|unit| unit.is_there().map(|_| ()))?;
        units.iter().try_for_each(Unit::write)?;
        Ok(units)
    }

    #[test]
    fn what_somebody_else_wrote_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nave-agent.service");
        written(&path).unwrap();
        let [agent, services] = written(&path).unwrap();
        for theirs in [&agent.path, &services.path] {
            std::fs::write(theirs, "[Unit]\n").unwrap();
            let Err(refused) = written(&path) else { panic!("{} was written over", theirs.display()) };
            assert!(refused.to_string().contains("not one of ours"), "{refused}");
            assert_eq!(std::fs::read_to_string(theirs).unwrap(), "[Unit]\n");
            std::fs::remove_file(theirs).unwrap();
        }
    }

    #[test]
    fn the_two_units_name_each_other() {
        let [agent, services] =
            units(&["/n".to_owned()], Path::new("/etc/systemd/system/edge-agent.service"))
                .unwrap_or_else(|refused| panic!("{refused}"));
        assert_eq!(services.path, Path::new("/etc/systemd/system/edge-services.service"));
        for line in ["Wants=network-online.target ", "After=network-online.target ", "PartOf="] {
            let line = format!("{line}edge-services.service");
            assert!(agent.text.lines().any(|other| other == line), "{line}: {}", agent.text);
        }
        assert!(services.text.contains("edge-agent.service, which"), "{}", services.text);
        for strange in ["/etc/systemd/system/nave-agent", "nave-agent@.service"] {
            assert!(units(&["/n".to_owned()], Path::new(strange)).is_err(), "{strange}");
        }
    }
}
