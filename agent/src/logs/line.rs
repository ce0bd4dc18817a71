//! One line of a segment file, in the form that container runtimes use (CRI), as the keeper writes it:
//! `2026-11-26T13:59:24.123456789Z stdout F text`. `P` is a line that goes on in the next one; `D` is ours:
//! the keeper's note that it had to drop lines, shown to the reader as a line of its own.

use nave_proto::pb;

/// What a segment line says; the caller knows service, instance and host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line<'a> {
    pub(super) unix_ns: i64,
    pub(super) stderr: bool,
    pub(super) partial: bool,
    pub(super) dropped: bool,
    pub(super) text: &'a [u8],
}

impl<'a> Line<'a> {
    /// `line` is without its newline. `None`: not written by a keeper, or damaged.
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        let (time, rest) = split_at_space(line)?;
        let (stream, rest) = split_at_space(rest)?;
        // An empty text may have lost its space.
        let (tag, text) = split_at_space(rest).unwrap_or((rest, b""));
        let stderr = match stream {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        let (partial, dropped) = match tag {
            b"F" => (false, false),
            b"P" => (true, false),
            b"D" => (false, true),
            _ => return None,
        };
        Some(Self { unix_ns: parse_time(time)?, stderr, partial, dropped, text })
    }

    /// Where it was found is for the caller to say.
    pub(super) fn to_log_line(&self, service: &str, instance: &str, host: &str) -> pb::LogLine {
        let text = match self.dropped {
            true => [b"[nave: ", self.text, b"]"].concat().into(),
            false => bytes::Bytes::copy_from_slice(self.text),
        };
        pb::LogLine {
            service: service.to_owned(),
            instance_id: instance.to_owned(),
            host: host.to_owned(),
            unix_ns: self.unix_ns,
            stderr: self.stderr,
            text,
            partial: self.partial,
            ..pb::LogLine::default()
        }
    }
}

fn split_at_space(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == b' ')?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// `2026-11-26T13:59:24[.1 to 9 digits]Z` as nanoseconds since 1970.
fn parse_time(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (date, time) = text.split_once('T')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(time, ':')?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    seconds.checked_mul(1_000_000_000)?.checked_add(parse_fraction(fraction)?)
}

fn numbers(text: &str, separator: char) -> Option<[i64; 3]> {
    let mut parts =
        text.split(separator).map(|part| part.parse::<i64>().ok().filter(|n| (0..10_000).contains(n)));
    let found = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(found)
}

fn parse_fraction(digits: &str) -> Option<i64> {
    if digits.len() > 9 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    format!("{digits:0<9}").parse().ok()
}

/// Proleptic Gregorian calendar, with the year beginning in March so that the leap day comes last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_nanoseconds_since_1970() {
        for (text, unix_ns) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("1970-01-01T00:00:00.5Z", Some(500_000_000)),
            ("2000-03-01T00:00:00Z", Some(951_868_800_000_000_000)),
            ("2024-02-29T23:59:59.123456789Z", Some(1_709_251_199_123_456_789)),
            ("2026-11-26T13:59:24.000000001Z", Some(1_795_701_564_000_000_001)),
            ("2026-13-26T13:59:24Z", None),
            ("2026-11-26T13:59:24", None),
            ("2026-11-26T13:59:24.1234567890Z", None),
            ("yesterday", None),
        ] {
            assert_eq!(parse_time(text.as_bytes()), unix_ns, "{text}");
        }
    }

    #[test]
    fn every_kind_of_line_is_understood() {
        let parse = |text: &'static str| Line::parse(text.as_bytes());
        let line = parse("1970-01-01T00:00:00.000000007Z stderr P a  b ").unwrap();
        assert_eq!(line, Line { unix_ns: 7, stderr: true, partial: true, dropped: false, text: b"a  b " });
        assert_eq!(parse("1970-01-01T00:00:00Z stdout F ").unwrap().text, b"");
        assert_eq!(parse("1970-01-01T00:00:00Z stdout F").unwrap().text, b"");
        let dropped = parse("1970-01-01T00:00:00Z stdout D 12 lines dropped").unwrap();
        assert_eq!(dropped.to_log_line("web", "i-1", "a").text, "[nave: 12 lines dropped]");
        for damaged in
            ["", "x", "1970-01-01T00:00:00Z stdin F a", "1970-01-01T00:00:00Z stdout X a", "\0\0\0"]
        {
            assert_eq!(parse(damaged), None, "{damaged:?}");
        }
    }
}
