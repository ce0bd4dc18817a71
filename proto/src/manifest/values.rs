//! Values with a text form of their own: sizes, cores, restart budgets. Durations and signals have theirs in
//! [`crate::time`] and [`crate::signals`], since more than manifests use them.

use std::time::Duration;

use crate::time;

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];
/// The units that sizes are written back in: binary ones, then bytes.
const PRINTED_UNITS: [&str; 5] = ["TiB", "GiB", "MiB", "KiB", "B"];

/// Reads a size, `128MiB`, in bytes. The error is a sentence for people.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let example = "for instance \"128MiB\"";
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim_start());
    if number.is_empty() {
        return Err(format!("{text:?} is not a size, {example}"));
    }
    if unit.is_empty() {
        return Err(format!("{text:?} lacks a unit (KiB, MiB, GiB), {example}"));
    }
    let Some((_, factor)) = SIZE_UNITS.iter().find(|(known, _)| known.eq_ignore_ascii_case(unit)) else {
        return Err(match unit.trim_end_matches(['i', 'I']) {
            short @ ("k" | "K" | "m" | "M" | "g" | "G" | "t" | "T") => {
                format!("{text:?} has an ambiguous unit; write \"{number}{}iB\"", short.to_ascii_uppercase())
            }
            _ => format!("{unit:?} is not a unit of size (KiB, MiB, GiB), {example}"),
        });
    };
    scale(number, *factor).ok_or_else(|| format!("{text:?} is not a whole number of bytes below 2^63"))
}

/// `number` times `factor`, exactly: `1.5` GiB is a whole number of bytes, `0.3` B is not.
fn scale(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = u32::try_from(fraction.len()).ok().filter(|digits| *digits <= 9)?;
    let denominator = 10u128.pow(digits);
    let whole: u128 = whole.parse().ok()?;
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let product = whole.checked_mul(denominator)?.checked_add(fraction)?.checked_mul(factor.into())?;
    let bytes = (product % denominator == 0).then_some(product / denominator)?;
    i64::try_from(bytes).ok().and_then(|bytes| u64::try_from(bytes).ok())
}

/// The shortest text that [`parse_size`] reads back to the same number: `128MiB`, `1000B`.
pub fn format_size(bytes: u64) -> String {
    let (unit, factor) = PRINTED_UNITS
        .iter()
        .filter_map(|printed| SIZE_UNITS.iter().find(|(unit, _)| unit == printed))
        .find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor))
        .unwrap_or(&("B", 1));
    format!("{}{unit}", bytes / factor)
}

/// Permissions, `0640`: octal digits for owner, group and others. The error is a sentence for people.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    match u32::from_str_radix(text, 8) {
        Ok(0) => Err("nobody could read it; leave the key out for \"0644\"".to_owned()),
        Ok(mode) if octal && mode <= 0o777 => Ok(mode),
        Ok(_) | Err(_) => Err(format!("{text:?} is not a mode, for instance \"0640\"")),
    }
}

/// Cores, `0.5`, in thousandths. The error is a sentence for people.
pub(super) fn parse_cpu(cores: f64) -> Result<u64, String> {
    let millicores = cores * 1000.0;
    let rounded = millicores.round();
    if !(0.0..=1_000_000.0 * 1000.0).contains(&millicores) {
        return Err(format!("{cores} is not a number of cores"));
    }
    if (millicores - rounded).abs() > 1e-6 {
        return Err(format!("{cores} is finer than a thousandth of a core"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within 0..=10^9, checked above"
    )]
    Ok(rounded as u64)
}

/// Thousandths as cores: `0.5`, `2`.
pub fn format_cpu(millicores: u64) -> String {
    let text = format!("{}.{:03}", millicores / 1000, millicores % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A restart budget, `10 in 5m`. The error is a sentence for people.
pub(super) fn parse_budget(text: &str) -> Result<(u32, Duration), String> {
    let wrong = || format!("{text:?} is not a budget, for instance \"10 in 5m\"");
    let (restarts, window) = text.split_once(" in ").ok_or_else(wrong)?;
    let restarts = restarts.trim().parse().map_err(|_| wrong())?;
    let window = time::parse_duration(window.trim()).map_err(|error| error.to_string())?;
    Ok((restarts, window))
}

pub(super) fn format_budget(restarts: u32, window: Duration) -> String {
    format!("{restarts} in {}", time::format_duration(window))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("128MiB", 128 << 20),
            ("1.5GiB", 3 << 29),
            ("512 KiB", 512 << 10),
            ("2gib", 2 << 30),
            ("1MB", 1_000_000),
            ("0B", 0),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for (text, message) in [
            ("128", "\"128\" lacks a unit (KiB, MiB, GiB), for instance \"128MiB\""),
            ("128M", "\"128M\" has an ambiguous unit; write \"128MiB\""),
            ("128Mi", "\"128Mi\" has an ambiguous unit; write \"128MiB\""),
            ("lots", "\"lots\" is not a size, for instance \"128MiB\""),
            ("1 litre", "\"litre\" is not a unit of size (KiB, MiB, GiB), for instance \"128MiB\""),
            ("0.3B", "\"0.3B\" is not a whole number of bytes below 2^63"),
            ("99999999TiB", "\"99999999TiB\" is not a whole number of bytes below 2^63"),
        ] {
            assert_eq!(parse_size(text), Err(message.to_owned()), "{text}");
        }
    }

    #[test]
    fn cores_are_kept_to_the_thousandth() {
        assert_eq!(parse_cpu(0.1), Ok(100));
        assert_eq!(parse_cpu(2.0), Ok(2000));
        parse_cpu(0.0001).unwrap_err();
        parse_cpu(-1.0).unwrap_err();
        parse_cpu(f64::NAN).unwrap_err();
        assert_eq!(format_cpu(500), "0.5");
        assert_eq!(format_cpu(2000), "2");
        assert_eq!(format_cpu(10), "0.01");
    }

    proptest::proptest! {
        #[test]
        fn a_size_survives_its_own_text(bytes in 0u64..(1 << 62)) {
            proptest::prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
            let mebibytes = (bytes >> 24) << 20;
            proptest::prop_assert_eq!(parse_size(&format_size(mebibytes)), Ok(mebibytes));
        }
    }
}
