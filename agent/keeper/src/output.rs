//! The services' output: FIFOs read on one thread, segment files written on another.
//!
//! Each stream is a named FIFO, opened read-write by us and by the process, so that the end of a reader neither
//! breaks a writer nor loses what is in the pipe; the next keeper opens it again by name. The reading thread does
//! nothing that can wait for a disk: what the other thread cannot take in time is counted and dropped, and a process
//! is never held up by its own log. Two threads rather than one, because even a plain write can stall for seconds.
//! The loop owns an [`Output`] and hears from it through an eventfd.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nave_proto::pb;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::read;

use crate::backlog::{Backlog, Patience};
use crate::clock;
use crate::fifo;
use crate::lines::{STREAMS, Splitter, Stamp, Stream};
use crate::segment::{self, Counters, Job, Limits, Place};
use crate::sys;

/// Enough for both threads' few frames, and for the thread-local data of the large binary around us.
const STACK_BYTES: usize = 128 * 1024;
/// One read. A FIFO holds 64 KiB, or 256 KiB where we may say so.
const READ_BYTES: usize = 64 * 1024;
/// A line without an end is written as a part after this long, so that a prompt is seen and a kill loses little.
const PARTIAL_MS: u16 = 250;
/// Reads of one FIFO when it is to be emptied: its capacity and some, so that a fast writer cannot hold us for ever.
const DRAIN_READS: usize = 16;

/// Of the reading thread.
const NICE: i32 = -10;

const SEGMENT_BYTES: u64 = 10 * 1024 * 1024;
const SEGMENTS: usize = 5;

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Event {
    /// The log is closed and what was to be removed is gone.
    Closed(u32),
}

/// Tells the loop, from either thread.
#[derive(Debug, Clone)]
pub(crate) struct EventSender {
    events: Sender<Event>,
    wake: Arc<EventFd>,
    dropped: Arc<AtomicBool>,
}

impl EventSender {
    pub(crate) fn send(&self, event: Event) {
        if self.events.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    /// Lines were dropped; the counters say how many. The loop is woken once until it has looked.
    pub(crate) fn send_dropped(&self) {
        if !self.dropped.swap(true, Ordering::AcqRel) {
            let _ = self.wake.write(1);
        }
    }
}

#[derive(Debug)]
enum Command {
    Open {
        log: u32,
        fifos: [OwnedFd; 2],
        counters: Arc<Counters>,
    },
    /// Its process has ended: read what is there, and let the last line be one.
    Drain {
        log: u32,
    },
    Close {
        log: u32,
        remove_fifos: bool,
        remove_logs: bool,
    },
    Stop,
}

/// The loop's handle on both threads.
#[derive(Debug)]
pub(crate) struct Output {
    commands: Sender<Command>,
    jobs: Sender<Job>,
    wake: Arc<EventFd>,
    events: Receiver<Event>,
    events_wake: Arc<EventFd>,
    dropped: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    last_log: u32,
}

/// One log as the loop knows it.
#[derive(Debug)]
pub(crate) struct OpenLog {
    pub(crate) log: u32,
    pub(crate) counters: Arc<Counters>,
    /// What the agent was last told of the disk: the number of its error, 0 when it takes lines.
    pub(crate) told_errno: i32,
}

/// As orders say it.
impl From<pb::LogLimits> for Limits {
    fn from(limits: pb::LogLimits) -> Self {
        let or = |given: u64, default: u64| if given == 0 { default } else { given };
        Self {
            segment_bytes: or(limits.segment_bytes, SEGMENT_BYTES),
            segments: usize::try_from(limits.segments).ok().filter(|count| *count > 0).unwrap_or(SEGMENTS),
            age: (limits.age_ms > 0).then(|| Duration::from_millis(limits.age_ms)),
        }
    }
}

impl Output {
    /// Starts both threads. Signals must be blocked already, as threads inherit that.
    ///
    /// # Errors
    /// When the kernel gives no thread or descriptor.
    pub(crate) fn start() -> io::Result<Self> {
        let (commands, commands_in) = channel();
        let (jobs, jobs_in) = channel();
        let (events_out, events) = channel();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let events_wake = Arc::new(EventFd::from_flags(flags)?);
        let dropped = Arc::new(AtomicBool::new(false));
        let sender = EventSender { events: events_out, wake: events_wake.clone(), dropped: dropped.clone() };
        let backlog = Arc::new(Backlog::new()?);
        let onward = Onward {
            jobs: jobs.clone(),
            events: sender.clone(),
            backlog: backlog.clone(),
            patience: Patience::new(),
        };
        let reader = Reader::new(wake.clone(), commands_in, onward)?;
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
        let threads = vec![
            thread("output").spawn(move || reader.run())?,
            thread("segments").spawn(move || segment::run(&jobs_in, &sender, &backlog))?,
        ];
        Ok(Self { commands, jobs, wake, events, events_wake, dropped, threads, last_log: 0 })
    }

    /// Becomes readable when [`Output::take_event`] or [`Output::take_dropped`] has news.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.events_wake.as_fd()
    }

    pub(crate) fn take_event(&self) -> Option<Event> {
        let _ = self.events_wake.read();
        self.events.try_recv().ok()
    }

    /// Whether lines were dropped since the last call.
    pub(crate) fn take_dropped(&self) -> bool {
        self.dropped.swap(false, Ordering::AcqRel)
    }

    /// Makes the directory and its FIFOs where they are missing and starts reading them.
    ///
    /// # Errors
    /// When the directory or a FIFO cannot be made, or something else has its name.
    pub(crate) fn open(&mut self, dir: &Path, limits: pb::LogLimits) -> io::Result<OpenLog> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let directory = fifo::open_directory(dir)?;
        let fifos = fifo::reading_ends(&directory)?;
        self.last_log += 1;
        let log = self.last_log;
        let counters = Arc::<Counters>::default();
        let place = Place { path: dir.to_path_buf(), directory, limits: limits.into() };
        let _ = self.jobs.send(Job::Open { log, place, counters: counters.clone() });
        self.command(Command::Open { log, fifos, counters: counters.clone() });
        Ok(OpenLog { log, counters, told_errno: 0 })
    }

    /// Other limits from now on.
    pub(crate) fn limit(&self, log: u32, limits: pb::LogLimits) {
        let _ = self.jobs.send(Job::Limit { log, limits: limits.into() });
    }

    /// The process has ended: its last line is whole even without an end.
    pub(crate) fn drain(&self, log: u32) {
        self.command(Command::Drain { log });
    }

    /// Ends a log; [`Event::Closed`] follows.
    pub(crate) fn close(&self, log: u32, remove_fifos: bool, remove_logs: bool) {
        self.command(Command::Close { log, remove_fifos, remove_logs });
    }

    /// Writes what has been read and ends both threads; what is still in the FIFOs is the next keeper's.
    pub(crate) fn stop(self) {
        self.command(Command::Stop);
        for thread in self.threads {
            let _ = thread.join();
        }
    }

    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

/// The thread that reads the FIFOs.
struct Reader {
    epoll: Epoll,
    wake: Arc<EventFd>,
    commands: Receiver<Command>,
    onward: Onward,
    logs: BTreeMap<u32, ReadLog>,
    buffer: Box<[u8]>,
}

struct ReadLog {
    fifos: [OwnedFd; 2],
    splitters: [Splitter; 2],
    /// Dropped, and not yet handed on to be said.
    missing: [u64; 2],
    /// The disk stood still when it last had something for it.
    stalled: bool,
    counters: Arc<Counters>,
}

const WAKE: u64 = u64::MAX;

impl Reader {
    fn new(wake: Arc<EventFd>, commands: Receiver<Command>, onward: Onward) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let buffer = vec![0; READ_BYTES].into_boxed_slice();
        Ok(Self { epoll, wake, commands, onward, logs: BTreeMap::new(), buffer })
    }

    fn run(mut self) {
        // Before those who write: where cores are short, a FIFO that nobody empties holds its process up. Not granted
        // to a keeper that is not root.
        let _ = sys::set_nice(NICE);
        let mut ready = [EpollEvent::empty(); 16];
        loop {
            // Silent processes cost nothing: no time-out unless something is held.
            let waiting = self.logs.values().any(ReadLog::holds);
            let timeout = if waiting { EpollTimeout::from(PARTIAL_MS) } else { EpollTimeout::NONE };
            let count = self.epoll.wait(&mut ready, timeout).unwrap_or(0);
            if count == 0 {
                self.flush_all(false);
            }
            for event in &ready[..count] {
                if event.data() != WAKE {
                    let (log, stream) = (event.data() >> 1, STREAMS[usize::from(event.data() & 1 == 1)]);
                    self.read(u32::try_from(log).expect("made from a u32 when it was added"), stream, 1);
                }
            }
            // After the reads, so that none of them is of a log that has been closed since.
            if !self.obey() {
                return;
            }
        }
    }

    /// Does what the loop has asked for; `false` at the end.
    fn obey(&mut self) -> bool {
        let _ = self.wake.read();
        loop {
            match self.commands.try_recv() {
                Ok(Command::Open { log, fifos, counters }) => {
                    for (index, fifo) in fifos.iter().enumerate() {
                        let token = (u64::from(log) << 1) | index as u64;
                        if let Err(error) = self.epoll.add(fifo, EpollEvent::new(EpollFlags::EPOLLIN, token))
                        {
                            crate::say!("output cannot be watched: {error}");
                        }
                    }
                    let splitters = Default::default();
                    self.logs
                        .insert(log, ReadLog { fifos, splitters, missing: [0; 2], stalled: false, counters });
                }
                Ok(Command::Drain { log }) => self.drain(log),
                Ok(Command::Close { log, remove_fifos, remove_logs }) => {
                    self.drain(log);
                    self.logs.remove(&log);
                    let _ = self.onward.jobs.send(Job::Close { log, remove_fifos, remove_logs });
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => {
                    self.flush_all(false);
                    let _ = self.onward.jobs.send(Job::Stop);
                    return false;
                }
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn drain(&mut self, log: u32) {
        for stream in STREAMS {
            self.read(log, stream, DRAIN_READS);
        }
        self.flush(log, true);
    }

    /// Reads a FIFO up to so many times, or until it is empty.
    fn read(&mut self, log: u32, stream: Stream, times: usize) {
        let Some(entry) = self.logs.get_mut(&log) else { return };
        for _ in 0..times {
            let count = match read(&entry.fifos[stream as usize], &mut self.buffer) {
                Ok(count) if count > 0 => count,
                Ok(_) | Err(_) => break,
            };
            let stamp = Stamp::new(clock::unix_ns());
            let mut text = Vec::with_capacity(count + count / 2);
            entry.splitters[stream as usize].push(&mut text, &stamp, stream, &self.buffer[..count]);
            self.onward.submit(log, entry, text);
        }
    }

    fn flush_all(&mut self, ended: bool) {
        let logs: Vec<u32> =
            self.logs.iter().filter(|(_, entry)| entry.holds()).map(|(log, _)| *log).collect();
        for log in logs {
            self.flush(log, ended);
        }
    }

    fn flush(&mut self, log: u32, ended: bool) {
        let Some(entry) = self.logs.get_mut(&log) else { return };
        let stamp = Stamp::new(clock::unix_ns());
        let mut text = Vec::new();
        for (stream, splitter) in STREAMS.into_iter().zip(&mut entry.splitters) {
            splitter.flush(&mut text, &stamp, stream, ended);
        }
        self.onward.submit(log, entry, text);
    }
}

impl ReadLog {
    fn holds(&self) -> bool {
        self.missing != [0; 2] || self.splitters.iter().any(Splitter::holds)
    }
}

/// The way to the disk, with a bound.
struct Onward {
    jobs: Sender<Job>,
    events: EventSender,
    backlog: Arc<Backlog>,
    patience: Patience,
}

impl Onward {
    /// Hands lines on to the disk, or drops and counts them when it stands still.
    fn submit(&mut self, log: u32, entry: &mut ReadLog, text: Vec<u8>) {
        if text.is_empty() && entry.missing == [0; 2] {
            return;
        }
        let size = text.len() as u64;
        // Once it has stood still, nobody is held up for it again before it has caught up by half.
        let room = if entry.stalled {
            self.backlog.has_caught_up(&entry.counters, size)
        } else {
            self.backlog.wait_for_room(&entry.counters, size, &mut self.patience)
        };
        entry.stalled = !room;
        if !room {
            let counts = crate::lines::count(&text);
            for (sum, more) in entry.missing.iter_mut().zip(counts) {
                *sum += more;
            }
            entry.counters.dropped(counts.iter().sum(), text.len());
            self.events.send_dropped();
            return;
        }
        self.backlog.add(&entry.counters, size);
        let missing = std::mem::take(&mut entry.missing);
        let _ = self.jobs.send(Job::Write { log, text, missing });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backlog::LOG_QUEUE_BYTES_MAX;

    fn lines(streams: &[Stream]) -> Vec<u8> {
        let (mut text, stamp) = (Vec::new(), Stamp::new(0));
        streams.iter().for_each(|stream| stamp.record(&mut text, *stream, b'F', [b"line", b""]));
        text
    }

    #[test]
    fn what_a_disk_that_stands_still_costs_is_counted_and_said_where_it_is_missing() {
        let (jobs, jobs_in) = channel();
        let (events, _events_in) = channel();
        let dropped = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::new().unwrap());
        let backlog = Arc::new(Backlog::new().unwrap());
        let mut onward = Onward {
            jobs,
            events: EventSender { events, wake, dropped: dropped.clone() },
            backlog: backlog.clone(),
            patience: Patience::new(),
        };
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut entry = ReadLog {
            fifos: [null(), null()],
            splitters: Default::default(),
            missing: [0; 2],
            stalled: false,
            counters: Arc::default(),
        };
        backlog.add(&entry.counters, LOG_QUEUE_BYTES_MAX);
        let [out, err] = STREAMS;
        let text = lines(&[out, err, out]);
        onward.submit(1, &mut entry, text.clone());
        onward.submit(1, &mut entry, text.clone());
        assert!(jobs_in.try_recv().is_err(), "nothing goes on");
        assert!(entry.holds() && dropped.load(Ordering::Acquire), "it is to be said");
        assert_eq!(entry.counters.dropped_lines.load(Ordering::Relaxed), 6);
        assert_eq!(entry.counters.dropped_bytes.load(Ordering::Relaxed), 2 * text.len() as u64);
        backlog.done(&entry.counters, usize::try_from(LOG_QUEUE_BYTES_MAX).unwrap());
        onward.submit(1, &mut entry, text.clone());
        match jobs_in.try_recv().unwrap() {
            Job::Write { log: 1, text: written, missing: [4, 2] } if written == text => {}
            other => panic!("not the lines after those that are missing: {other:?}"),
        }
        assert_eq!(entry.missing, [0; 2], "said once");
    }
}
