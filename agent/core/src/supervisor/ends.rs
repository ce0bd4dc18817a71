//! How attempts ended, each kept until the hub has committed a report that tells it, however long the hub is away.

use nave_proto::pb;

use super::Supervisor;
use super::events::is_of;
use super::input::ProcessKey;

/// Kept of one instance. An end is some 40 bytes and its message, so that the record in the ledger, written at each step
/// of an instance that comes and goes, stays below 8 KiB of them. With the default budget an instance is given up long
/// before.
pub(super) const ENDS_MAX: usize = 32;
/// Of a message that goes with one.
const MESSAGE_CHARS_MAX: usize = 200;

impl Supervisor {
    /// An attempt is over. The keeper's record may come after our own note of the same end, and says it better.
    pub(super) fn note_end(&mut self, exit: pb::ExitRecord) {
        let key = ProcessKey { epoch: exit.epoch, attempt: exit.attempt };
        let (told, was_told) = (Some(for_people(&exit)), self.has_ended(key));
        let of_it = |end: &&mut pb::EndNote| end.exit.as_ref().is_some_and(|exit| is_of(exit, key));
        match self.ends.iter_mut().find(of_it) {
            Some(end) => end.exit = told,
            None if was_told => {} // and committed
            None => {
                let number = self.next_note();
                self.ends.push(pb::EndNote { number, exit: told, lost: 0 });
                self.drop_oldest();
            }
        }
        self.last_exit = Some(exit);
    }

    /// The next one says how many are missing before it.
    fn drop_oldest(&mut self) {
        if self.ends.len() > ENDS_MAX {
            let lost = self.ends.remove(0).lost + 1;
            if let Some(next) = self.ends.first_mut() {
                next.lost += lost;
            }
        }
    }

    /// A report with all up to that number is committed. That is no news, neither for the hub nor for the ledger: what is
    /// told again after a restart of the agent is known there by its number.
    pub(crate) fn ends_told(&mut self, up_to: u64) {
        let reported = self.reported.as_mut().map(|report| &mut report.ends);
        let persisted = self.persisted.as_mut().map(|ledger| &mut ledger.ends);
        for ends in [Some(&mut self.ends), reported, persisted].into_iter().flatten() {
            ends.retain(|end| end.number > up_to);
        }
    }
}

/// Without what only the agent acts upon.
fn for_people(exit: &pb::ExitRecord) -> pb::ExitRecord {
    pb::ExitRecord {
        epoch: exit.epoch,
        attempt: exit.attempt,
        cause: exit.cause,
        code: exit.code,
        signal: exit.signal,
        core_dumped: exit.core_dumped,
        errno: exit.errno,
        message: exit.message.chars().take(MESSAGE_CHARS_MAX).collect(),
        ended_unix_ns: exit.ended_unix_ns,
        ran_ms: exit.ran_ms,
        ..pb::ExitRecord::default()
    }
}
