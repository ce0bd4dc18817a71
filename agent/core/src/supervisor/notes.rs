//! The instance's own history: what was done with it and seen of it that neither its state nor its exits show.
//!
//! Each note has a number that rises for as long as the instance is on any host, so that the hub, which is told the
//! newest few with every report, makes an event of each once.

use nave_proto::manifest::format_size;
use nave_proto::pb;

use super::Supervisor;
use super::action::{Action, Level};

/// Kept until newer ones push them out: what happens between two reports, which are seconds apart at worst.
const NOTES_MAX: usize = 8;
/// The numbers of an epoch begin above those of the one before, which another host may have given.
const EPOCH_BITS: u32 = 20;

impl Supervisor {
    /// `text` continues "web.0 (i-42) " and is followed by the host.
    pub(super) fn note(&mut self, kind: &str, text: String) {
        let after = self.notes.last().map_or(0, |note| note.number + 1);
        let number = after.max(self.epoch << EPOCH_BITS);
        if self.notes.len() == NOTES_MAX {
            self.notes.remove(0);
        }
        self.notes.push(pb::InstanceNote { number, kind: kind.to_owned(), text });
    }

    /// Of those that an ended process left in its cgroup.
    pub(super) fn note_killed(&mut self, killed: u32) {
        let what = match killed {
            0 => return,
            1 => "left a process behind, which was killed".to_owned(),
            _ => format!("left {killed} processes behind, which were killed"),
        };
        self.note("instance_left_processes", what);
    }

    pub(super) fn memory_short(&mut self, used_bytes: u64, limit_bytes: u64, out: &mut Vec<Action>) {
        if self.state.process().is_none() {
            return;
        }
        let mebibytes = |bytes: u64| format_size(bytes >> 20 << 20);
        let text =
            format!("is short of memory: it uses {} of {}", mebibytes(used_bytes), mebibytes(limit_bytes));
        out.push(Action::Log { level: Level::Warn, message: text.clone() });
        self.note("instance_memory_short", text);
    }
}
