//! Frames on the keeper's socket: a u32 little-endian length, then a prost message of at most 1 MiB.
//!
//! Free of I/O, so that the blocking client, the keeper's non-blocking loop and the agent's runtime all use it.
//! Descriptors travel beside the bytes ([`send`](crate::client::send), [`receive`](crate::client::receive)): one
//! ride on the first byte of each frame whose meaning includes a descriptor, so that a queue keeps them in step.

use prost::Message;

/// The longest message, in bytes. A spawn with a large environment is some tens of KiB.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Why bytes are no frames of ours. The connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length says more than [`FRAME_BYTES_MAX`].
    #[error("frame of {0} bytes, of which {FRAME_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// The message could not be decoded.
    #[error("undecodable frame")]
    Undecodable(#[from] prost::DecodeError),
}

/// One message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`], so that the sender hears of it and not the peer.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    if length > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    let prefix = u32::try_from(length).map_err(|_| FrameError::TooLong(length))?;
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&prefix.to_le_bytes());
    message.encode_raw(&mut frame);
    Ok(frame)
}

/// Bytes as they arrive, cut into messages.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
}

impl FrameBuffer {
    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if one is there.
    ///
    /// # Errors
    /// [`FrameError`] when the bytes are not frames of `M`.
    pub fn next_message<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let Some((prefix, rest)) = self.bytes.split_first_chunk::<4>() else { return Ok(None) };
        let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if length > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message = M::decode(body)?;
        self.bytes.drain(..4 + length);
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_proto::pb;

    fn list(id: u64) -> pb::KeeperRequest {
        pb::KeeperRequest { id, request: Some(pb::keeper_request::Request::List(pb::ListProcesses {})) }
    }

    #[test]
    fn frames_survive_any_cut() {
        let mut bytes = encode(&list(1)).unwrap();
        bytes.extend(encode(&list(2)).unwrap());
        for cut in 0..=bytes.len() {
            let mut buffer = FrameBuffer::default();
            let mut seen = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                buffer.push(part);
                while let Some(message) = buffer.next_message::<pb::KeeperRequest>().unwrap() {
                    seen.push(message.id);
                }
            }
            assert_eq!(seen, [1, 2], "cut at {cut}");
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused() {
        let mut buffer = FrameBuffer::default();
        buffer.push(b"GET / HTTP/1.1\r\n");
        let refused = buffer.next_message::<pb::KeeperRequest>().unwrap_err();
        assert!(matches!(refused, FrameError::TooLong(_)), "{refused}");
    }

    #[test]
    fn garbage_of_a_fair_length_is_refused() {
        let mut buffer = FrameBuffer::default();
        buffer.push(&[3, 0, 0, 0, 0xff, 0xff, 0xff]);
        let refused = buffer.next_message::<pb::KeeperRequest>().unwrap_err();
        assert!(matches!(refused, FrameError::Undecodable(_)), "{refused}");
    }
}
