//! Connections to endpoints on this host and to other agents, and those that wait for their next request. They are shared
//! by all callers, newest first, so that few are kept busy: those of the caller's own thread, and when there is none,
//! another thread's, which moves here. One is used again only within [`IDLE`]: shorter than what servers themselves allow
//! (5 s in Node, 15 s in Apache), since a request sent on a connection that is being closed is lost, or, when it may not
//! be repeated, failed.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::proxy::wire::Wire;
use crate::proxy::workers::{PerWorker, here};

/// How long a connection may wait for its next request.
pub(super) const IDLE: Duration = Duration::from_secs(3);
/// Waiting connections of one endpoint on one thread: what a burst needs; more would be closed before they are used.
const IDLE_MAX: usize = 128;
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
    /// The thread that watches it.
    thread: usize,
}

impl Waiting {
    fn is_fresh(&self, now: Instant) -> bool {
        now - self.since <= IDLE
    }

    /// For use on the thread that asks, if it can be.
    fn take(self) -> Option<Upstream> {
        let Self { upstream, thread, .. } = self;
        if !upstream.is_quiet() {
            return None;
        }
        if thread == here() {
            return Some(upstream);
        }
        let stream = upstream.stream.watched_here().ok()?;
        Some(Upstream { stream, ..upstream })
    }
}

type Places<K> = BTreeMap<K, Vec<Waiting>>;

/// The waiting connections to what `K` names: a port's endpoints, or other hosts.
#[derive(Debug)]
pub(crate) struct Pool<K> {
    waiting: PerWorker<Mutex<Places<K>>>,
}

impl<K> Default for Pool<K> {
    fn default() -> Self {
        Self { waiting: PerWorker::default() }
    }
}

impl<K: Ord + Copy> Pool<K> {
    /// One that may be used again.
    pub(super) fn take(&self, place: K) -> Option<Upstream> {
        let now = Instant::now();
        self.waiting.all().find_map(|part| {
            let mut places = part.lock();
            let waiting = places.get_mut(&place)?;
            while let Some(newest) = waiting.pop() {
                if !newest.is_fresh(now) {
                    // The others are older still.
                    waiting.clear();
                    return None;
                }
                if let Some(upstream) = newest.take() {
                    return Some(upstream);
                }
            }
            None
        })
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
        let mut places = self.waiting.own().lock();
        let waiting = places.entry(place).or_default();
        if waiting.len() < IDLE_MAX {
            waiting.push(Waiting { upstream, since: Instant::now(), thread: here() });
        }
    }

    /// Closes what has waited too long. To be called every second or so.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut closed = Vec::new();
        for part in self.waiting.all() {
            part.lock().retain(|_, waiting| {
                let old = waiting.partition_point(|one| !one.is_fresh(now));
                closed.extend(waiting.drain(..old));
                !waiting.is_empty()
            });
        }
        // Closed here, without a lock.
    }

    /// Closes those to places that are no longer there.
    pub(crate) fn keep(&self, there: impl Fn(K) -> bool) {
        let mut gone = Vec::new();
        for part in self.waiting.all() {
            part.lock().retain(|key, waiting| {
                let is_there = there(*key);
                if !is_there {
                    gone.append(waiting);
                }
                is_there
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::proxy::workers::Workers;

    #[tokio::test]
    async fn a_waiting_connection_moves_to_the_thread_that_has_none_unless_its_end_has_come() {
        let stop = CancellationToken::new();
        let (workers, threads) = Workers::start(2, &stop).unwrap();
        let (pool, listener) =
            (Arc::new(Pool::<u8>::default()), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let seats = [workers.seat(), workers.seat()];
        let give = || {
            let pool = pool.clone();
            seats[0].runtime().spawn(async move {
                let stream = TcpStream::connect(address).await.unwrap();
                pool.give(1, Upstream::new(Wire::Local(stream)));
            })
        };
        give().await.unwrap();
        let (mut endpoint, _) = listener.accept().await.unwrap();
        let taker = pool.clone();
        let asks = seats[1].runtime().spawn(async move {
            let mut upstream = taker.take(1).expect("the other thread has one");
            upstream.stream.write_all(b"ask").await.unwrap();
            let mut answer = [0; 6];
            upstream.stream.read_exact(&mut answer).await.unwrap();
            taker.give(1, upstream);
            answer
        });
        let mut asked = [0; 3];
        endpoint.read_exact(&mut asked).await.unwrap();
        endpoint.write_all(b"answer").await.unwrap();
        assert_eq!(&asks.await.unwrap(), b"answer");

        // It is closed, which the thread that watches it comes to know.
        drop(endpoint);
        let (watching, taker) = (pool.clone(), pool.clone());
        let ended = async move {
            while watching.take(1).is_some_and(|one| {
                watching.give(1, one);
                true
            }) {
                tokio::task::yield_now().await;
            }
        };
        seats[1].runtime().spawn(ended).await.unwrap();
        assert!(seats[0].runtime().spawn(async move { taker.take(1).is_none() }).await.unwrap());
        stop.cancel();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
