//! When a job is due: five fields of cron and a time zone, `30 2 * * 1-5 Europe/Berlin`. Without a zone it is UTC.
//!
//! In the zone's wall clock: on the day when a time does not exist (the clock is put forward) a run at that time is left
//! out, and at one that comes twice it happens twice. Times are worked out where a manifest is checked and by the
//! leader, never while the log is applied: members may have other editions of the time zones.

use cronexpr::{Crontab, MakeTimestamp};

const DAY_NS: i64 = 24 * 3600 * 1_000_000_000;
/// As far as one search goes, with a day to spare.
const SEARCH_NS: i64 = 4 * 365 * DAY_NS;
/// More than eight years, within which there is always a 29 February.
const SEARCHES: i64 = 3;
/// The first day of 2026. Whether a manifest is possible does not depend on when that is asked.
const ASKED_UNIX_NS: i64 = 1_767_225_600 * 1_000_000_000;

/// A schedule that has been read.
#[derive(Debug, Clone)]
pub struct Schedule(Crontab);

impl Schedule {
    /// Reads a schedule.
    ///
    /// # Errors
    /// With what is wrong, in a sentence for the one who wrote it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fields = text.split_whitespace().count();
        let whole =
            match fields {
                5 => format!("{text} UTC"),
                6 => text.to_owned(),
                _ => return Err(
                    "has five fields and perhaps a time zone: minute, hour, day, month, weekday, such as \
                 \"30 2 * * 1-5 Europe/Berlin\""
                        .to_owned(),
                ),
            };
        let crontab = cronexpr::parse_crontab(&whole).map_err(|error| {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default().trim_start_matches([' ', '^']);
            let last = last.split(';').next().unwrap_or_default();
            format!("cannot be read: {last}; write it such as \"30 2 * * 1-5 Europe/Berlin\"")
        })?;
        Ok(Self(crontab))
    }

    /// The first time after a moment, both in unix nanoseconds; `None`: not within eight years.
    #[must_use]
    pub fn next_after(&self, unix_ns: i64) -> Option<i64> {
        (0..SEARCHES).find_map(|search| self.search_after(unix_ns.checked_add(search * SEARCH_NS)?))
    }

    /// Some day of the years to come is such a day, and has such a time.
    #[must_use]
    pub fn is_ever_due(&self) -> bool {
        self.next_after(ASKED_UNIX_NS).is_some()
    }

    /// Within four years.
    fn search_after(&self, unix_ns: i64) -> Option<i64> {
        let after = MakeTimestamp::from_nanosecond(i128::from(unix_ns)).ok()?;
        let next = self.0.find_next(after).ok()?;
        i64::try_from(next.timestamp().as_nanosecond()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(text: &str, after: &str, count: usize) -> Vec<String> {
        let schedule = Schedule::parse(text).unwrap();
        let mut at = i64::try_from(after.parse::<jiff::Timestamp>().unwrap().as_nanosecond()).unwrap();
        let mut times = Vec::new();
        for _ in 0..count {
            at = schedule.next_after(at).unwrap();
            times.push(jiff::Timestamp::from_nanosecond(i128::from(at)).unwrap().to_string());
        }
        times
    }

    #[test]
    fn a_schedule_is_of_its_zone_and_of_utc_without_one() {
        assert_eq!(times("0 3 * * *", "2026-11-26T03:00:00Z", 1), ["2026-11-27T03:00:00Z"]);
        assert_eq!(times("0 3 * * * Asia/Tokyo", "2026-11-26T03:00:00Z", 1), ["2026-11-26T18:00:00Z"]);
        assert_eq!(
            times("*/20 8-9 * * 1-5 UTC", "2026-11-27T09:20:00Z", 2),
            ["2026-11-27T09:40:00Z", "2026-11-30T08:00:00Z"],
            "a Friday, then a Monday"
        );
    }

    #[test]
    fn the_clock_going_forward_and_back_is_as_said() {
        assert_eq!(
            times("30 2 * * * Europe/Berlin", "2026-03-28T00:00:00Z", 2),
            ["2026-03-28T01:30:00Z", "2026-03-30T00:30:00Z"]
        );
        assert_eq!(
            times("30 2 * * * Europe/Berlin", "2026-10-24T12:00:00Z", 2),
            ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"],
            "half past two comes twice"
        );
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        for (text, part) in [
            ("hourly", "five fields"),
            ("0 25 * * *", "cannot be read"),
            ("0 3 * * * Mars/Base", "failed to find timezone Mars/Base"),
        ] {
            let why = Schedule::parse(text).unwrap_err();
            assert!(why.contains(part) && !why.contains('\n'), "{text}: {why}");
        }
    }

    #[test]
    fn what_no_calendar_has_is_never_due_and_what_it_has_seldom_is() {
        for text in ["0 0 30 2 *", "0 0 31 4,6,9,11 *"] {
            assert!(!Schedule::parse(text).unwrap().is_ever_due(), "{text}");
        }
        assert!(Schedule::parse("0 0 29 2 *").unwrap().is_ever_due());
        assert_eq!(times("0 0 29 2 *", "2028-02-29T00:00:00Z", 1), ["2032-02-29T00:00:00Z"]);
        assert_eq!(times("0 0 29 2 *", "2096-02-29T00:00:00Z", 1), ["2104-02-29T00:00:00Z"]);
    }
}
