//! The proxy's threads, each with a runtime of its own. A connection is given to one of them when it is taken, and stays
//! there with the connections to endpoints that its calls use: what one call waits for is found ready by the thread
//! that goes on with it, so no call wakes another thread, and none waits for a lock that another thread has. (With
//! one runtime for all, half of the calls did both, and cost twice the CPU on a machine with idle time.)

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;

/// Into so many parts is divided what threads keep to themselves. More threads share parts.
const PARTS: usize = 8;

thread_local! {
    static HERE: Cell<usize> = const { Cell::new(0) };
}

/// The number of the thread that asks; 0 for one that is none of the proxy's.
pub(crate) fn here() -> usize {
    HERE.get()
}

/// One of something for each thread, so that none waits for another; aligned, so that none even shares a cache line.
#[derive(Debug, Default)]
pub(crate) struct PerWorker<T>([Part<T>; PARTS]);

#[derive(Debug, Default)]
#[repr(align(64))]
struct Part<T>(T);

impl<T> PerWorker<T> {
    /// That of the thread that asks.
    pub(crate) fn own(&self) -> &T {
        &self.0[here() % PARTS].0
    }

    /// All of them, that of the thread that asks first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &T> {
        let (before, after) = self.0.split_at(here() % PARTS);
        after.iter().chain(before).map(|part| &part.0)
    }
}

/// See the module's description. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Workers(Arc<[Worker]>);

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    connections: AtomicUsize,
}

/// A connection's place on a thread, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    workers: Workers,
    number: usize,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.workers.0[self.number].connections.fetch_sub(1, Relaxed);
    }
}

impl Seat {
    pub(crate) fn runtime(&self) -> &Handle {
        &self.workers.0[self.number].runtime
    }
}

impl Workers {
    /// Begins so many threads, which run until `stop`, and then leave what is still there.
    ///
    /// # Errors
    /// No runtime or thread can be started.
    pub(crate) fn start(count: usize, stop: &CancellationToken) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        let (mut all, mut threads) = (Vec::new(), Vec::new());
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            all.push(Worker { runtime: runtime.handle().clone(), connections: AtomicUsize::default() });
            let thread = std::thread::Builder::new().name(format!("nave-proxy-{number}"));
            let stop = stop.clone();
            threads.push(thread.spawn(move || run(number, runtime, &stop))?);
        }
        Ok((Self(all.into()), threads))
    }

    pub(crate) fn runtimes(&self) -> impl Iterator<Item = &Handle> {
        self.0.iter().map(|worker| &worker.runtime)
    }

    /// For what belongs to no connection.
    pub(crate) fn first(&self) -> &Handle {
        self.nth(0)
    }

    /// Each of them in turn.
    pub(crate) fn nth(&self, turn: usize) -> &Handle {
        &self.0[turn % self.0.len()].runtime
    }

    /// The thread with the fewest connections; of equals, the one that asks. Two that ask at once may get the same.
    pub(crate) fn seat(&self) -> Seat {
        let own = here();
        let busy = |(number, worker): &(usize, &Worker)| (worker.connections.load(Relaxed), *number != own);
        let (number, least) = self.0.iter().enumerate().min_by_key(busy).expect("there is at least one");
        least.connections.fetch_add(1, Relaxed);
        Seat { workers: self.clone(), number }
    }
}

fn run(number: usize, runtime: Runtime, stop: &CancellationToken) {
    HERE.set(number);
    runtime.block_on(stop.cancelled());
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_are_spread_and_places_come_back() {
        let stop = CancellationToken::new();
        let (workers, threads) = Workers::start(3, &stop).unwrap();
        let mut seats: Vec<Seat> = (0..9).map(|_| workers.seat()).collect();
        let count = |seats: &[Seat], number| seats.iter().filter(|seat| seat.number == number).count();
        assert!((0..3).all(|number| count(&seats, number) == 3));
        let freed = seats.pop().unwrap().number;
        assert_eq!(workers.seat().number, freed);
        for seat in &seats {
            let there = seat.runtime().spawn(async { here() }).await.unwrap();
            assert_eq!(there, seat.number, "it runs where it sits");
        }
        stop.cancel();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn each_thread_has_its_own_part_and_sees_all() {
        let parts = PerWorker::<AtomicUsize>::default();
        let parts = &parts;
        std::thread::scope(|scope| {
            for number in 0..PARTS {
                scope.spawn(move || {
                    HERE.set(number);
                    parts.own().store(number + 1, Relaxed);
                    assert_eq!(parts.all().next().map(|part| part.load(Relaxed)), Some(number + 1));
                });
            }
        });
        assert_eq!(parts.all().map(|part| part.load(Relaxed)).sum::<usize>(), 36);
        assert_eq!(parts.all().count(), PARTS);
    }
}
