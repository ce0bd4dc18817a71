//! What a process says of itself, word by word (sd_notify).

use std::time::Duration;

use nave_agent_core::supervisor::Notification;

/// A status line for tables, not an essay.
const STATUS_CHARS_MAX: usize = 200;

/// Newline-separated `NAME=value`; what is not known is passed over.
pub(super) fn parse(message: &[u8]) -> Vec<Notification> {
    let text = String::from_utf8_lossy(message);
    text.lines()
        .filter_map(|line| match line.split_once('=')? {
            ("READY", "1") => Some(Notification::Ready),
            ("STOPPING", "1") => Some(Notification::Stopping),
            ("RELOADING", "1") => Some(Notification::Reloading),
            ("WATCHDOG", "1") => Some(Notification::Watchdog),
            ("WATCHDOG", "trigger") => Some(Notification::WatchdogTrigger),
            ("EXTEND_TIMEOUT_USEC", more) => {
                Some(Notification::ExtendTimeout(Duration::from_micros(more.parse().ok()?)))
            }
            ("MAINPID", pid) => Some(Notification::MainPid(pid.parse().ok()?)),
            ("STATUS", status) => Some(Notification::Status(status.chars().take(STATUS_CHARS_MAX).collect())),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_words_are_understood_and_others_passed_over() {
        let said = parse(b"STATUS=loading 3 of 7\nMAINPID=12\nREADY=1\nREADY=0\nnonsense\n");
        let main_pid = Notification::MainPid(12);
        assert_eq!(said, [Notification::Status("loading 3 of 7".into()), main_pid, Notification::Ready]);
        let said =
            parse(b"RELOADING=1\nWATCHDOG=1\nWATCHDOG=trigger\nEXTEND_TIMEOUT_USEC=1500000\nWATCHDOG=2\n");
        let more = Notification::ExtendTimeout(Duration::from_millis(1500));
        assert_eq!(
            said,
            [Notification::Reloading, Notification::Watchdog, Notification::WatchdogTrigger, more]
        );
        assert_eq!(parse(b"\xff\xfe\0"), []);
    }
}
