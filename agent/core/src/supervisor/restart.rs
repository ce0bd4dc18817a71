//! Whether and when an ended process is started again (orchestration.md 4.6).
//!
//! An end after a while of good running is answered at once, since most are one-off and every millisecond is an
//! outage. Others wait, twice as long each time, so that a broken program costs little. A ready minute wipes the slate. A sliding budget ends it, so that the hub can try another host.

use std::time::Duration;

use nave_proto::pb;
use rand::Rng;

use crate::monotonic::Monotonic;

/// A process that ran this long may be started again at once.
pub const UPTIME_FOR_RESTART_AT_ONCE: Duration = Duration::from_secs(10);
/// Ready this long, the back-off begins anew.
pub const READY_FOR_RESET: Duration = Duration::from_secs(60);
pub const BACKOFF_FIRST: Duration = Duration::from_millis(100);
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Starts in a row that may fail by an error that cannot heal by itself.
pub const EXEC_FAILURES_MAX: u32 = 3;
const BUDGET_RESTARTS: u32 = 10;
const BUDGET_WINDOW: Duration = Duration::from_secs(300);
/// Restarts remembered, whatever the budget: the ledger record stays small.
const WINDOW_RESTARTS_MAX: usize = 1_000;

/// What is remembered of earlier ends; all of it survives the agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestartMemory {
    /// Restarts decided in this epoch.
    pub restarts: u32,
    /// The next wait is 100 ms * 2^(step-1), and 0 stands for 1; a process that ran well does not wait.
    pub step: u32,
    /// When restarts were decided, oldest first; those inside the budget's window.
    pub window: Vec<Monotonic>,
    /// Starts in a row that failed by an error that cannot heal by itself.
    pub exec_failures: u32,
}

/// What to do about an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    StartAt(Monotonic),
    /// The policy says that this was that.
    Rest,
    GiveUp(String),
}

impl RestartMemory {
    /// Decides about an end; `why` is what happened, for the reason when it is the last.
    pub fn decide<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        restart: Option<&pb::Restart>,
        failed: bool,
        uptime: Duration,
        why: &str,
    ) -> Verdict {
        match policy(restart) {
            pb::RestartPolicy::Never => return Verdict::Rest,
            pb::RestartPolicy::OnFailure if !failed => return Verdict::Rest,
            pb::RestartPolicy::OnFailure | pb::RestartPolicy::Always | pb::RestartPolicy::Unspecified => {}
        }
        let (budget, window) = budget(restart);
        self.window.retain(|&at| now.since(at) < window);
        if self.window.len() >= usize::try_from(budget).unwrap_or(usize::MAX) {
            let spent = self.window.len();
            let again = if spent == 1 { "once".to_owned() } else { format!("{spent} times") };
            let window = human(window);
            return Verdict::GiveUp(format!(
                "given up: restarted {again} within {window}; the last time: {why}"
            ));
        }
        self.window.push(now);
        if self.window.len() > WINDOW_RESTARTS_MAX {
            self.window.remove(0);
        }
        self.restarts = self.restarts.saturating_add(1);
        Verdict::StartAt(now + self.next_delay(rng, uptime))
    }

    /// A wait without its place in the budget, for what is not the process's fault.
    pub fn next_delay<R: Rng + ?Sized>(&mut self, rng: &mut R, uptime: Duration) -> Duration {
        if uptime >= UPTIME_FOR_RESTART_AT_ONCE {
            return Duration::ZERO;
        }
        self.step = self.step.max(1);
        let delay = backoff(self.step);
        self.step = self.step.saturating_add(1);
        delay.mul_f64(rng.random_range(0.8..=1.2))
    }

    /// It has been ready for this long without a break.
    pub fn was_ready(&mut self, ready: Duration) {
        if ready >= READY_FOR_RESET {
            self.step = 0;
        }
    }

    /// Counts a start that cannot heal by itself; true when it was one too many.
    pub fn exec_failed(&mut self) -> bool {
        self.exec_failures = self.exec_failures.saturating_add(1);
        self.exec_failures >= EXEC_FAILURES_MAX
    }

    /// After a reboot the old clock is gone. How long ago the restarts were is unknown; taking the last as just
    /// now errs on the careful side and forgets none.
    pub fn rebase(&mut self, now: Monotonic) {
        let Some(&last) = self.window.last() else { return };
        for at in &mut self.window {
            *at = now - last.since(*at);
        }
    }
}

/// The wait of a step >= 1, before jitter.
#[must_use]
pub(super) fn backoff(step: u32) -> Duration {
    let doublings = step.saturating_sub(1).min(16);
    (BACKOFF_FIRST * (1 << doublings)).min(BACKOFF_MAX)
}

pub(super) fn policy(restart: Option<&pb::Restart>) -> pb::RestartPolicy {
    restart.map_or(pb::RestartPolicy::Always, pb::Restart::policy)
}

/// Allowed restarts and the window they count in.
fn budget(restart: Option<&pb::Restart>) -> (u32, Duration) {
    let Some(restart) = restart else { return (BUDGET_RESTARTS, BUDGET_WINDOW) };
    match super::duration(restart.budget_window.as_ref()) {
        None => (BUDGET_RESTARTS, BUDGET_WINDOW),
        Some(window) => (restart.budget_restarts, window),
    }
}

/// `5m`, `90s`.
fn human(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds >= 3600 && seconds % 3600 == 0 => format!("{}h", seconds / 3600),
        seconds if seconds >= 60 && seconds % 60 == 0 => format!("{}m", seconds / 60),
        seconds => format!("{seconds}s"),
    }
}

/// Whether an exit counts as a failure. What is not known does.
#[must_use]
pub(super) fn is_failure(exit: &pb::ExitRecord, restart: Option<&pb::Restart>) -> bool {
    let is_success =
        exit.code == 0 || restart.is_some_and(|restart| lists(&restart.success_codes, exit.code));
    !(exit.cause() == pb::ExitCause::Exit && is_success)
}

/// Whether the manifest says of this end that it would only come again.
#[must_use]
pub(super) fn is_fatal(exit: &pb::ExitRecord, restart: Option<&pb::Restart>) -> bool {
    exit.cause() == pb::ExitCause::Exit
        && restart.is_some_and(|restart| lists(&restart.fatal_codes, exit.code))
}

fn lists(codes: &[u32], code: i32) -> bool {
    u32::try_from(code).is_ok_and(|code| codes.contains(&code))
}

/// Errors of a start that come again until a person does something.
#[must_use]
pub(super) fn cannot_heal(errno: i32) -> bool {
    const EPERM: i32 = 1;
    const ENOENT: i32 = 2;
    const ENOEXEC: i32 = 8;
    const EACCES: i32 = 13;
    const ENOTDIR: i32 = 20;
    const EISDIR: i32 = 21;
    const EINVAL: i32 = 22;
    const ENAMETOOLONG: i32 = 36;
    const ELOOP: i32 = 40;
    const ELIBBAD: i32 = 80;
    // 0: the keeper knows no number, e.g. a user that does not exist.
    [0, EPERM, ENOENT, ENOEXEC, EACCES, ENOTDIR, EISDIR, EINVAL, ENAMETOOLONG, ELOOP, ELIBBAD]
        .contains(&errno)
}

/// Whether an end looks like a port that somebody else has.
#[must_use]
pub(super) fn hints_at_port(exit: &pb::ExitRecord) -> bool {
    const EADDRINUSE: i32 = 98;
    let message = exit.message.to_ascii_lowercase();
    exit.errno == EADDRINUSE || message.contains("address already in use") || message.contains("eaddrinuse")
}

/// `exited with status 1`: fits after "the process".
#[must_use]
pub fn describe(exit: &pb::ExitRecord) -> String {
    let core = if exit.core_dumped { " and left a core dump" } else { "" };
    match exit.cause() {
        pb::ExitCause::ExecError if exit.message.is_empty() => {
            format!("could not be started (errno {})", exit.errno)
        }
        pb::ExitCause::ExecError => format!("could not be started: {}", exit.message),
        pb::ExitCause::Exit => format!("exited with status {}{}", exit.code, after(&exit.message)),
        pb::ExitCause::Signal => {
            format!("was killed by {}{core}{}", signal_name(exit.signal), after(&exit.message))
        }
        pb::ExitCause::Oom if exit.message.is_empty() => {
            "was killed because it ran out of memory; see resources.memory".to_owned()
        }
        pb::ExitCause::Oom => format!("was killed because it ran out of memory: {}", exit.message),
        pb::ExitCause::Watchdog => "was ended because its watchdog was silent".to_owned(),
        pb::ExitCause::Probe => "was stopped because its liveness probe failed".to_owned(),
        pb::ExitCause::Operator => "was stopped by an operator".to_owned(),
        pb::ExitCause::Hub => "was stopped as the hub wanted".to_owned(),
        pb::ExitCause::Unspecified if exit.message.is_empty() => "ended; how is not known".to_owned(),
        pb::ExitCause::Unspecified => exit.message.clone(),
    }
}

/// What is known beside the plain end.
fn after(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// `SIGKILL`, or `signal 77`.
#[must_use]
pub fn signal_name(signal: i32) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    usize::try_from(signal)
        .ok()
        .and_then(|number| NAMES.get(number.checked_sub(1)?))
        .map_or_else(|| format!("signal {signal}"), |name| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    const QUICK: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(10);

    fn restart(policy: pb::RestartPolicy, budget: u32, window_s: u64) -> pb::Restart {
        pb::Restart {
            policy: policy.into(),
            budget_restarts: budget,
            budget_window: Duration::from_secs(window_s).try_into().ok(),
            ..Default::default()
        }
    }

    fn within(delay: Duration, expected_ms: u64) -> bool {
        let expected = Duration::from_millis(expected_ms);
        delay >= expected.mul_f64(0.8) && delay <= expected.mul_f64(1.2)
    }

    #[test]
    fn an_end_after_ten_seconds_is_answered_at_once_every_time_and_forgets_nothing() {
        let mut memory = RestartMemory::default();
        let rng = &mut StdRng::seed_from_u64(1);
        for expected in [100, 200, 400] {
            assert_eq!(memory.next_delay(rng, LONG), Duration::ZERO);
            assert_eq!(memory.next_delay(rng, LONG), Duration::ZERO);
            let delay = memory.next_delay(rng, QUICK);
            assert!(within(delay, expected), "{delay:?} for {expected} ms");
        }
    }

    #[test]
    fn quick_failures_double_from_100_ms_up_to_30_s() {
        let mut memory = RestartMemory::default();
        let rng = &mut StdRng::seed_from_u64(2);
        for expected in [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000] {
            let delay = memory.next_delay(rng, QUICK);
            assert!(within(delay, expected), "{delay:?} for {expected} ms");
        }
        memory.step = u32::MAX;
        assert!(within(memory.next_delay(rng, QUICK), 30_000));
    }

    #[test]
    fn a_ready_minute_and_nothing_less_resets_the_back_off() {
        let mut memory = RestartMemory { step: 7, ..RestartMemory::default() };
        memory.was_ready(READY_FOR_RESET - Duration::from_millis(1));
        assert_eq!(memory.step, 7);
        memory.was_ready(READY_FOR_RESET);
        assert_eq!(memory.step, 0);
    }

    #[test]
    fn policies_decide_by_success() {
        let rng = &mut StdRng::seed_from_u64(3);
        let now = Monotonic(1_000_000_000);
        let table = [
            (pb::RestartPolicy::Always, false, false),
            (pb::RestartPolicy::Always, true, false),
            (pb::RestartPolicy::OnFailure, false, true),
            (pb::RestartPolicy::OnFailure, true, false),
            (pb::RestartPolicy::Never, false, true),
            (pb::RestartPolicy::Never, true, true),
        ];
        for (policy, failed, rests) in table {
            let rules = restart(policy, 10, 300);
            let verdict = RestartMemory::default().decide(now, rng, Some(&rules), failed, LONG, "ended");
            let expected = if rests { Verdict::Rest } else { Verdict::StartAt(now) };
            assert_eq!(verdict, expected, "{policy:?} failed={failed}");
        }
    }

    #[test]
    fn the_budget_slides() {
        let rng = &mut StdRng::seed_from_u64(4);
        let rules = restart(pb::RestartPolicy::Always, 3, 60);
        let mut memory = RestartMemory::default();
        let at = |s: i64| Monotonic(s * 1_000_000_000);
        for second in [0, 10, 20] {
            let verdict =
                memory.decide(at(second), rng, Some(&rules), true, QUICK, "process exited with status 1");
            assert!(matches!(verdict, Verdict::StartAt(_)), "{verdict:?}");
        }
        let verdict =
            memory.clone().decide(at(59), rng, Some(&rules), true, QUICK, "process exited with status 1");
        let reason = "given up: restarted 3 times within 1m; the last time: process exited with status 1";
        assert_eq!(verdict, Verdict::GiveUp(reason.to_owned()));
        let verdict = memory.decide(at(60), rng, Some(&rules), true, QUICK, "process exited with status 1");
        assert!(
            matches!(verdict, Verdict::StartAt(_)),
            "the restart at 0 s has left the window: {verdict:?}"
        );
        assert_eq!(memory.restarts, 4);
    }

    #[test]
    fn a_reboot_keeps_the_budget_spent_and_its_spacing() {
        let mut memory =
            RestartMemory { window: vec![Monotonic(70), Monotonic(100)], ..RestartMemory::default() };
        memory.rebase(Monotonic(10));
        assert_eq!(memory.window, [Monotonic(-20), Monotonic(10)]);
    }

    #[test]
    fn ends_are_described_for_people() {
        let exit = |cause: pb::ExitCause, code, signal| pb::ExitRecord {
            cause: cause.into(),
            code,
            signal,
            ..pb::ExitRecord::default()
        };
        assert_eq!(describe(&exit(pb::ExitCause::Exit, 3, 0)), "exited with status 3");
        assert_eq!(describe(&exit(pb::ExitCause::Signal, 0, 11)), "was killed by SIGSEGV");
        assert_eq!(describe(&exit(pb::ExitCause::Signal, 0, 77)), "was killed by signal 77");
        assert_eq!(describe(&exit(pb::ExitCause::Unspecified, 0, 0)), "ended; how is not known");
        assert!(!is_failure(&exit(pb::ExitCause::Exit, 0, 0), None));
        assert!(is_failure(&exit(pb::ExitCause::Unspecified, 0, 0), None));
    }

    #[test]
    fn the_manifest_says_which_codes_are_no_failure_and_which_are_final() {
        let rules = pb::Restart {
            success_codes: vec![143],
            fatal_codes: vec![78],
            ..restart(pb::RestartPolicy::OnFailure, 10, 300)
        };
        // cause, code -> failure, fatal
        for (cause, code, failure, fatal) in [
            (pb::ExitCause::Exit, 0, false, false),
            (pb::ExitCause::Exit, 143, false, false),
            (pb::ExitCause::Exit, 78, true, true),
            (pb::ExitCause::Exit, 1, true, false),
            (pb::ExitCause::Signal, 78, true, false),
            (pb::ExitCause::ExecError, 143, true, false),
        ] {
            let exit = pb::ExitRecord { cause: cause.into(), code, ..pb::ExitRecord::default() };
            assert_eq!(is_failure(&exit, Some(&rules)), failure, "{cause:?} {code}");
            assert_eq!(is_fatal(&exit, Some(&rules)), fatal, "{cause:?} {code}");
        }
    }
}
