//! What has been sent of a request's body, as long as it may have to be sent again.

/// Grows up to a limit, and then gives up.
#[derive(Debug)]
pub(super) struct Replay {
    bytes: Vec<u8>,
    bytes_max: usize,
    whole: bool,
}

impl Replay {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes: Vec::new(), bytes_max, whole: true }
    }

    /// These bytes of the body have been taken from the caller.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        if !self.whole {
            return;
        }
        if self.bytes.len() + bytes.len() > self.bytes_max {
            self.whole = false;
            self.bytes = Vec::new();
            return;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// All that was taken; nothing once it was too much.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        self.whole.then_some(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_beyond_the_limit_is_not_sent_again() {
        let mut replay = Replay::new(4);
        assert_eq!(replay.bytes(), Some(b"".as_slice()));
        replay.add(b"ab");
        replay.add(b"cd");
        assert_eq!(replay.bytes(), Some(b"abcd".as_slice()));
        replay.add(b"e");
        assert_eq!(replay.bytes(), None);
        replay.add(b"");
        assert_eq!(replay.bytes(), None);
    }
}
