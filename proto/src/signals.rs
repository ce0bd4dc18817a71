//! Linux's signals by name and number, the same on x86-64 and arm64.

const SIGNALS: [(i32, &str); 31] = [
    (1, "SIGHUP"),
    (2, "SIGINT"),
    (3, "SIGQUIT"),
    (4, "SIGILL"),
    (5, "SIGTRAP"),
    (6, "SIGABRT"),
    (7, "SIGBUS"),
    (8, "SIGFPE"),
    (9, "SIGKILL"),
    (10, "SIGUSR1"),
    (11, "SIGSEGV"),
    (12, "SIGUSR2"),
    (13, "SIGPIPE"),
    (14, "SIGALRM"),
    (15, "SIGTERM"),
    (16, "SIGSTKFLT"),
    (17, "SIGCHLD"),
    (18, "SIGCONT"),
    (19, "SIGSTOP"),
    (20, "SIGTSTP"),
    (21, "SIGTTIN"),
    (22, "SIGTTOU"),
    (23, "SIGURG"),
    (24, "SIGXCPU"),
    (25, "SIGXFSZ"),
    (26, "SIGVTALRM"),
    (27, "SIGPROF"),
    (28, "SIGWINCH"),
    (29, "SIGIO"),
    (30, "SIGPWR"),
    (31, "SIGSYS"),
];

/// `SIGTERM` for 15; real-time and unknown signals as `signal 34`.
pub fn name(number: i32) -> String {
    match SIGNALS.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("signal {number}"),
    }
}

/// 15 for `SIGTERM`, and for `TERM`.
pub fn number(name: &str) -> Option<i32> {
    SIGNALS
        .iter()
        .find(|(_, known)| *known == name || known.strip_prefix("SIG") == Some(name))
        .map(|(n, _)| *n)
}

/// Every name there is, for suggestions.
pub fn names() -> impl Iterator<Item = &'static str> {
    SIGNALS.iter().map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_has_one_name_with_and_without_its_prefix() {
        for (index, known) in names().enumerate() {
            let expected = i32::try_from(index).unwrap() + 1;
            assert_eq!(number(known), Some(expected));
            assert_eq!(number(&known[3..]), Some(expected));
            assert_eq!(name(expected), known);
        }
        assert_eq!(name(34), "signal 34");
        assert_eq!(number("SIGNOPE"), None);
    }
}
