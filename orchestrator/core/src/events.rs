//! Lifecycle events as people read them: who did what, and why, in one sentence. Here are the words; the table is
//! `state/events.rs`.

mod sentences;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::observed::State;
use nave_proto::signals;

use crate::wants::InstanceExt as _;
pub(crate) use sentences::{Sentences, late_sentences, sentences};

/// A note is a sentence; an agent that says more is cut short.
const NOTE_CHARS_MAX: usize = 500;

/// Which events to read. Both unset: all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only those of this service, which may be deleted by now.
    pub service: Option<String>,
    /// Only those that happened on this host.
    pub host: Option<HostId>,
}

impl EventFilter {
    /// Whether an event is asked for.
    pub fn admits(&self, event: &pb::EventRecord) -> bool {
        self.service.as_ref().is_none_or(|service| *service == event.service)
            && self.host.is_none_or(|host| host.0 == event.host_id)
    }
}

/// What an event is about; the rest of its row comes from the command.
#[derive(Debug, Clone, Default)]
pub(crate) struct Subject {
    pub(crate) service: String,
    pub(crate) instance: u64,
    pub(crate) host: u64,
}

impl Subject {
    pub(crate) fn service(name: &str) -> Self {
        Self { service: name.to_owned(), ..Self::default() }
    }

    pub(crate) fn host(id: HostId) -> Self {
        Self { host: id.0, ..Self::default() }
    }

    pub(crate) fn instance(record: &pb::InstanceRecord) -> Self {
        Self { service: record.service.clone(), instance: record.id, host: record.host_id }
    }
}

/// `web.0 (i-42)`: how sentences name an instance.
pub(crate) fn called(record: &pb::InstanceRecord) -> String {
    format!("{}.{} ({})", record.service, record.ordinal, InstanceId(record.id))
}

/// Kind and sentence for what changed between two rows of one instance; None: nothing a person would miss.
pub(crate) fn instance_event(
    before: &pb::InstanceRecord,
    after: &pb::InstanceRecord,
    host: &str,
) -> Option<(&'static str, String)> {
    let who = called(after);
    let why = if after.reason.is_empty() { String::new() } else { format!(": {}", after.reason) };
    let fresh = std::mem::discriminant(&before.state()) != std::mem::discriminant(&after.state())
        || before.state().map(std::mem::discriminant) != after.state().map(std::mem::discriminant)
        || before.attempt != after.attempt;
    let (kind, what) = match after.state()? {
        State::Running(running) => {
            let was_ready = matches!(before.state(), Some(State::Running(old)) if old.ready);
            match (running.ready, was_ready, fresh) {
                (true, true, false) | (false, false, false) => return None,
                (true, _, _) => ("instance_ready", format!("is ready on {host}")),
                (false, true, false) => ("instance_not_ready", format!("is no longer ready on {host}{why}")),
                (false, _, true) => ("instance_started", format!("runs on {host}, not ready yet{why}")),
            }
        }
        State::BackingOff(backing_off) if fresh => {
            let how = ended(backing_off.last_exit.as_ref());
            // It says so itself already.
            let why = if how.contains(&after.reason) { "" } else { &why };
            ("instance_exited", format!("{how} on {host}, is started again{why}"))
        }
        State::Exited(exited) if fresh => {
            ("instance_exited", format!("{} on {host}{why}", ended(exited.exit.as_ref())))
        }
        State::Failed(failed) if fresh => {
            let why = why.replacen(": given up: ", ": ", 1);
            let how = ended(failed.last_exit.as_ref());
            ("instance_failed", format!("{how} on {host} and was given up{why}"))
        }
        State::Pending(_)
        | State::Starting(_)
        | State::Stopping(_)
        | State::Lost(_)
        | State::Unknown(_)
        | State::BackingOff(_)
        | State::Exited(_)
        | State::Failed(_) => return None,
    };
    Some((kind, format!("{who} {what}")))
}

/// The end of a process that `after` has and `before` had not, when its state does not tell it: a process that was
/// started again at once, or while the hub was away, would else have ended unseen. After `Stopping` comes `Exited`.
pub(crate) fn untold_exit(
    before: &pb::InstanceRecord,
    after: &pb::InstanceRecord,
    host: &str,
) -> Option<(&'static str, String)> {
    let told = matches!(
        after.state(),
        Some(State::Stopping(_) | State::BackingOff(_) | State::Exited(_) | State::Failed(_))
    );
    let exit = after.last_exit.as_ref().filter(|_| !told)?;
    let attempt_of = |exit: &pb::ExitRecord| (exit.epoch, exit.attempt);
    if before.last_exit.as_ref().map(attempt_of) >= Some(attempt_of(exit)) {
        return None;
    }
    Some(("instance_exited", format!("{} {} on {host}", called(after), ended(Some(exit)))))
}

/// What became of a fetch for the successor of an instance, when that is news.
pub(crate) fn fetch_event(
    before: &pb::InstanceRecord,
    after: &pb::InstanceRecord,
    host: &str,
) -> Option<(&'static str, String)> {
    let fetch = after.fetch.as_ref().filter(|fetch| before.fetch.as_ref() != Some(fetch))?;
    let who = called(after);
    match (fetch.done, fetch.problem.as_str()) {
        (true, _) => Some((
            "instance_fetched",
            format!("{host} has what the successor of {who} needs, so it can be replaced"),
        )),
        (false, "") => None,
        (false, problem) => Some((
            "instance_fetch_failed",
            format!("{who} runs on, since {host} cannot fetch what its successor needs: {problem}"),
        )),
    }
}

/// What the agent notes that no earlier report has told, with its number. A kind that is no word is the agent's mistake, not an event's.
pub(crate) fn untold_notes(
    before: &pb::InstanceRecord,
    notes: Vec<pb::InstanceNote>,
    host: &str,
) -> impl Iterator<Item = (u64, String, String)> {
    let (told, who, host) = (before.note, called(before), host.to_owned());
    let is_word = |kind: &str| {
        kind.starts_with("instance_") && kind.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    };
    notes.into_iter().filter(move |note| note.number > told && is_word(&note.kind)).map(move |note| {
        let text: String = note.text.chars().take(NOTE_CHARS_MAX).collect();
        (note.number, note.kind, format!("{who} {text} on {host}"))
    })
}

/// How a process ended: `exited with code 3 after 1.2 s`.
pub(crate) fn ended(exit: Option<&pb::ExitRecord>) -> String {
    let Some(exit) = exit else { return "ended".to_owned() };
    let after = ran(exit.ran_ms);
    match exit.cause() {
        pb::ExitCause::ExecError if exit.message.is_empty() => "could not be started".to_owned(),
        pb::ExitCause::ExecError => format!("could not be started ({})", exit.message),
        pb::ExitCause::Exit => format!("exited with code {} after {after}", exit.code),
        pb::ExitCause::Signal => format!("was killed by {} after {after}", signals::name(exit.signal)),
        pb::ExitCause::Oom if exit.message.is_empty() => format!("ran out of memory after {after}"),
        pb::ExitCause::Oom => format!("ran out of memory after {after} ({})", exit.message),
        pb::ExitCause::Watchdog => format!("missed its watchdog after {after}"),
        pb::ExitCause::Probe => format!("failed its liveness probe after {after}"),
        pb::ExitCause::Operator => format!("was stopped by an operator after {after}"),
        pb::ExitCause::Hub => format!("was stopped after {after}"),
        pb::ExitCause::Unspecified => "ended, nobody saw how,".to_owned(),
    }
}

/// Milliseconds as people say them.
pub(crate) fn ran(ms: u64) -> String {
    match ms {
        0..=999 => format!("{ms} ms"),
        1_000..=59_999 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..=3_599_999 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wants::observed;

    fn instance(state: State, attempt: u32) -> pb::InstanceRecord {
        pb::InstanceRecord {
            id: 42,
            service: "web".into(),
            attempt,
            observed: observed(state),
            desired: pb::Desired::Run.into(),
            ..Default::default()
        }
    }

    fn running(ready: bool) -> State {
        State::Running(pb::observed::Running { ready, ..Default::default() })
    }

    fn exit(code: i32) -> Option<pb::ExitRecord> {
        let cause = pb::ExitCause::Exit.into();
        Some(pb::ExitRecord { cause, code, ran_ms: 1234, ..Default::default() })
    }

    #[test]
    fn each_turn_of_an_instance_has_its_sentence() {
        let pending = instance(State::Pending(pb::observed::Pending {}), 0);
        let up = instance(running(false), 1);
        let ready = instance(running(true), 1);
        let ready_again = instance(running(true), 2);
        let backing_off = pb::InstanceRecord {
            reason: "3 of 10 restarts used".into(),
            ..instance(
                State::BackingOff(pb::observed::BackingOff { until_unix_ns: 5, last_exit: exit(3) }),
                1,
            )
        };
        let failed = instance(State::Failed(pb::observed::Failed { last_exit: None }), 11);
        let reason = "given up: restarted 3 times within 24h".to_owned();
        let given_up = pb::InstanceRecord { reason, ..failed.clone() };
        let exit = pb::ExitRecord {
            cause: pb::ExitCause::ExecError.into(),
            message: "pre_start failed".into(),
            ..Default::default()
        };
        let not_started = pb::InstanceRecord {
            reason: exit.message.clone(),
            ..instance(
                State::BackingOff(pb::observed::BackingOff { last_exit: Some(exit), ..Default::default() }),
                11,
            )
        };
        for (before, after, expected) in [
            (&pending, &up, Some("web.0 (i-42) runs on alpha, not ready yet")),
            (&pending, &ready, Some("web.0 (i-42) is ready on alpha")),
            (&up, &ready, Some("web.0 (i-42) is ready on alpha")),
            (&ready, &up, Some("web.0 (i-42) is no longer ready on alpha")),
            (&ready, &ready, None),
            (&up, &up, None),
            (&ready, &ready_again, Some("web.0 (i-42) is ready on alpha")),
            (
                &ready,
                &backing_off,
                Some(
                    "web.0 (i-42) exited with code 3 after 1.2 s on alpha, is started again: 3 of 10 restarts used",
                ),
            ),
            (&backing_off, &backing_off, None),
            (&backing_off, &failed, Some("web.0 (i-42) ended on alpha and was given up")),
            (
                &up,
                &not_started,
                Some("web.0 (i-42) could not be started (pre_start failed) on alpha, is started again"),
            ),
            (
                &up,
                &given_up,
                Some("web.0 (i-42) ended on alpha and was given up: restarted 3 times within 24h"),
            ),
        ] {
            let found = instance_event(before, after, "alpha").map(|(_, sentence)| sentence);
            assert_eq!(found.as_deref(), expected);
        }
    }

    #[test]
    fn an_end_is_told_once() {
        let (before, with_exit) = (instance(running(true), 1), |state| pb::InstanceRecord {
            last_exit: exit(0).map(|exit| pb::ExitRecord { attempt: 1, ..exit }),
            ..instance(state, 1)
        });
        let stopping = with_exit(State::Stopping(pb::observed::Stopping::default()));
        let exited = with_exit(State::Exited(pb::observed::Exited { exit: exit(0) }));
        assert_eq!(untold_exit(&before, &stopping, "alpha"), None);
        assert_eq!(untold_exit(&stopping, &exited, "alpha"), None);
        let told = instance_event(&stopping, &exited, "alpha").map(|(_, sentence)| sentence);
        assert_eq!(told.as_deref(), Some("web.0 (i-42) exited with code 0 after 1.2 s on alpha"));
        // Started again at once: no other state tells it.
        assert!(untold_exit(&before, &with_exit(running(true)), "alpha").is_some());
    }

    #[test]
    fn a_note_is_told_once_and_only_as_what_it_is() {
        let before = pb::InstanceRecord { note: 7, ..instance(running(true), 1) };
        let note = |number, kind: &str| pb::InstanceNote {
            number,
            kind: kind.to_owned(),
            text: "was sent SIGTERM".to_owned(),
        };
        let notes = vec![
            note(7, "instance_stop"),
            note(8, "instance_stop"),
            note(9, "service_applied"),
            note(10, "instance_x\n"),
        ];
        let told: Vec<_> = untold_notes(&before, notes, "alpha").collect();
        let expected = (8, "instance_stop".to_owned(), "web.0 (i-42) was sent SIGTERM on alpha".to_owned());
        assert_eq!(told, [expected]);
    }

    #[test]
    fn times_read_as_people_say_them() {
        for (ms, text) in
            [(5, "5 ms"), (1_250, "1.2 s"), (61_000, "1 min 1 s"), (3_600_000 + 120_000, "1 h 2 min")]
        {
            assert_eq!(ran(ms), text);
        }
    }
}
