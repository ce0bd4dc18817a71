//! The instance's own history: what was done with it and seen of it that neither its state nor its exits show.
//!
//! Each note has a number that rises for as long as the instance is on any host, so that the hub, which is told the
//! newest few with every report, makes an event of each once.

use std::collections::BTreeSet;

use nave_proto::manifest::format_size;
use nave_proto::pb;

use super::Supervisor;
use super::action::{Action, Level};
use crate::env::UnknownName;

/// Kept until newer ones push them out: what happens between two reports, which are seconds apart at worst.
const NOTES_MAX: usize = 8;
/// So many names without a value are told; a script among the files may have hundreds.
const NAMES_MAX: usize = 5;
/// The numbers of an epoch begin above those of the one before, which another host may have given.
const EPOCH_BITS: u32 = 20;

impl Supervisor {
    /// `text` continues "web.0 (i-42) " and is followed by the host.
    pub(super) fn note(&mut self, kind: &str, text: String) {
        let number = self.next_note();
        if self.notes.len() == NOTES_MAX {
            self.notes.remove(0);
        }
        self.notes.push(pb::InstanceNote { number, kind: kind.to_owned(), text });
    }

    /// Numbers of ends are among them, so that the hub tells both in the order in which they happened.
    pub(super) fn next_note(&mut self) -> u64 {
        self.last_note = (self.last_note + 1).max(self.epoch << EPOCH_BITS);
        self.last_note
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

    /// Others of its cgroups were killed; its own end is told by its exit.
    pub(super) fn oom_outlived(&mut self, kills: u64, limit_bytes: u64, out: &mut Vec<Action>) {
        let who = if kills == 1 { "a child".to_owned() } else { format!("{kills} children") };
        let why = match limit_bytes {
            0 => "as the host ran out of memory".to_owned(),
            bytes => format!("at the memory limit of {}", format_size(bytes)),
        };
        let text = format!("had {who} killed {why}");
        out.push(Action::Log { level: Level::Warn, message: text.clone() });
        self.note("instance_oom_killed", text);
    }

    /// It goes on with them, since a shell may be meant to find them.
    pub(super) fn names_unknown(&mut self, names: &BTreeSet<UnknownName>, out: &mut Vec<Action>) {
        let named = names.iter().take(NAMES_MAX).map(|one| format!("${{{}}} in {}", one.name, one.place));
        let named = named.collect::<Vec<_>>().join(", ");
        let more = match names.len().saturating_sub(NAMES_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let text = format!(
            "has no value for {named}{more} (left as written: set it in env, or write $${{NAME}} where that is meant)"
        );
        out.push(Action::Log { level: Level::Warn, message: text.clone() });
        self.note("instance_names_unknown", text);
    }
}
