//! Keeps the roles running: one task for each, which starts it again when it dies, later each time while it does not
//! hold, and hands its process over when dev stops.

use std::process::ExitStatus;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::process::Process;
use super::role::Role;
use super::say;
use crate::context::plain;
use crate::failure::Failure;

/// A role and the process it has at the moment.
pub(super) type Held = (Role, Option<Process>);

/// All roles that have been started.
#[derive(Debug, Default)]
pub(super) struct Supervised {
    tasks: JoinSet<Held>,
    stop: CancellationToken,
}

impl Supervised {
    /// Adopts what runs, starts the rest, and watches all from now on.
    pub(super) fn start(&mut self, roles: Vec<Held>) -> Result<(), Failure> {
        for (role, running) in roles {
            let process = match running {
                Some(process) => process,
                None => role
                    .start()
                    .map_err(|why| Failure::refused(format!("cannot start {}: {why}", role.name)))?,
            };
            self.tasks.spawn(keep(role, process, self.stop.clone()));
        }
        Ok(())
    }

    /// Ends the watching, so that what ends from now on stays ended.
    pub(super) async fn hand_over(mut self) -> Vec<Held> {
        self.stop.cancel();
        let mut held = Vec::new();
        while let Some(task) = self.tasks.join_next().await {
            held.push(task.expect("keep() does not panic and is not aborted"));
        }
        held.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        held
    }
}

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A process that ran this long has held; the next start is prompt again.
const HELD: Duration = Duration::from_secs(10);

async fn keep(role: Role, process: Process, stop: CancellationToken) -> Held {
    let mut process = Ok(process);
    let mut backoff = BACKOFF_MIN;
    loop {
        let started = Instant::now();
        let why = match &mut process {
            Ok(running) => tokio::select! {
                () = stop.cancelled() => return (role, process.ok()),
                ended = running.ended() => match ended {
                    Ok(status) => how(status, || role.last_words()),
                    Err(error) => format!("can no longer be watched: {}", plain(&error)),
                },
            },
            Err(why) => format!("could not be started: {why}"),
        };
        if role.has_left() {
            say(format_args!("{} has left the cluster and stays ended", role.name));
            return (role, None);
        }
        if started.elapsed() >= HELD {
            backoff = BACKOFF_MIN;
        }
        say(format_args!("{} {why}; starting it again in {:.1} s", role.name, backoff.as_secs_f32()));
        tokio::select! {
            () = stop.cancelled() => return (role, None),
            () = tokio::time::sleep(backoff) => {}
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
        process = role.start();
    }
}

/// How it ended; of one that ended by itself, what it said last too.
fn how(status: Option<ExitStatus>, last_words: impl Fn() -> Option<String>) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    let Some(status) = status else { return "has ended".to_owned() };
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended".to_owned(),
        (Some(code), _) => match last_words() {
            Some(words) => format!("ended with exit code {code} ({words})"),
            None => format!("ended with exit code {code}"),
        },
        (None, Some(9)) => "was killed (SIGKILL)".to_owned(),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "has ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn an_end_is_told_in_words() {
        let status = |raw| Some(ExitStatus::from_raw(raw));
        let words = || Some("error: disk full".to_owned());
        assert_eq!(how(None, words), "has ended");
        assert_eq!(how(status(0x100), words), "ended with exit code 1 (error: disk full)");
        assert_eq!(how(status(9), words), "was killed (SIGKILL)");
        assert_eq!(how(status(6), words), "was ended by signal 6");
    }
}
