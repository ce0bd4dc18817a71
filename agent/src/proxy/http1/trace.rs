//! W3C trace context (Level 1, version 00): each hop continues its caller's trace under a span of its own, and begins
//! one where there is none. `tracestate` and the flags go on as they came.

/// One hop's place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) id: [u8; 16],
    /// The caller's span.
    pub(crate) parent: Option<[u8; 8]>,
    /// Ours, which the callee sees as its parent.
    pub(crate) span: [u8; 8],
    pub(crate) flags: u8,
}

impl Trace {
    /// A trace and a span that nobody else has; not asked to be sampled.
    pub(crate) fn random(rng: &mut impl rand::Rng) -> Self {
        // All zeroes would mean none.
        let (high, low) = (rng.random::<u64>() | 1, rng.random::<u64>());
        let id = (u128::from(high) << 64 | u128::from(low)).to_be_bytes();
        Self { id, parent: None, span: (rng.random::<u64>() | 1).to_be_bytes(), flags: 0 }
    }

    /// Reads a `traceparent`. Nothing: it is not one, and a new trace begins, as the standard has it.
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let known = match value.first_chunk::<3>()? {
            b"00-" => value.len() == 55,
            [b'f', b'f', _] => false,
            // A later version may have more behind a dash.
            [_, _, b'-'] => value.len() == 55 || value.get(55) == Some(&b'-'),
            _ => false,
        };
        if !known || value[35] != b'-' || value[52] != b'-' {
            return None;
        }
        let (id, span) = (bytes(&value[3..35])?, bytes::<8>(&value[36..52])?);
        let [flags] = bytes::<1>(&value[53..55])?;
        (id != [0; 16] && span != [0; 8]).then_some(Self { id, parent: None, span, flags })
    }

    /// This trace under another span.
    pub(crate) fn continued(self, fresh: Self) -> Self {
        Self { parent: Some(self.span), span: fresh.span, ..self }
    }

    /// The header line for the callee.
    pub(crate) fn write_header(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"traceparent: ");
        self.write_value(out);
        out.extend_from_slice(b"\r\n");
    }

    /// The header's value alone.
    pub(crate) fn value(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(55);
        self.write_value(&mut out);
        out
    }

    fn write_value(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"00-");
        write_hex(&self.id, out);
        out.push(b'-');
        write_hex(&self.span, out);
        out.push(b'-');
        write_hex(&[self.flags], out);
    }
}

fn write_hex(bytes: &[u8], out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(DIGITS[usize::from(byte >> 4)]);
        out.push(DIGITS[usize::from(byte & 15)]);
    }
}

/// Lower-case hexadecimal, as the standard demands.
fn bytes<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let trace = Trace::random(&mut rand::rng());
        let mut out = Vec::new();
        trace.write_header(&mut out);
        let value = &out["traceparent: ".len()..out.len() - 2];
        assert_eq!(Trace::parse(value), Some(trace));
    }

    #[test]
    fn only_the_standards_form_is_read() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(Trace::parse(good.as_bytes()).map(|trace| trace.flags), Some(1));
        assert_eq!(
            Trace::parse(format!("01{}-more", &good[2..]).as_bytes()).map(|trace| trace.flags),
            Some(1)
        );
        let bad = [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319cxb7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331x01",
        ];
        for value in bad {
            assert_eq!(Trace::parse(value.as_bytes()), None, "{value}");
        }
    }
}
