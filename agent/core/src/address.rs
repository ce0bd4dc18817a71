//! A service's own address on this host: the agent's prefix and the suffix that the hub allotted to the service. So
//! every agent on one machine gives a service another address, and each the same one for ever.

use std::net::Ipv4Addr;

/// The first two bytes of every service address unless the agent's configuration says otherwise.
pub const DEFAULT_PREFIX: [u8; 2] = [127, 88];

/// `127.88.a.b` for the suffix `a * 256 + b`. `None` when the suffix has more than 16 bits, or is 0 (none allotted).
#[must_use]
pub fn service_address(prefix: [u8; 2], suffix: u32) -> Option<Ipv4Addr> {
    let [high, low] = u16::try_from(suffix).ok().filter(|&suffix| suffix != 0)?.to_be_bytes();
    Some(Ipv4Addr::new(prefix[0], prefix[1], high, low))
}

/// Reads a prefix such as `127.88`.
#[must_use]
pub fn parse_prefix(text: &str) -> Option<[u8; 2]> {
    let (first, second) = text.split_once('.')?;
    Some([first.parse().ok()?, second.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffix_bytes_follow_the_prefix() {
        assert_eq!(service_address(DEFAULT_PREFIX, 5), Some(Ipv4Addr::new(127, 88, 0, 5)));
        assert_eq!(service_address([127, 89], 0x1234), Some(Ipv4Addr::new(127, 89, 0x12, 0x34)));
        assert_eq!(service_address(DEFAULT_PREFIX, 0), None);
        assert_eq!(service_address(DEFAULT_PREFIX, 0x1_0000), None);
    }

    #[test]
    fn prefixes_are_two_bytes() {
        assert_eq!(parse_prefix("127.88"), Some([127, 88]));
        for wrong in ["127", "127.88.1", "127.256", ""] {
            assert_eq!(parse_prefix(wrong), None, "{wrong}");
        }
    }
}
