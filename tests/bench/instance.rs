//! What `nave-bench supervise` has supervised: it writes when it starts and when it ends, and lives ten good seconds
//! between, five times; its sixth life has no end. `nave-bench-instance DIR [NAME]`, the name from `NAVE_INSTANCE`
//! when it is not given. Small, so that its own start costs little.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Ends that are measured.
const LIVES: usize = 5;
const LIFE_MS: u64 = 10_100;
/// So that not all end together: up to so much more.
const SPREAD_MS: u64 = 4_000;

fn main() {
    let began = now_ns();
    let mut words = std::env::args().skip(1);
    let dir = PathBuf::from(words.next().expect("a directory"));
    let name = words.next().or_else(|| std::env::var("NAVE_INSTANCE").ok()).expect("a name");
    let file = dir.join(name);
    let lives = std::fs::read_to_string(&file).unwrap_or_default().matches("start").count();
    note(&file, "start", began);
    if lives == LIVES {
        pause(Duration::from_secs(1_000_000));
    }
    // No need for real chance.
    let spread = u64::try_from(began).unwrap_or(0) / 1_000 % SPREAD_MS;
    pause(Duration::from_millis(LIFE_MS + spread));
    note(&file, "end", now_ns());
}

/// One write, so that a line is whole.
fn note(file: &PathBuf, what: &str, at_ns: i64) {
    let mut file = OpenOptions::new().create(true).append(true).open(file).expect("the directory is there");
    file.write_all(format!("{what} {at_ns}\n").as_bytes()).expect("a line can be written");
}

fn now_ns() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

#[expect(clippy::disallowed_methods, reason = "living is all that this program does")]
fn pause(length: Duration) {
    std::thread::sleep(length);
}
