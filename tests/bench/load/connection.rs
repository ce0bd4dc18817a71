//! One HTTP/2 connection with many unary gRPC calls under way, made for load: the head of a call is the same few bytes
//! each time, its message is bytes already, what came is read at once and what is to be sent is written at once. So a
//! call costs the generator a few microseconds rather than forty, of the same two cores that are measured.
//!
//! It knows as much of HTTP/2 as a client needs that begins all streams itself and whose messages fit one frame.

use std::collections::HashMap;

use anyhow::{bail, ensure};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD_BYTES: usize = 9;
/// What a stream's and a connection's window are without settings.
const WINDOW_BYTES: i64 = 65_535;
/// Ours, for answers: the largest that there is, given again when half is used.
const ANSWERS_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// A message that is longer might not fit a frame, or a stream's window.
const MESSAGE_BYTES_MAX: usize = 16_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// `grpc-status: 0` in its four spellings; a client that keeps no table is told names and values in full.
const STATUS_NAMES: [&[u8]; 2] = [b"\x0bgrpc-status", b"\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f"];
const STATUS_OK: [&[u8]; 2] = [b"\x010", b"\x81\x07"];

/// A connection whose calls all go to one method.
#[derive(Debug)]
pub(crate) struct Connection<S> {
    stream: S,
    head: Head,
    next_id: u32,
    /// Of each call under way, by its stream: whoever made it.
    calls: HashMap<u32, usize>,
    out: Vec<u8>,
    input: Vec<u8>,
    window: i64,
    answers: u32,
}

/// How a call ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) caller: usize,
    /// `grpc-status` was 0.
    pub(crate) ok: bool,
}

/// The header block of a request: written out once, from then on by its places in the server's table.
#[derive(Debug)]
enum Head {
    First(Vec<u8>),
    Known,
}

impl Head {
    fn new(path: &str, authority: &str) -> Self {
        let mut block = vec![0x83, 0x86];
        for (name, value) in [(0x44, path), (0x41, authority), (0x5f, "application/grpc")] {
            block.push(name);
            block.push(short(value.len()));
            block.extend(value.as_bytes());
        }
        block.extend(b"\x40\x02te\x08trailers");
        Self::First(block)
    }

    fn take(&mut self) -> Vec<u8> {
        match std::mem::replace(self, Self::Known) {
            Self::First(block) => block,
            Self::Known => vec![0x83, 0x86, 0xc1, 0xc0, 0xbf, 0xbe],
        }
    }
}

fn short(len: usize) -> u8 {
    u8::try_from(len).ok().filter(|len| *len < 127).expect("a name of a few bytes")
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Greets the server. Our header table has no room, so that answers can be read without keeping one.
    pub(crate) fn new(stream: S, path: &str, authority: &str) -> Self {
        let mut out = PREFACE.to_vec();
        let mut settings = Vec::new();
        for (setting, value) in [(1u16, 0u32), (2, 0), (4, ANSWERS_WINDOW_BYTES)] {
            settings.extend(setting.to_be_bytes());
            settings.extend(value.to_be_bytes());
        }
        frame(&mut out, SETTINGS, 0, 0, &settings);
        let more = ANSWERS_WINDOW_BYTES - 65_535;
        frame(&mut out, WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        Self {
            stream,
            head: Head::new(path, authority),
            next_id: 1,
            calls: HashMap::new(),
            out,
            input: Vec::with_capacity(1 << 16),
            window: WINDOW_BYTES,
            answers: 0,
        }
    }

    /// Queues a call; `caller` is told its end. False: the connection's window has no room for it now.
    pub(crate) fn call(&mut self, caller: usize, message: &[u8]) -> anyhow::Result<bool> {
        ensure!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes", message.len());
        let len = 5 + message.len();
        if self.window < i64::try_from(len)? {
            return Ok(false);
        }
        self.window -= i64::try_from(len)?;
        let id = self.next_id;
        self.next_id += 2;
        self.calls.insert(id, caller);
        let head = self.head.take();
        frame(&mut self.out, HEADERS, END_HEADERS, id, &head);
        frame_head(&mut self.out, DATA, END_STREAM, id, len);
        self.out.push(0);
        self.out.extend(u32::try_from(message.len())?.to_be_bytes());
        self.out.extend(message);
        Ok(true)
    }

    pub(crate) fn under_way(&self) -> usize {
        self.calls.len()
    }

    /// Sends what is queued, waits for something to come, and adds the calls that have ended. What one connection has
    /// under way fits the socket's buffers, so writing all before reading does not lock.
    pub(crate) async fn exchange(&mut self, ended: &mut Vec<Ended>) -> anyhow::Result<()> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out).await?;
            self.stream.flush().await?;
            self.out.clear();
        }
        let count = self.stream.read_buf(&mut self.input).await?;
        ensure!(count > 0, "the server closed the connection");
        let input = std::mem::take(&mut self.input);
        let mut rest = input.as_slice();
        while let Some((head, after)) = rest.split_first_chunk::<FRAME_HEAD_BYTES>() {
            let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let Some((payload, next)) = after.split_at_checked(len) else { break };
            let id = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
            self.take(head[3], head[4], id, payload, ended)?;
            rest = next;
        }
        let left = rest.len();
        self.input = input;
        let begin = self.input.len() - left;
        self.input.drain(..begin);
        Ok(())
    }

    fn take(
        &mut self,
        kind: u8,
        flags: u8,
        id: u32,
        payload: &[u8],
        ended: &mut Vec<Ended>,
    ) -> anyhow::Result<()> {
        match kind {
            DATA => self.answered(payload.len())?,
            HEADERS if flags & END_HEADERS == 0 => bail!("a header block in several frames"),
            HEADERS if flags & END_STREAM != 0 => self.end(id, status_is_ok(payload), ended),
            RST_STREAM => self.end(id, false, ended),
            SETTINGS if flags & ACK == 0 => frame(&mut self.out, SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => frame(&mut self.out, PING, ACK, 0, payload),
            WINDOW_UPDATE if id == 0 => {
                let more = <[u8; 4]>::try_from(payload)?;
                self.window += i64::from(u32::from_be_bytes(more) & 0x7fff_ffff);
            }
            GOAWAY => bail!("the server says goodbye: {}", String::from_utf8_lossy(payload)),
            CONTINUATION => bail!("a header block in several frames"),
            _ => {}
        }
        Ok(())
    }

    fn answered(&mut self, bytes: usize) -> anyhow::Result<()> {
        self.answers += u32::try_from(bytes)?;
        if self.answers > ANSWERS_WINDOW_BYTES / 2 {
            let more = std::mem::take(&mut self.answers);
            frame(&mut self.out, WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        }
        Ok(())
    }

    fn end(&mut self, id: u32, ok: bool, ended: &mut Vec<Ended>) {
        ended.extend(self.calls.remove(&id).map(|caller| Ended { caller, ok }));
    }
}

fn status_is_ok(block: &[u8]) -> bool {
    STATUS_NAMES.iter().any(|name| {
        let at = block.windows(name.len()).position(|window| window == *name);
        let value = at.map(|at| &block[at + name.len()..]);
        value.is_some_and(|value| STATUS_OK.iter().any(|ok| value.starts_with(ok)))
    })
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, id: u32, payload: &[u8]) {
    frame_head(out, kind, flags, id, payload.len());
    out.extend(payload);
}

fn frame_head(out: &mut Vec<u8>, kind: u8, flags: u8, id: u32, len: usize) {
    let len = u32::try_from(len).expect("a frame of ours is short").to_be_bytes();
    out.extend([len[1], len[2], len[3], kind, flags]);
    out.extend(id.to_be_bytes());
}
