//! Lines of several hosts in the order of their times. Each host sends its own in order, so the earliest of all
//! heads is next once every host has shown one. When following, a quiet host must not hold up the others: a line
//! then waits for at most a short window, which is what clocks and network may differ by.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use nave_proto::pb;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// How long a followed line waits for an earlier one of another host.
const REORDER: Duration = Duration::from_millis(200);
/// Without following, a host that has begun to answer and then sends nothing for this long is left behind with a
/// warning. An agent that searches long says so every second.
const STALLED: Duration = Duration::from_secs(10);
/// A host's queue is filled up to here and then left waiting.
const LINES_PER_HOST: usize = 512;
/// Likewise, as lines may have 1 MiB.
const BYTES_PER_HOST: usize = 1024 * 1024;
/// Lines in one answer; at a few hundred bytes each, 100 KB.
const LINES_PER_ANSWER: usize = 256;
/// Bytes in one answer, as lines may be long.
const BYTES_PER_ANSWER: usize = 256 * 1024;

/// A host whose lines are to be merged.
#[derive(Debug)]
pub(super) struct Joining {
    pub(super) name: String,
    pub(super) waiting: mpsc::Receiver<pb::ReadLogsResponse>,
}

#[derive(Debug)]
struct Host {
    name: String,
    waiting: mpsc::Receiver<pb::ReadLogsResponse>,
    lines: VecDeque<(Instant, pb::LogLine)>,
    /// Of their texts.
    bytes: usize,
    ended: bool,
    /// When it last sent anything; before it has, who asks it says when that is hopeless.
    heard: Option<Instant>,
}

/// The hosts being read.
#[derive(Debug)]
pub(super) struct Merge {
    hosts: Vec<Host>,
    /// When following: the hosts that join in.
    joining: Option<mpsc::Receiver<Joining>>,
    warnings: VecDeque<String>,
}

/// What keeps the earliest line back.
enum Next {
    Line(usize),
    WaitUntil(Instant),
    End,
}

impl Merge {
    /// These hosts, to the end of what they have.
    pub(super) fn of(hosts: Vec<Joining>) -> Self {
        let mut merge = Self { hosts: Vec::new(), joining: None, warnings: VecDeque::new() };
        for host in hosts {
            merge.add(host);
        }
        merge
    }

    /// All hosts that join in, until no more can and all have ended.
    pub(super) fn following(joining: mpsc::Receiver<Joining>) -> Self {
        Self { hosts: Vec::new(), joining: Some(joining), warnings: VecDeque::new() }
    }

    /// With these to be said first.
    pub(super) fn with_warnings(mut self, warnings: Vec<String>) -> Self {
        self.warnings.extend(warnings);
        self
    }

    fn add(&mut self, Joining { name, waiting }: Joining) {
        self.hosts.push(Host { name, waiting, lines: VecDeque::new(), bytes: 0, ended: false, heard: None });
    }

    /// The next lines, as many as are due; nothing at the end of all.
    pub(super) async fn next(&mut self) -> Option<pb::ReadLogsResponse> {
        loop {
            if let Some(warning) = self.warnings.pop_front() {
                return Some(pb::ReadLogsResponse { warning, ..Default::default() });
            }
            let lines = self.due();
            if !lines.is_empty() {
                return Some(pb::ReadLogsResponse { lines, ..Default::default() });
            }
            let until = match self.decide() {
                Next::End => return None,
                Next::Line(_) => continue,
                Next::WaitUntil(until) => until,
            };
            tokio::select! {
                () = self.receive() => {}
                () = sleep_until(until) => self.leave_stalled_behind(),
            }
        }
    }

    fn due(&mut self) -> Vec<pb::LogLine> {
        let mut due = Vec::new();
        let mut bytes = 0;
        while due.len() < LINES_PER_ANSWER && bytes < BYTES_PER_ANSWER {
            self.receive_ready();
            let Next::Line(index) = self.decide() else { break };
            let Some(line) = self.hosts[index].take() else { break };
            bytes += line.text.len();
            due.push(line);
        }
        due
    }

    fn decide(&self) -> Next {
        let now = Instant::now();
        let earliest = self
            .hosts
            .iter()
            .enumerate()
            .filter_map(|(index, host)| host.lines.front().map(|(came, line)| (line.unix_ns, index, *came)))
            .min();
        let mut silent = self.hosts.iter().filter(|host| host.is_silent()).peekable();
        if silent.peek().is_none() {
            // Every host shows its head, or all have ended.
            return match earliest {
                Some((_, index, _)) => Next::Line(index),
                None if self.joining.is_some() => Next::WaitUntil(now + STALLED),
                None => Next::End,
            };
        }
        let heard = silent.filter_map(|host| host.heard).min();
        match earliest {
            Some((_, index, came)) if self.joining.is_some() => {
                if now >= came + REORDER {
                    Next::Line(index)
                } else {
                    Next::WaitUntil(came + REORDER)
                }
            }
            // A follower waits as long as it takes.
            None if self.joining.is_some() => Next::WaitUntil(now + STALLED),
            _ => Next::WaitUntil(heard.unwrap_or(now) + STALLED),
        }
    }

    /// Takes what has arrived without waiting.
    fn receive_ready(&mut self) {
        for index in 0..self.hosts.len() {
            while self.hosts[index].is_wanted() {
                match self.hosts[index].waiting.try_recv() {
                    Ok(response) => self.accept(index, response),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => self.hosts[index].ended = true,
                }
            }
        }
    }

    /// Waits until any host whose queue has room has sent something or ended. Cancel-safe: what is received is kept.
    async fn receive(&mut self) {
        poll_fn(|context| {
            let mut progress = Poll::Pending;
            while let Some(joined) = self.joining.as_mut().map(|joining| joining.poll_recv(context)) {
                match joined {
                    Poll::Ready(Some(host)) => self.add(host),
                    Poll::Ready(None) => self.joining = None,
                    Poll::Pending => break,
                }
                progress = Poll::Ready(());
            }
            for index in 0..self.hosts.len() {
                if !self.hosts[index].is_wanted() {
                    continue;
                }
                match self.hosts[index].waiting.poll_recv(context) {
                    Poll::Ready(Some(response)) => self.accept(index, response),
                    Poll::Ready(None) => self.hosts[index].ended = true,
                    Poll::Pending => continue,
                }
                progress = Poll::Ready(());
            }
            progress
        })
        .await;
    }

    fn accept(&mut self, index: usize, response: pb::ReadLogsResponse) {
        let now = Instant::now();
        if !response.warning.is_empty() {
            self.warnings.push_back(response.warning);
        }
        let host = &mut self.hosts[index];
        host.heard = Some(now);
        host.bytes += response.lines.iter().map(|line| line.text.len()).sum::<usize>();
        host.lines.extend(response.lines.into_iter().map(|line| (now, line)));
    }

    fn leave_stalled_behind(&mut self) {
        if self.joining.is_some() {
            return;
        }
        for host in self.hosts.iter_mut().filter(|host| host.is_silent()) {
            if host.heard.is_some_and(|heard| heard.elapsed() >= STALLED) {
                host.ended = true;
                self.warnings
                    .push_back(format!("host {} stopped answering; its output is not complete", host.name));
            }
        }
    }
}

impl Host {
    fn is_wanted(&self) -> bool {
        !self.ended && self.lines.len() < LINES_PER_HOST && self.bytes < BYTES_PER_HOST
    }

    /// It has no line to show, and may have some yet.
    fn is_silent(&self) -> bool {
        !self.ended && self.lines.is_empty()
    }

    fn take(&mut self) -> Option<pb::LogLine> {
        let (_, line) = self.lines.pop_front()?;
        self.bytes -= line.text.len();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(host: &str, times: &[i64]) -> pb::ReadLogsResponse {
        let line =
            |unix_ns: &i64| pb::LogLine { host: host.to_owned(), unix_ns: *unix_ns, ..Default::default() };
        pb::ReadLogsResponse { lines: times.iter().map(line).collect(), ..Default::default() }
    }

    async fn all(merge: &mut Merge) -> (Vec<i64>, Vec<String>) {
        let (mut times, mut warnings) = (Vec::new(), Vec::new());
        while let Some(answer) = merge.next().await {
            times.extend(answer.lines.iter().map(|line| line.unix_ns));
            warnings.extend((!answer.warning.is_empty()).then_some(answer.warning));
        }
        (times, warnings)
    }

    async fn host(name: &str, parts: &[&[i64]]) -> (mpsc::Sender<pb::ReadLogsResponse>, Joining) {
        let (sender, waiting) = mpsc::channel(8);
        for part in parts {
            sender.send(lines(name, part)).await.unwrap();
        }
        (sender, Joining { name: name.to_owned(), waiting })
    }

    #[tokio::test(start_paused = true)]
    async fn lines_of_all_hosts_come_in_the_order_of_their_times() {
        let mut hosts = Vec::new();
        for (name, parts) in [("a", [&[1, 4][..], &[9]]), ("b", [&[2, 3], &[5, 8]]), ("c", [&[], &[7]])] {
            hosts.push(host(name, &parts).await.1);
        }
        assert_eq!(all(&mut Merge::of(hosts)).await, (vec![1, 2, 3, 4, 5, 7, 8, 9], Vec::<String>::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_stalls_is_left_behind_with_a_warning() {
        let (good, a) = host("a", &[&[1, 2]]).await;
        let (_stalled, b) = host("b", &[&[]]).await;
        drop(good);
        let (times, warnings) = all(&mut Merge::of(vec![a, b])).await;
        assert_eq!(times, [1, 2]);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("host b stopped answering"), "{warnings:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_says_that_it_searches_is_waited_for() {
        let (good, a) = host("a", &[&[1, 9]]).await;
        let (searching, b) = host("b", &[&[]]).await;
        drop(good);
        let mut merge = Merge::of(vec![a, b]);
        let search = async {
            for _ in 0..3 {
                sleep_until(Instant::now() + STALLED - Duration::from_millis(1)).await;
                searching.send(lines("b", &[])).await.unwrap();
            }
            searching.send(lines("b", &[5])).await.unwrap();
            drop(searching);
        };
        let (merged, ()) = tokio::join!(all(&mut merge), search);
        assert_eq!(merged, (vec![1, 5, 9], Vec::<String>::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_waits_for_its_turn_to_be_asked_is_not_called_stalled() {
        let (waiting, a) = host("a", &[]).await;
        let mut merge = Merge::of(vec![a]);
        let turn = async {
            sleep_until(Instant::now() + 3 * STALLED).await;
            waiting.send(lines("a", &[1])).await.unwrap();
            drop(waiting);
        };
        let (merged, ()) = tokio::join!(all(&mut merge), turn);
        assert_eq!(merged, (vec![1], Vec::<String>::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn very_long_lines_of_a_host_wait_where_they_are() {
        let long = |unix_ns| {
            let line =
                pb::LogLine { text: vec![b'x'; BYTES_PER_HOST / 2].into(), unix_ns, ..Default::default() };
            pb::ReadLogsResponse { lines: vec![line], ..Default::default() }
        };
        let (sender, waiting) = mpsc::channel(8);
        for unix_ns in 1..=6 {
            sender.send(long(unix_ns)).await.unwrap();
        }
        drop(sender);
        let (quiet, b) = host("b", &[&[]]).await;
        let mut merge = Merge::of(vec![Joining { name: "a".to_owned(), waiting }, b]);
        merge.receive_ready();
        assert_eq!(merge.hosts[0].lines.len(), 2);
        drop(quiet);
        assert_eq!(all(&mut merge).await.0, [1, 2, 3, 4, 5, 6]);
        assert_eq!(merge.hosts[0].bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_is_not_held_up_by_a_quiet_host() {
        let (joining, joined) = mpsc::channel(4);
        let mut merge = Merge::following(joined);
        let (_a, a) = host("a", &[&[5]]).await;
        let (_b, b) = host("b", &[&[4]]).await;
        joining.send(a).await.unwrap();
        joining.send(b).await.unwrap();
        let begun = Instant::now();
        let mut times = Vec::new();
        while times.len() < 2 {
            times.extend(merge.next().await.unwrap().lines.iter().map(|line| line.unix_ns));
        }
        assert_eq!(times, [4, 5]);
        assert!(begun.elapsed() <= REORDER, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_joins_later_is_followed_too() {
        let (joining, joined) = mpsc::channel(4);
        let mut merge = Merge::following(joined);
        let (first, a) = host("a", &[&[1]]).await;
        joining.send(a).await.unwrap();
        assert_eq!(merge.next().await.unwrap().lines[0].unix_ns, 1);
        drop(first);
        let (_second, b) = host("b", &[&[2]]).await;
        joining.send(b).await.unwrap();
        assert_eq!(merge.next().await.unwrap().lines[0].unix_ns, 2);
        drop((joining, _second));
        assert_eq!(all(&mut merge).await, (vec![], vec![]), "ends when nobody can join and all have ended");
    }
}
