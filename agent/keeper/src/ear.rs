//! What a process says of itself while no agent reads it. A socket holds a dozen datagrams, then whoever speaks waits;
//! so the keeper reads in the agent's place, and whoever takes the socket hears it.

use nave_proto::pb;

use crate::ledger::Key;

/// Those of which a later word changes something.
const NAMES: [&[u8]; 7] =
    [b"READY", b"STOPPING", b"RELOADING", b"WATCHDOG", b"EXTEND_TIMEOUT_USEC", b"MAINPID", b"STATUS"];
/// This once is not made up for by feeding it again.
const TRIGGER: &[u8] = b"WATCHDOG=trigger";
const MORE_TIME: &[u8] = b"EXTEND_TIMEOUT_USEC=";
/// An agent shows no longer ones. With the names above a process costs the keeper 2 KiB at most, mostly some twenty bytes.
const LINE_BYTES_MAX: usize = 256;

/// Of a stored socket.
#[derive(Debug, Clone)]
pub(crate) struct Ear {
    /// Whose processes may speak.
    pub(crate) speaker: Key,
    pub(crate) heard: Heard,
    /// While we read it: what the loop calls it.
    pub(crate) open: Option<u32>,
}

impl Ear {
    pub(crate) fn new(speaker: pb::Speaker, heard: &[u8]) -> Self {
        let speaker = Key { instance_id: speaker.instance_id, epoch: speaker.epoch };
        let mut ear = Self { speaker, heard: Heard::default(), open: None };
        ear.heard.take(heard);
        ear
    }

    /// For the image that we become.
    pub(crate) fn speaker(&self) -> pb::Speaker {
        pb::Speaker { instance_id: self.speaker.instance_id, epoch: self.speaker.epoch }
    }
}

/// Lines `NAME=value`, the latest of each name, in the order in which they came.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    lines: Vec<Vec<u8>>,
}

impl Heard {
    /// One message.
    pub(crate) fn take(&mut self, message: &[u8]) {
        for line in message.split(|byte| *byte == b'\n') {
            let Some(subject) = subject(line) else { continue };
            let known = self.lines.iter().position(|before| self::subject(before) == Some(subject));
            let before = known.map(|at| self.lines.remove(at));
            let line = &line[..line.len().min(LINE_BYTES_MAX)];
            self.lines.push(before.filter(|before| asks_for_more(before, line)).unwrap_or(line.to_vec()));
        }
    }

    /// All of it as one message.
    pub(crate) fn message(&self) -> Vec<u8> {
        self.lines.join(&b'\n')
    }

    pub(crate) fn clear(&mut self) {
        self.lines = Vec::new();
    }
}

/// What a line is about; nothing when nobody would do anything about it.
fn subject(line: &[u8]) -> Option<&[u8]> {
    if line == TRIGGER {
        return Some(TRIGGER);
    }
    let name = line.split(|byte| *byte == b'=').next()?;
    (NAMES.contains(&name) && name.len() < line.len()).then_some(name)
}

/// Of two words that ask for time, the one that asks for more is as good as both.
fn asks_for_more(before: &[u8], line: &[u8]) -> bool {
    let asked = |line: &[u8]| -> Option<u64> {
        std::str::from_utf8(line.strip_prefix(MORE_TIME)?).ok()?.parse().ok()
    };
    asked(before) > asked(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(messages: &[&str]) -> String {
        let mut heard = Heard::default();
        messages.iter().for_each(|message| heard.take(message.as_bytes()));
        String::from_utf8(heard.message()).unwrap()
    }

    #[test]
    fn the_latest_of_each_name_is_kept_and_nothing_else() {
        let beats = ["WATCHDOG=1"; 1_000];
        assert_eq!(heard(&beats), "WATCHDOG=1");
        let said = heard(&["READY=1\nSTATUS=one", "FDSTORE=1\nREADY\n\n=", "STATUS=two", "WATCHDOG=1"]);
        assert_eq!(said, "READY=1\nSTATUS=two\nWATCHDOG=1");
        assert_eq!(heard(&["WATCHDOG=trigger", "WATCHDOG=1", "WATCHDOG=1"]), "WATCHDOG=trigger\nWATCHDOG=1");
        assert_eq!(heard(&[]), "");
    }

    #[test]
    fn the_most_time_that_was_asked_for_is_kept() {
        let more = "EXTEND_TIMEOUT_USEC=120000000";
        assert_eq!(heard(&[more, "EXTEND_TIMEOUT_USEC=5000000", "EXTEND_TIMEOUT_USEC=?"]), more);
        assert_eq!(heard(&["EXTEND_TIMEOUT_USEC=5000000", more]), more);
    }

    #[test]
    fn nobody_makes_it_large() {
        let long = format!("STATUS={}", "x".repeat(4_000));
        let status = |n: usize| format!("{n}=1\nSTATUS={n}\n{long}");
        let messages: Vec<String> = (0..100).map(status).collect();
        let messages: Vec<&str> = messages.iter().map(String::as_str).collect();
        assert_eq!(heard(&messages).len(), LINE_BYTES_MAX);
    }
}
