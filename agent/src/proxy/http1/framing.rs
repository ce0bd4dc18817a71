//! Where a message's body ends (RFC 9112 section 6). A body is passed on byte by byte as it came; what is decided here is
//! only how many of the bytes at hand belong to it, strictly, since two readers that disagree about an end are how
//! requests are smuggled: sizes are hexadecimal digits and nothing else, lines end in CRLF, and anything odd ends the
//! connection.

/// A chunk's size and extensions, or one trailer line; nobody honest comes near.
const CHUNK_LINE_BYTES_MAX: usize = 4 * 1024;
/// All trailer lines together.
const TRAILER_BYTES_MAX: usize = 16 * 1024;

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is no body.
    None,
    /// So many bytes, at least one.
    Length(u64),
    Chunked,
    /// A response that ends with its connection.
    UntilClose,
}

/// A body that breaks the rules of its framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadBody {
    #[error("a chunk's size is not a hexadecimal number of at most 16 digits followed by CRLF")]
    ChunkSize,
    #[error("a chunk does not end in CRLF")]
    ChunkEnd,
    #[error("a chunk's line has more than 4096 bytes")]
    ChunkLine,
    #[error("a trailer line does not end in CRLF, or the trailers have more than 16 KiB")]
    Trailers,
}

/// How far a body has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    Done,
    Length(u64),
    Chunked(Chunk),
    UntilClose,
}

/// How far a chunked body has come. `line` counts the bytes of the line under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    Extension {
        value: u64,
        line: usize,
    },
    SizeLf {
        value: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// At the start of a trailer line, or of the empty line that ends the body.
    TrailerStart {
        total: usize,
    },
    Trailer {
        total: usize,
    },
    TrailerLf {
        total: usize,
    },
    EndLf,
}

impl Body {
    pub(crate) fn new(framing: Framing) -> Self {
        match framing {
            Framing::None | Framing::Length(0) => Self::Done,
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunk::Size { value: 0, digits: 0 }),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        *self == Self::Done
    }

    /// How many of these bytes, from the first, belong to the body. Once it is done that is none.
    ///
    /// # Errors
    /// When the bytes break the framing: nothing after them can be trusted.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<usize, BadBody> {
        match self {
            Self::Done => Ok(0),
            Self::UntilClose => Ok(bytes.len()),
            Self::Length(left) => {
                let taken = least(bytes.len(), *left);
                *left -= taken as u64;
                if *left == 0 {
                    *self = Self::Done;
                }
                Ok(taken)
            }
            Self::Chunked(_) => self.take_chunked(bytes),
        }
    }

    fn take_chunked(&mut self, bytes: &[u8]) -> Result<usize, BadBody> {
        let mut at = 0;
        while let (Self::Chunked(chunk), Some(&byte)) = (&mut *self, bytes.get(at)) {
            if let Chunk::Data { left } = chunk {
                let taken = least(bytes.len() - at, *left);
                *left -= taken as u64;
                at += taken;
                if *left == 0 {
                    *chunk = Chunk::DataCr;
                }
                continue;
            }
            at += 1;
            match chunk.step(byte)? {
                Some(next) => *chunk = next,
                None => *self = Self::Done,
            }
        }
        Ok(at)
    }
}

/// The smaller of the two.
fn least(have: usize, left: u64) -> usize {
    usize::try_from(left).map_or(have, |left| left.min(have))
}

impl Chunk {
    /// One byte that is not data; nothing: that was the last of the body.
    fn step(self, byte: u8) -> Result<Option<Self>, BadBody> {
        let next = match (self, byte) {
            (Self::Size { value, digits }, _) if byte.is_ascii_hexdigit() => {
                if digits == 16 {
                    return Err(BadBody::ChunkSize);
                }
                Self::Size { value: value << 4 | u64::from(hex(byte)), digits: digits + 1 }
            }
            (Self::Size { digits: 0, .. }, _) => return Err(BadBody::ChunkSize),
            (Self::Size { value, .. }, b'\r') => Self::SizeLf { value },
            (Self::Size { value, .. }, b';' | b' ' | b'\t') => Self::Extension { value, line: 0 },
            (Self::Size { .. }, _) => return Err(BadBody::ChunkSize),
            (Self::Extension { value, .. }, b'\r') => Self::SizeLf { value },
            (Self::Extension { .. }, b'\n') => return Err(BadBody::ChunkSize),
            (Self::Extension { line, .. }, _) if line >= CHUNK_LINE_BYTES_MAX => {
                return Err(BadBody::ChunkLine);
            }
            (Self::Extension { value, line }, _) => Self::Extension { value, line: line + 1 },
            (Self::SizeLf { value: 0 }, b'\n') => Self::TrailerStart { total: 0 },
            (Self::SizeLf { value }, b'\n') => Self::Data { left: value },
            (Self::SizeLf { .. }, _) => return Err(BadBody::ChunkSize),
            (Self::Data { left }, _) => Self::Data { left },
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { value: 0, digits: 0 },
            (Self::DataCr | Self::DataLf, _) => return Err(BadBody::ChunkEnd),
            (Self::TrailerStart { .. }, b'\r') => Self::EndLf,
            (Self::EndLf, b'\n') => return Ok(None),
            (Self::EndLf, _) | (Self::TrailerStart { .. } | Self::Trailer { .. }, b'\n') => {
                return Err(BadBody::Trailers);
            }
            (Self::Trailer { total }, b'\r') => Self::TrailerLf { total },
            (Self::TrailerStart { total } | Self::Trailer { total }, _) => match total < TRAILER_BYTES_MAX {
                true => Self::Trailer { total: total + 1 },
                false => return Err(BadBody::Trailers),
            },
            (Self::TrailerLf { total }, b'\n') => Self::TrailerStart { total },
            (Self::TrailerLf { .. }, _) => return Err(BadBody::Trailers),
        };
        Ok(Some(next))
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many bytes a body takes when they come in pieces of this size, and whether it is done then.
    fn taken(framing: Framing, bytes: &[u8], piece: usize) -> Result<(usize, bool), BadBody> {
        let mut body = Body::new(framing);
        let mut total = 0;
        for piece in bytes.chunks(piece) {
            let taken = body.take(piece)?;
            total += taken;
            if taken < piece.len() {
                break;
            }
        }
        Ok((total, body.is_done()))
    }

    #[test]
    fn a_length_ends_where_it_says() {
        assert_eq!(taken(Framing::Length(5), b"helloGET /", 3), Ok((5, true)));
        assert_eq!(taken(Framing::Length(50), b"hello", 9), Ok((5, false)));
        assert_eq!(taken(Framing::None, b"GET /", 9), Ok((0, true)));
        assert_eq!(taken(Framing::UntilClose, b"hello", 2), Ok((5, false)));
    }

    #[test]
    fn chunks_end_with_the_empty_one_however_they_are_cut() {
        let whole: &[u8] = b"5\r\nhello\r\nA;name=\"v\"\r\n0123456789\r\n0\r\n\r\n";
        let trailers: &[u8] = b"1\r\nx\r\n000\r\nDigest: abc\r\nOther: d\r\n\r\n";
        for bytes in [whole, trailers] {
            for piece in 1..=bytes.len() {
                let followed = [bytes, b"GET / HTTP/1.1"].concat();
                assert_eq!(taken(Framing::Chunked, &followed, piece), Ok((bytes.len(), true)), "{piece}");
            }
            for cut in 0..bytes.len() {
                assert_eq!(taken(Framing::Chunked, &bytes[..cut], 7), Ok((cut, false)), "{cut}");
            }
        }
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        let long = [b"1;".as_slice(), &[b'x'; CHUNK_LINE_BYTES_MAX + 1]].concat();
        let trailers = [b"0\r\n".as_slice(), &[b'x'; TRAILER_BYTES_MAX + 1]].concat();
        let cases: &[(&[u8], BadBody)] = &[
            (b"\r\n", BadBody::ChunkSize),
            (b"0x5\r\nhello", BadBody::ChunkSize),
            (b"+5\r\nhello", BadBody::ChunkSize),
            (b"-1\r\n", BadBody::ChunkSize),
            (b" 5\r\nhello", BadBody::ChunkSize),
            (b"5\nhello", BadBody::ChunkSize),
            (b"5;a\nhello", BadBody::ChunkSize),
            (b"5\rhello", BadBody::ChunkSize),
            (b"5_\r\nhello", BadBody::ChunkSize),
            (b"10000000000000005\r\nhello", BadBody::ChunkSize),
            (b"5\r\nhello\n0\r\n\r\n", BadBody::ChunkEnd),
            (b"5\r\nhelloX", BadBody::ChunkEnd),
            (b"0\r\n\n", BadBody::Trailers),
            (b"0\r\nA: b\nC: d\r\n\r\n", BadBody::Trailers),
            (b"0\r\n\rX", BadBody::Trailers),
            (&long, BadBody::ChunkLine),
            (&trailers, BadBody::Trailers),
        ];
        for (bytes, bad) in cases {
            for piece in [1, bytes.len()] {
                let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]);
                assert_eq!(taken(Framing::Chunked, bytes, piece), Err(*bad), "{shown}");
            }
        }
    }
}
