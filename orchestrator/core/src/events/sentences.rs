//! What a report of one instance tells that none before it has: notes, ends of processes, and where it stands now, each
//! end in one sentence.

use nave_proto::pb;
use nave_proto::pb::observed::State;

use super::{called, ended, instance_event, untold_exit, untold_notes};
use crate::wants::InstanceExt as _;

/// Each a kind and a sentence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Sentences {
    /// In the order in which it happened.
    pub(crate) history: Vec<(String, String)>,
    pub(crate) state: Option<(&'static str, String)>,
}

/// `ends`: None when only the newest is told, as `last_exit`.
pub(crate) fn sentences(
    before: &pb::InstanceRecord,
    after: &pb::InstanceRecord,
    notes: Vec<pb::InstanceNote>,
    ends: Option<Vec<pb::EndNote>>,
    host: &str,
) -> Sentences {
    let Some(ends) = ends else { return of_the_newest(before, after, notes, host) };
    let is_news = attempt(after.last_exit.as_ref()) > attempt(before.last_exit.as_ref());
    let state = match is_news {
        true => instance_event(before, after, host),
        false => event_after_an_end(before, after, host),
    };
    // The state says it, and what comes of it.
    let said = attempt(ended_state(after)).filter(|_| is_news && state.is_some());
    // From a ledger of an older agent.
    let is_newest = |end: &pb::EndNote| attempt(end.exit.as_ref()) == attempt(after.last_exit.as_ref());
    let newest = untold_exit(before, after, host).filter(|_| !ends.iter().any(is_newest));
    let newest = newest.map(|(kind, text)| (u64::MAX, kind.to_owned(), text));
    let ends = untold_ends(before, ends).into_iter().filter(|end| attempt(end.exit.as_ref()) != said);
    let ends = ends.map(|end| (end.number, "instance_exited".to_owned(), sentence(after, &end, host)));
    let mut history: Vec<_> = untold_notes(before, notes, host).chain(ends).chain(newest).collect();
    history.sort_by_key(|(number, ..)| *number);
    Sentences { history: history.into_iter().map(|(_, kind, text)| (kind, text)).collect(), state }
}

/// Ends that are told late, by a report of what is no more the newest placement or attempt.
pub(crate) fn late_sentences(
    before: &pb::InstanceRecord,
    ends: Vec<pb::EndNote>,
    host: &str,
) -> Vec<(String, String)> {
    let ends = untold_ends(before, ends);
    ends.iter().map(|end| ("instance_exited".to_owned(), sentence(before, end, host))).collect()
}

fn of_the_newest(
    before: &pb::InstanceRecord,
    after: &pb::InstanceRecord,
    notes: Vec<pb::InstanceNote>,
    host: &str,
) -> Sentences {
    let exit = untold_exit(before, after, host).map(|(kind, text)| (kind.to_owned(), text));
    let notes = untold_notes(before, notes, host).map(|(_, kind, text)| (kind, text));
    Sentences { history: notes.chain(exit).collect(), state: instance_event(before, after, host) }
}

/// Those that no earlier report has told, as a note or, in an earlier format, as the newest.
fn untold_ends(before: &pb::InstanceRecord, ends: Vec<pb::EndNote>) -> Vec<pb::EndNote> {
    let known = attempt(before.last_exit.as_ref());
    let is_untold = |end: &pb::EndNote| end.number > before.note && attempt(end.exit.as_ref()) > known;
    ends.into_iter().filter(is_untold).collect()
}

fn sentence(record: &pb::InstanceRecord, end: &pb::EndNote, host: &str) -> String {
    let lost = match end.lost {
        0 => String::new(),
        1 => ", and 1 more end before this, not kept".to_owned(),
        lost => format!(", and {lost} more ends before this, not kept"),
    };
    format!("{} {} on {host}{lost}", called(record), ended(end.exit.as_ref()))
}

fn attempt(exit: Option<&pb::ExitRecord>) -> Option<(u64, u32)> {
    exit.map(|exit| (exit.epoch, exit.attempt))
}

/// The end that a state is about.
fn ended_state(record: &pb::InstanceRecord) -> Option<&pb::ExitRecord> {
    match record.state()? {
        State::BackingOff(backing_off) => backing_off.last_exit.as_ref(),
        State::Exited(exited) => exited.exit.as_ref(),
        State::Failed(failed) => failed.last_exit.as_ref(),
        State::Pending(_)
        | State::Starting(_)
        | State::Running(_)
        | State::Stopping(_)
        | State::Lost(_)
        | State::Unknown(_) => None,
    }
}

/// As [`instance_event`], when the end that the state is about was told before: what came of it alone.
fn event_after_an_end(
    before: &pb::InstanceRecord,
    after: &pb::InstanceRecord,
    host: &str,
) -> Option<(&'static str, String)> {
    let event = instance_event(before, after, host)?;
    let why = if after.reason.is_empty() { String::new() } else { format!(": {}", after.reason) };
    match after.state()? {
        State::BackingOff(_) if after.reason.is_empty() => None,
        State::BackingOff(_) => {
            Some(("instance_not_started", format!("{} is not started yet on {host}{why}", called(after))))
        }
        State::Exited(_) => None,
        State::Failed(_) => {
            let why = why.replacen(": given up: ", ": ", 1);
            Some(("instance_failed", format!("{} was given up on {host}{why}", called(after))))
        }
        State::Pending(_)
        | State::Starting(_)
        | State::Running(_)
        | State::Stopping(_)
        | State::Lost(_)
        | State::Unknown(_) => Some(event),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wants::observed;
    use pb::observed::{BackingOff, Exited, Failed, Running, Stopping};

    fn exit(attempt: u32) -> Option<pb::ExitRecord> {
        let cause = pb::ExitCause::Exit.into();
        Some(pb::ExitRecord { epoch: 1, attempt, cause, code: 1, ran_ms: 5, ..Default::default() })
    }

    fn end(number: u64, attempt: u32) -> pb::EndNote {
        pb::EndNote { number, exit: exit(attempt), lost: 0 }
    }

    fn instance(state: State, attempt: u32, last: Option<pb::ExitRecord>) -> pb::InstanceRecord {
        pb::InstanceRecord {
            id: 42,
            service: "web".into(),
            attempt,
            note: 10,
            observed: observed(state),
            last_exit: last,
            ..Default::default()
        }
    }

    fn running() -> State {
        State::Running(Running { ready: true, ..Default::default() })
    }

    fn backing_off(attempt: u32) -> State {
        State::BackingOff(BackingOff { until_unix_ns: 1, last_exit: exit(attempt) })
    }

    fn told(before: &pb::InstanceRecord, after: &pb::InstanceRecord, ends: Vec<pb::EndNote>) -> Vec<String> {
        let sentences = sentences(before, after, Vec::new(), Some(ends), "alpha");
        let state = sentences.state.map(|(kind, text)| (kind.to_owned(), text));
        let all = sentences.history.into_iter().chain(state);
        all.map(|(kind, text)| format!("{kind}: {}", text.replacen("web.0 (i-42) ", "", 1))).collect()
    }

    #[test]
    fn each_end_is_one_sentence_whatever_came_of_it() {
        let plain = "instance_exited: exited with code 1 after 5 ms on alpha";
        let (run, stopping) = (running, || State::Stopping(Stopping::default()));
        let exited = |attempt| State::Exited(Exited { exit: exit(attempt) });
        let failed = |attempt| State::Failed(Failed { last_exit: exit(attempt) });
        // state, attempt and newest end: before and after; ends in the report -> sentences
        for (before, after, ends, expected) in [
            // Started again at once, and once more after the last report.
            (
                (run(), 1, 0),
                (run(), 3, 2),
                vec![end(11, 1), end(12, 2)],
                vec![plain, plain, "instance_ready: is ready on alpha"],
            ),
            // From a ledger that did not keep it.
            ((run(), 1, 0), (run(), 2, 1), vec![], vec![plain, "instance_ready: is ready on alpha"]),
            // Those between, and the one that it waits after.
            (
                (run(), 1, 0),
                (backing_off(2), 2, 2),
                vec![end(11, 1), end(12, 2)],
                vec![plain, "instance_exited: exited with code 1 after 5 ms on alpha, is started again"],
            ),
            (
                (run(), 1, 0),
                (failed(1), 1, 1),
                vec![end(11, 1)],
                vec!["instance_failed: exited with code 1 after 5 ms on alpha and was given up"],
            ),
            // Repeated, and from a ledger that has not heard that it was told.
            ((backing_off(2), 2, 2), (backing_off(2), 2, 2), vec![end(9, 1), end(10, 2)], vec![]),
            // Told in an earlier format, which does not count the number.
            ((run(), 2, 1), (stopping(), 2, 1), vec![end(11, 1)], vec![]),
            // Ended as it was told to, which is told before it is gone.
            ((run(), 1, 0), (stopping(), 1, 1), vec![end(11, 1)], vec![plain]),
            ((stopping(), 1, 1), (exited(1), 1, 1), vec![], vec![]),
            ((stopping(), 1, 0), (exited(1), 1, 1), vec![end(11, 1)], vec![plain]),
            // It waits again, without another end.
            ((State::Starting(pb::observed::Starting {}), 1, 1), (backing_off(1), 1, 1), vec![], vec![]),
            (
                (backing_off(1), 1, 1),
                (failed(1), 1, 1),
                vec![],
                vec!["instance_failed: was given up on alpha"],
            ),
        ] {
            let record = |(state, attempt, last): (State, u32, u32)| {
                instance(state, attempt, if last == 0 { None } else { exit(last) })
            };
            let (before, after) = (record(before), record(after));
            assert_eq!(told(&before, &after, ends), expected, "{before:?} {after:?}");
        }
    }

    #[test]
    fn why_it_waits_is_told_without_an_end_that_was_told() {
        let before = instance(State::Starting(pb::observed::Starting {}), 1, exit(1));
        let reason = "port 80 is taken".to_owned();
        let after = pb::InstanceRecord { reason, ..instance(backing_off(1), 1, exit(1)) };
        let expected = "instance_not_started: is not started yet on alpha: port 80 is taken";
        assert_eq!(told(&before, &after, Vec::new()), [expected]);
    }

    #[test]
    fn notes_and_ends_come_in_their_order_and_with_what_is_missing() {
        let note = |number, text: &str| pb::InstanceNote {
            number,
            kind: "instance_stop".to_owned(),
            text: text.to_owned(),
        };
        let (before, after) = (instance(running(), 1, None), instance(running(), 3, exit(2)));
        let ends = vec![pb::EndNote { lost: 5, ..end(12, 1) }, pb::EndNote { lost: 1, ..end(14, 2) }];
        let notes = vec![note(11, "first"), note(13, "third")];
        let told = sentences(&before, &after, notes, Some(ends), "alpha").history;
        let told: Vec<_> = told.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(
            told,
            [
                "web.0 (i-42) first on alpha",
                "web.0 (i-42) exited with code 1 after 5 ms on alpha, and 5 more ends before this, not kept",
                "web.0 (i-42) third on alpha",
                "web.0 (i-42) exited with code 1 after 5 ms on alpha, and 1 more end before this, not kept",
            ]
        );
    }
}
