//! Connections to endpoints on this host and to other agents, and those that wait for their next request. They are shared
//! by all callers, newest first, so that few are kept busy. One is used again only within [`IDLE`]: shorter than what servers
//! themselves allow (5 s in Node, 15 s in Apache), since a request sent on a connection that is being closed is lost, or,
//! when it may not be repeated, failed.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::proxy::wire::Wire;

/// How long a connection may wait for its next request.
pub(super) const IDLE: Duration = Duration::from_secs(3);
/// Waiting connections of one endpoint: what a burst needs; more would be closed before they are used.
const IDLE_MAX: usize = 256;
/// A small response with its head fits in.
const BUFFER_BYTES: usize = 8 * 1024;
/// A waiting connection keeps no more than this.
const BUFFER_BYTES_KEPT: usize = 16 * 1024;

/// One connection to an endpoint.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) stream: Wire,
    /// Read and not used yet.
    pub(super) buffer: BytesMut,
    /// It has carried a request before, so the endpoint may be about to close it.
    pub(super) used: bool,
}

impl Upstream {
    pub(super) fn new(stream: Wire) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(BUFFER_BYTES), used: false }
    }

    /// Nothing has come, not even an end: nothing may come between two requests.
    fn is_quiet(&self) -> bool {
        self.buffer.is_empty() && self.stream.is_quiet()
    }
}

#[derive(Debug)]
struct Waiting {
    upstream: Upstream,
    since: Instant,
}

/// The waiting connections to what `K` names: a port's endpoints, or other hosts.
#[derive(Debug)]
pub(crate) struct Pool<K> {
    waiting: Mutex<BTreeMap<K, Vec<Waiting>>>,
}

impl<K> Default for Pool<K> {
    fn default() -> Self {
        Self { waiting: Mutex::default() }
    }
}

impl<K: Ord + Copy> Pool<K> {
    /// One that may be used again.
    pub(super) fn take(&self, place: K) -> Option<Upstream> {
        let mut all = self.waiting.lock();
        let waiting = all.get_mut(&place)?;
        let now = Instant::now();
        while let Some(newest) = waiting.pop() {
            if now - newest.since > IDLE {
                // The others are older still.
                waiting.clear();
                return None;
            }
            if newest.upstream.is_quiet() {
                return Some(newest.upstream);
            }
        }
        None
    }

    /// Keeps one for the next request.
    pub(super) fn give(&self, place: K, mut upstream: Upstream) {
        upstream.used = true;
        if !upstream.buffer.is_empty() {
            return;
        }
        if upstream.buffer.capacity() > BUFFER_BYTES_KEPT {
            upstream.buffer = BytesMut::with_capacity(BUFFER_BYTES);
        }
        let mut all = self.waiting.lock();
        let waiting = all.entry(place).or_default();
        if waiting.len() < IDLE_MAX {
            waiting.push(Waiting { upstream, since: Instant::now() });
        }
    }

    /// Closes what has waited too long. To be called every second or so.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut closed = Vec::new();
        self.waiting.lock().retain(|_, waiting| {
            let fresh = waiting.partition_point(|one| now - one.since > IDLE);
            closed.extend(waiting.drain(..fresh));
            !waiting.is_empty()
        });
        // Closed here, without the lock.
    }

    /// Closes those to places that are no longer there.
    pub(crate) fn keep(&self, there: impl Fn(K) -> bool) {
        let mut gone = Vec::new();
        self.waiting.lock().retain(|key, waiting| {
            let is_there = there(*key);
            if !is_there {
                gone.append(waiting);
            }
            is_there
        });
    }
}
