//! Everything that happens in the world, as plain data in one queue.

use nave_agent_core::{Input, Order};
use nave_proto::pb;

use crate::network::{Way, Word};

#[derive(Debug)]
pub(crate) enum Event {
    /// Something from outside: the scenario's n-th act.
    Act(usize),
    /// The end of a fault.
    Heal(Heal),
    Arrive {
        stream: u64,
        way: Way,
        word: Word,
    },
    /// Pings of the end that listens on this way have not been answered.
    PingLost {
        stream: u64,
        way: Way,
    },
    Agent(usize, ToAgent),
    Keeper(usize, ToKeeper),
    Member(usize, ToMember),
    /// Whether there is a leader with a quorum is looked at.
    Elect {
        look: u64,
    },
    /// What became of a proposal; none: nobody knows.
    Answer {
        proposal: u64,
        reply: Option<pb::Reply>,
    },
    Operator(usize),
    /// Is everything as wanted?
    Look,
}

/// What ends by itself.
#[derive(Debug, Clone)]
pub(crate) enum Heal {
    Link(usize, usize),
    Slow(usize),
    StartMember(usize),
    StartAgent(usize),
    StartHost(usize),
    Thaw,
    Well { host: usize, instance: u64, serial: u64 },
}

#[derive(Debug)]
pub(crate) enum ToAgent {
    /// Timers; of this run of the agent only, like all that follows.
    Wake {
        run: u64,
        at: i64,
    },
    Told {
        run: u64,
        told: Told,
    },
    Input {
        run: u64,
        instance: u64,
        input: Box<Input>,
    },
    /// A call to a member ended; with a stream when it was taken.
    Dialled {
        run: u64,
        member: usize,
        taken: bool,
    },
}

/// From the keeper, in order.
#[derive(Debug)]
pub(crate) enum Told {
    Input { instance: u64, input: Box<Input>, answers: bool },
    List(Vec<pb::KeptProcess>),
    Answered { instance: u64 },
}

#[derive(Debug)]
pub(crate) enum ToKeeper {
    Ask {
        run: u64,
        number: u64,
        ask: Ask,
    },
    /// The boot clock has reached a deadline or the end of a grace.
    Due,
    Ends {
        instance: u64,
        serial: u64,
        cause: pb::ExitCause,
        code: i32,
    },
    Healthy {
        instance: u64,
        serial: u64,
    },
}

/// From the agent to the keeper, in order.
#[derive(Debug)]
pub(crate) enum Ask {
    Hello,
    /// `told`: it serves the hub's will.
    Order {
        order: Box<Order>,
        told: bool,
    },
}

#[derive(Debug)]
pub(crate) enum ToMember {
    Apply,
    /// Beats go to the leader.
    Forward {
        run: u64,
        at: i64,
    },
    /// A member's beats arrive at what it takes for the leader.
    Beats {
        from: usize,
        sent: Vec<crate::beats::Sent>,
    },
    /// The leader's answers to them.
    Beaten {
        answers: Vec<crate::beats::Answered>,
        revision: u64,
    },
    /// Liveness is looked at.
    Judge {
        term: u64,
    },
    Plan {
        term: u64,
        at: i64,
    },
    /// Sessions look for what their agents have not been told.
    Sessions,
    Retry {
        stream: u64,
    },
    Propose(Box<crate::hub::Proposal>),
    /// It learns that a newer leader leads.
    Deposed {
        term: u64,
    },
}
