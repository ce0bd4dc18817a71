//! Links between machines, each way of its own: open or cut, quick or slow. What travels in a stream arrives in
//! order or not at all; over a cut link it waits, as in a kernel's buffers, until the link heals or an end gives up.

use std::collections::BTreeMap;

use nave_proto::pb;
use rand::Rng;
use rand::rngs::SmallRng;

use crate::clock::MS;
use crate::context::Context;
use crate::event::Event;

/// A machine: members come first, then hosts.
pub(crate) type Node = usize;

/// Which way a message of a stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

/// What travels in a session's stream.
#[derive(Debug, Clone)]
pub(crate) enum Word {
    Agent(Box<pb::agent_message::Message>),
    Hub(Box<pb::hub_message::Message>),
    /// The session is refused, or ended, for this reason.
    Refused(Refusal),
    /// The other end has closed it.
    Closed,
}

/// Why a member does not talk to an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The host was given up for good.
    Forgotten,
    /// Another place speaks for it: it may be tried again.
    Held,
}

/// One session's stream, between a host (up) and a member (down).
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) host: usize,
    pub(crate) member: usize,
    up: Lane,
    down: Lane,
}

/// One way of a stream.
#[derive(Debug, Default)]
struct Lane {
    /// The receiving end has closed.
    deaf: bool,
    last: i64,
    waiting: Vec<Word>,
}

impl Stream {
    fn lane(&mut self, way: Way) -> &mut Lane {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Network {
    members: usize,
    nodes: usize,
    /// Per directed link: how many faults cut it.
    cuts: Vec<u32>,
    slow: Vec<bool>,
    frozen_until: Vec<i64>,
    down: Vec<bool>,
    streams: BTreeMap<u64, Stream>,
    next_stream: u64,
}

impl Network {
    pub(crate) fn new(members: usize, hosts: usize) -> Self {
        let nodes = members + hosts;
        Self {
            members,
            nodes,
            cuts: vec![0; nodes * nodes],
            slow: vec![false; nodes],
            frozen_until: vec![0; nodes],
            down: vec![false; nodes],
            streams: BTreeMap::new(),
            next_stream: 1,
        }
    }

    pub(crate) fn host(&self, host: usize) -> Node {
        self.members + host
    }

    pub(crate) fn is_open(&self, from: Node, to: Node) -> bool {
        self.cuts[from * self.nodes + to] == 0
    }

    pub(crate) fn both_ways(&self, one: Node, other: Node) -> bool {
        self.is_open(one, other) && self.is_open(other, one)
    }

    /// How long a message takes now, nanoseconds.
    pub(crate) fn delay(&self, rng: &mut SmallRng, from: Node, to: Node) -> i64 {
        let usual = rng.random_range(MS / 10..3 * MS);
        if self.slow[from] || self.slow[to] { usual + rng.random_range(0..400 * MS) } else { usual }
    }

    pub(crate) fn set_slow(&mut self, node: Node, slow: bool) {
        self.slow[node] = slow;
    }

    pub(crate) fn freeze(&mut self, node: Node, until: i64) {
        self.frozen_until[node] = self.frozen_until[node].max(until);
    }

    /// When a stopped process goes on; in the past when it is not stopped.
    pub(crate) fn frozen_until(&self, node: Node) -> i64 {
        self.frozen_until[node]
    }

    pub(crate) fn set_down(&mut self, node: Node, down: bool) {
        self.down[node] = down;
    }

    /// Whether somebody is there who takes calls.
    pub(crate) fn answers(&self, node: Node, now: i64) -> bool {
        !self.down[node] && self.frozen_until[node] <= now
    }

    pub(crate) fn thaw(&mut self, node: Node) {
        self.frozen_until[node] = 0;
    }

    pub(crate) fn open_stream(&mut self, host: usize, member: usize) -> u64 {
        let id = self.next_stream;
        self.next_stream += 1;
        self.streams.insert(id, Stream { host, member, up: Lane::default(), down: Lane::default() });
        id
    }

    pub(crate) fn stream(&self, id: u64) -> Option<&Stream> {
        self.streams.get(&id)
    }

    /// Streams of one machine.
    pub(crate) fn streams_of(&self, node: Node) -> Vec<u64> {
        let of = |stream: &Stream| stream.member == node || self.host(stream.host) == node;
        self.streams.iter().filter(|(_, stream)| of(stream)).map(|(id, _)| *id).collect()
    }

    fn ends(&self, id: u64, way: Way) -> Option<(Node, Node)> {
        let stream = self.streams.get(&id)?;
        let (up, down) = (self.host(stream.host), stream.member);
        Some(match way {
            Way::Up => (up, down),
            Way::Down => (down, up),
        })
    }

    /// Whether an end still listens.
    pub(crate) fn hears(&self, id: u64, way: Way) -> bool {
        let lane = |stream: &Stream| match way {
            Way::Up => !stream.up.deaf,
            Way::Down => !stream.down.deaf,
        };
        self.streams.get(&id).is_some_and(lane)
    }
}

impl Context {
    /// Cuts or heals one way of a link.
    pub(crate) fn cut(&mut self, from: Node, to: Node, cut: bool) {
        let link = from * self.net.nodes + to;
        let cuts = &mut self.net.cuts[link];
        *cuts = if cut { *cuts + 1 } else { cuts.saturating_sub(1) };
        let cuts = *cuts;
        let between = |stream: &Stream| {
            let ends = [self.net.members + stream.host, stream.member];
            ends.contains(&from) && ends.contains(&to)
        };
        let ids: Vec<u64> =
            self.net.streams.iter().filter(|(_, stream)| between(stream)).map(|(id, _)| *id).collect();
        for id in ids {
            if cut {
                // HTTP/2 pings: a second between them, two for the answer. The other side is slower to notice.
                let soon = self.rng.random_range(2_000 * MS..3_200 * MS);
                self.after(soon, Event::PingLost { stream: id, way: Way::Down });
                let late = self.rng.random_range(2_000 * MS..30_000 * MS);
                self.after(late, Event::PingLost { stream: id, way: Way::Up });
            } else if cuts == 0 {
                self.flush(id);
            }
        }
    }

    fn flush(&mut self, id: u64) {
        for way in [Way::Up, Way::Down] {
            let Some((from, to)) = self.net.ends(id, way) else { return };
            if !self.net.is_open(from, to) {
                continue;
            }
            let Some(stream) = self.net.streams.get_mut(&id) else { return };
            for word in std::mem::take(&mut stream.lane(way).waiting) {
                self.send(id, way, word);
            }
        }
    }

    /// Puts a word into a stream.
    pub(crate) fn send(&mut self, id: u64, way: Way, word: Word) {
        let Some((from, to)) = self.net.ends(id, way) else { return };
        let delay = self.net.delay(&mut self.rng, from, to);
        let Some(stream) = self.net.streams.get_mut(&id) else { return };
        let lane = stream.lane(way);
        lane.last = (lane.last + 1).max(self.now + delay);
        let at = lane.last;
        self.at(at, Event::Arrive { stream: id, way, word });
    }

    /// A word that has travelled: itself when it arrives now.
    pub(crate) fn arrive(&mut self, id: u64, way: Way, word: Word) -> Option<Word> {
        let (from, to) = self.net.ends(id, way)?;
        let open = self.net.is_open(from, to);
        let lane = self.net.streams.get_mut(&id)?.lane(way);
        if lane.deaf {
            return None;
        }
        if !open || !lane.waiting.is_empty() {
            lane.waiting.push(word);
            return None;
        }
        Some(word)
    }

    /// The end that listens on this way closes. The other end hears of it, after all that was said before.
    pub(crate) fn close(&mut self, id: u64, way: Way) {
        let Some(stream) = self.net.streams.get_mut(&id) else { return };
        let lane = stream.lane(way);
        if std::mem::replace(&mut lane.deaf, true) {
            return;
        }
        lane.waiting.clear();
        let back = match way {
            Way::Up => Way::Down,
            Way::Down => Way::Up,
        };
        if stream.lane(back).deaf {
            self.net.streams.remove(&id);
            return;
        }
        self.send(id, back, Word::Closed);
    }

    /// A machine is gone without a word: what it had said and was not sent yet is lost with it.
    pub(crate) fn drop_end(&mut self, id: u64, way: Way) {
        if let Some(stream) = self.net.streams.get_mut(&id) {
            let back = match way {
                Way::Up => Way::Down,
                Way::Down => Way::Up,
            };
            // That it had closed its end is known from the silence all the same.
            stream.lane(back).waiting.retain(|word| matches!(word, Word::Closed));
        }
        self.close(id, way);
    }
}
