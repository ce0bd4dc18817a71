//! Gives back what only starting up needed: pages of the program and its libraries that the loader and the static
//! constructors touched once. They are clean copies of files, so the kernel reads one again if it is ever needed.
//!
//! The keeper is one binary with a database and a TLS stack; without this it would hold some 11 MiB of pages that it
//! never looks at again. Called by the keeper when it has started and some seconds after there was something to do
//! (never while idle), and by the other roles some seconds after they are up. Mappings that hold anything of this
//! process's own (relocated tables, data) are left alone.

use std::io;

use crate::sys;

/// A mapping of a file, as `/proc/self/smaps` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
}

/// Gives freed memory back to the kernel and drops the clean pages of mapped program files; returns the bytes of the
/// mappings that it was done for.
///
/// # Errors
/// When `/proc/self/smaps` cannot be read.
pub fn release_startup_pages() -> io::Result<usize> {
    sys::return_freed_memory();
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let mut released = 0;
    for mapping in clean_file_mappings(&smaps) {
        let length = mapping.end - mapping.start;
        if sys::forget_clean_pages(mapping.start, length).is_ok() {
            released += length;
        }
    }
    Ok(released)
}

/// Read-only private mappings of files in which no page is this process's own.
fn clean_file_mappings(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        if let Some(header) = header(line) {
            found.extend(current.take());
            current = header;
        } else if own_pages(line) {
            current = None;
        }
    }
    found.extend(current);
    found
}

/// `Some` for the first line of a mapping; `Some(Some(..))` when it could be released.
fn header(line: &str) -> Option<Option<Mapping>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let mapping =
        Mapping { start: usize::from_str_radix(start, 16).ok()?, end: usize::from_str_radix(end, 16).ok()? };
    let readable_only = matches!(fields.next()?, "r-xp" | "r--p");
    let of_a_file = fields.nth(3).is_some_and(|path| path.starts_with('/'));
    Some((readable_only && of_a_file).then_some(mapping))
}

/// Whether a detail line says that the mapping holds pages of this process's own, in memory or swapped out. Not
/// `Private_Dirty`: in what cannot be written to it counts pages of a program that has just been put there, which wait in
/// the kernel's cache for the disk and stay there.
fn own_pages(line: &str) -> bool {
    let Some((name, amount)) = line.split_once(':') else { return false };
    matches!(name, "Anonymous" | "Swap" | "Locked") && amount.trim() != "0 kB"
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d000000000-55d000001000 r--p 00000000 fe:00 42                         /usr/bin/nave\n\
Rss:                   4 kB\nPrivate_Dirty:         0 kB\nAnonymous:             0 kB\nSwap:                  0 kB\n\
55d000001000-55d000003000 r-xp 00001000 fe:00 42                         /usr/bin/nave\n\
Private_Dirty:         4 kB\nAnonymous:             0 kB\n\
55d000003000-55d000004000 r--p 00003000 fe:00 42                         /usr/bin/nave\n\
Private_Dirty:         4 kB\nAnonymous:             4 kB\n\
55d000004000-55d000005000 rw-p 00004000 fe:00 42                         /usr/bin/nave\n\
Private_Dirty:         0 kB\n\
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0                          [vdso]\n\
Private_Dirty:         0 kB\n";

    #[test]
    fn only_clean_read_only_mappings_of_files_are_released() {
        let found = clean_file_mappings(SMAPS);
        assert_eq!(
            found,
            [
                Mapping { start: 0x55d0_0000_0000, end: 0x55d0_0000_1000 },
                Mapping { start: 0x55d0_0000_1000, end: 0x55d0_0000_3000 },
            ]
        );
    }

    #[test]
    fn the_program_runs_on_after_its_pages_are_gone() {
        assert!(release_startup_pages().unwrap() > 0);
        assert_eq!(clean_file_mappings(SMAPS).len(), 2);
    }
}
