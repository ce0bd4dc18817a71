//! Records in bytes, as all ledgers and exit files of a host hold them: u32 little-endian length, u32 CRC-32 of the
//! body, body.
//!
//! A record whose body is damaged is passed over, when a whole one follows where its length says, so that the rest is
//! used. Where a length is damaged nobody knows what follows, and reading ends.

use prost::Message;

/// Bytes before each body.
pub const HEADER_BYTES: usize = 8;

/// What bytes held.
#[derive(Debug, PartialEq)]
pub struct Read<M> {
    /// The whole ones, in order.
    pub records: Vec<M>,
    /// Where the last whole one ends. What follows is torn, or nobody knows where it begins.
    pub end: usize,
    /// Bytes that were no whole record, before `end` and behind it.
    pub lost_bytes: u64,
}

/// The records, one after the other.
///
/// # Panics
/// When one takes 4 GiB or more.
#[must_use]
pub fn write<'a, M: Message + 'a>(records: impl IntoIterator<Item = &'a M>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        let body = record.encode_to_vec();
        let length = u32::try_from(body.len()).expect("records are far below 4 GiB");
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&crc32(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
    }
    bytes
}

/// Reads what is whole. A length beyond `body_bytes_max` is damage, so that it makes nobody allocate a machine away.
#[must_use]
pub fn read<M: Message + Default>(bytes: &[u8], body_bytes_max: usize) -> Read<M> {
    let (mut records, mut at, mut end, mut whole) = (Vec::new(), 0, 0, 0);
    while let Some((record, next)) = read_one(bytes, at, body_bytes_max) {
        if let Some(record) = record {
            records.push(record);
            whole += next - at;
            end = next;
        }
        at = next;
    }
    Read { records, end, lost_bytes: (bytes.len() - whole) as u64 }
}

/// The record there (none: its body is damaged), and where the next one begins.
fn read_one<M: Message + Default>(bytes: &[u8], at: usize, max: usize) -> Option<(Option<M>, usize)> {
    let (length, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    // Zeroes, as a crash can leave them, would be an empty record with a right sum.
    let length =
        usize::try_from(u32::from_le_bytes(*length)).ok().filter(|length| (1..=max).contains(length))?;
    let body = rest.get(..length)?;
    let is_whole = crc32(body) == u32::from_le_bytes(*sum);
    let record = is_whole.then(|| M::decode(body).ok()).flatten();
    Some((record, at + HEADER_BYTES + length))
}

/// CRC-32 (IEEE), four bits at a time: a table of 64 bytes instead of a KiB.
fn crc32(bytes: &[u8]) -> u32 {
    const NIBBLES: [u32; 16] = {
        let mut table = [0; 16];
        let mut index = 0;
        while index < 16 {
            let mut value: u32 = index;
            let mut bit = 0;
            while bit < 4 {
                value = if value & 1 == 1 { (value >> 1) ^ 0xedb8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[index as usize] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, byte| {
        let sum = sum ^ u32::from(*byte);
        let sum = (sum >> 4) ^ NIBBLES[(sum & 15) as usize];
        (sum >> 4) ^ NIBBLES[(sum & 15) as usize]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_proto::pb;

    fn exit(sequence: u64) -> pb::ExitRecord {
        pb::ExitRecord { sequence, message: "x".repeat(20), ..Default::default() }
    }

    fn sequences(bytes: &[u8]) -> (Vec<u64>, usize, u64) {
        let read = read::<pb::ExitRecord>(bytes, 1000);
        (read.records.iter().map(|exit| exit.sequence).collect(), read.end, read.lost_bytes)
    }

    #[test]
    fn crc_is_the_one_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn one_damaged_byte_costs_what_it_damages_and_nothing_before_it() {
        let bytes = write(&[exit(1), exit(2), exit(3)]);
        let size = bytes.len() / 3;
        assert_eq!(sequences(&bytes), (vec![1, 2, 3], 3 * size, 0));
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= flip;
                let (records, end, lost) = sequences(&bytes);
                let damaged = at / size;
                let before: Vec<u64> = (1..=damaged as u64).collect();
                assert_eq!(records[..damaged], before, "byte {at}");
                assert!(!records.contains(&(damaged as u64 + 1)), "byte {at}");
                if at % size >= 4 {
                    let after: Vec<u64> = (damaged as u64 + 2..=3).collect();
                    assert_eq!(records[damaged..], after, "its length is right, so the rest is found: {at}");
                }
                assert_eq!(lost, (bytes.len() - records.len() * size) as u64);
                assert!(records.is_empty() || end >= records.len() * size);
            }
        }
    }

    #[test]
    fn nothing_follows_a_damaged_last_one_nor_zeroes() {
        let whole = write(&[exit(1), exit(2)]);
        let size = whole.len() / 2;
        let mut bytes = whole.clone();
        *bytes.last_mut().unwrap() ^= 1;
        assert_eq!(sequences(&bytes), (vec![1], size, size as u64), "so it is cut off");
        let mut bytes = whole;
        bytes.extend([0; 64]);
        assert_eq!(sequences(&bytes), (vec![1, 2], 2 * size, 64));
    }
}
