//! What a seed means: how large the world is, and what is done to it from outside, and when. An act names its target
//! by a number that is taken modulo what there is, so that any list of acts is a scenario: that is what makes a failing
//! one shrinkable.

use std::time::Duration;

use nave_proto::pb;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::clock::{MS, SECOND};

const SERVICES: [&str; 4] = ["api", "db", "web", "zoo"];

/// Something done from outside.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Operate(Operation),
    /// One way only, or both.
    CutLink {
        from: usize,
        to: usize,
        both: bool,
        length: i64,
    },
    /// A machine alone, from everybody.
    Isolate {
        node: usize,
        length: i64,
    },
    Slow {
        node: usize,
        length: i64,
    },
    Freeze {
        node: usize,
        length: i64,
    },
    KillMember {
        member: usize,
        length: i64,
    },
    Lead {
        member: usize,
    },
    WallClock {
        member: usize,
        by: i64,
    },
    KillAgent {
        host: usize,
        length: i64,
    },
    DoomAgent {
        host: usize,
        steps: u32,
    },
    PowerOff {
        host: usize,
        length: i64,
    },
    CrashProcess {
        host: usize,
        pick: usize,
    },
    Sicken {
        host: usize,
        pick: usize,
        length: i64,
    },
}

impl Act {
    /// The same, its fault over within `left`.
    pub(crate) fn ending_by(mut self, left: i64) -> Self {
        match &mut self {
            Self::CutLink { length, .. }
            | Self::Isolate { length, .. }
            | Self::Slow { length, .. }
            | Self::Freeze { length, .. }
            | Self::KillMember { length, .. }
            | Self::KillAgent { length, .. }
            | Self::PowerOff { length, .. }
            | Self::Sicken { length, .. } => *length = (*length).min(left),
            Self::Operate(_)
            | Self::Lead { .. }
            | Self::WallClock { .. }
            | Self::DoomAgent { .. }
            | Self::CrashProcess { .. } => {}
        }
        self
    }
}

/// What an operator wants.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Apply(Box<pb::Manifest>),
    Scale { service: usize, count: u32 },
    Restart { service: usize },
    Rollback { service: usize, to: u64 },
    Delete { service: usize },
    Drain { host: usize, draining: bool },
    Forget { host: usize },
}

pub(crate) fn service(pick: usize) -> &'static str {
    SERVICES[pick % SERVICES.len()]
}

/// One world and its history.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) members: usize,
    pub(crate) hosts: usize,
    /// (true time, act), in order.
    pub(crate) acts: Vec<(i64, Act)>,
    /// From then on nothing bad happens.
    pub(crate) calm_at: i64,
}

impl Scenario {
    pub(crate) fn of(seed: u64) -> Self {
        let rng = &mut SmallRng::seed_from_u64(seed ^ 0x5ce0_a210);
        let members = if rng.random_bool(0.15) { 5 } else { 3 };
        let hosts = rng.random_range(2..=7);
        let calm_at = rng.random_range(60..=480) * SECOND;
        let faults = [0.0, 0.3, 1.0, 2.5][rng.random_range(0..4)];
        let mut acts = Vec::new();
        // The first services early, so that there is something to break.
        for service in 0..rng.random_range(1..=SERVICES.len()) {
            let at = rng.random_range(SECOND..8 * SECOND);
            acts.push((at, Act::Operate(Operation::Apply(Box::new(manifest(rng, service))))));
        }
        let mut at = 8 * SECOND;
        while at < calm_at {
            at += rng.random_range(200 * MS..12 * SECOND);
            let fault = rng.random_bool(faults / (faults + 0.7));
            let act =
                if fault { self::fault(rng, members, hosts) } else { Act::Operate(operation(rng, hosts)) };
            acts.push((at, act));
        }
        acts.retain(|(at, _)| *at < calm_at);
        acts.sort_by_key(|(at, _)| *at);
        Self { seed, members, hosts, acts, calm_at }
    }
}

fn length(rng: &mut SmallRng) -> i64 {
    match rng.random_range(0..4) {
        0 => rng.random_range(50 * MS..2 * SECOND),
        1 | 2 => rng.random_range(2 * SECOND..15 * SECOND),
        _ => rng.random_range(15 * SECOND..90 * SECOND),
    }
}

fn fault(rng: &mut SmallRng, members: usize, hosts: usize) -> Act {
    let (member, host) = (rng.random_range(0..members), rng.random_range(0..hosts));
    let node = rng.random_range(0..members + hosts);
    let pick = rng.random_range(0..32);
    match rng.random_range(0..100) {
        0..16 => {
            let (from, to) = (node, rng.random_range(0..members));
            Act::CutLink { from, to, both: rng.random_bool(0.6), length: length(rng) }
        }
        16..32 => Act::Isolate { node, length: length(rng) },
        32..38 => Act::Slow { node, length: length(rng) },
        38..48 => Act::Freeze { node, length: length(rng) },
        48..56 => Act::KillMember { member, length: length(rng) },
        56..60 => Act::Lead { member },
        60..64 => Act::WallClock { member, by: rng.random_range(-90 * SECOND..90 * SECOND) },
        64..70 => Act::KillAgent { host, length: length(rng) },
        70..78 => Act::DoomAgent { host, steps: rng.random_range(0..12) },
        78..85 => Act::PowerOff { host, length: length(rng) },
        85..94 => Act::CrashProcess { host, pick },
        _ => Act::Sicken { host, pick, length: length(rng) },
    }
}

fn operation(rng: &mut SmallRng, hosts: usize) -> Operation {
    let service = rng.random_range(0..SERVICES.len());
    let host = rng.random_range(0..hosts);
    match rng.random_range(0..100) {
        0..30 => Operation::Apply(Box::new(manifest(rng, service))),
        30..55 => Operation::Scale { service, count: rng.random_range(0..6) },
        55..70 => Operation::Restart { service },
        70..76 => Operation::Rollback { service, to: rng.random_range(0..4) },
        76..82 => Operation::Delete { service },
        82..92 => Operation::Drain { host, draining: true },
        92..97 => Operation::Drain { host, draining: false },
        _ => Operation::Forget { host },
    }
}

fn seconds(seconds: u64) -> Option<prost_types::Duration> {
    Duration::from_secs(seconds).try_into().ok()
}

fn manifest(rng: &mut SmallRng, service: usize) -> pb::Manifest {
    let command = match rng.random_range(0..20) {
        0 => "crashing",
        1 => "never-healthy",
        2 => "missing",
        3..8 => "one",
        8..14 => "two",
        _ => "three",
    };
    let port = if rng.random_bool(0.15) { 8_000 + u32::try_from(service).unwrap_or_default() } else { 0 };
    let ports = match rng.random_bool(0.5) {
        true => [("http".to_owned(), pb::Port { service_port: 80, port, ..Default::default() })].into(),
        false => Default::default(),
    };
    let probe = pb::Probe { check: Some(pb::probe::Check::Tcp(true)), ..Default::default() };
    // One that is never healthy is judged by that only while somebody asks.
    let asked = rng.random_bool(0.5) || command == "never-healthy";
    let health = asked.then_some(pb::Health { ready: Some(probe), ..Default::default() });
    let needs = match service {
        2 if rng.random_bool(0.3) => vec![SERVICES[1].to_owned()],
        _ => Vec::new(),
    };
    let hook =
        |chosen: bool| chosen.then(|| pb::Hook { command: vec!["true".to_owned()], timeout: seconds(30) });
    let hooks = rng.random_bool(0.25).then(|| pb::Hooks {
        pre_start: hook(rng.random_bool(0.5)),
        post_start: hook(rng.random_bool(0.5)),
        pre_stop: None,
        post_stop: hook(rng.random_bool(0.5)),
    });
    let stop = rng.random_bool(0.4);
    // Each but one needs something else of its own, so that there is something to fetch.
    let artifact =
        pb::Artifact { sha256: command.to_owned(), archive: "none".to_owned(), ..Default::default() };
    let artifacts = if command == "one" { Vec::new() } else { vec![artifact] };
    let on_disconnect = if stop { pb::OnDisconnect::Stop } else { pb::OnDisconnect::Keep };
    pb::Manifest {
        name: SERVICES[service].to_owned(),
        command: vec![command.to_owned()],
        count: rng.random_range(0..5),
        per_host: rng.random_bool(0.12),
        ports,
        health,
        needs,
        restart: Some(pb::Restart {
            policy: pb::RestartPolicy::Always.into(),
            budget_restarts: 10,
            budget_window: seconds(300),
            ..Default::default()
        }),
        resources: Some(pb::Resources {
            cpu_millicores: [0, 100, 1_000][rng.random_range(0..3)],
            memory_bytes: 64 << 20,
            ..Default::default()
        }),
        update: Some(pb::Update {
            max_parallel: rng.random_range(1..3),
            min_ready: seconds([0, 0, 2, 10][rng.random_range(0..4)]),
            progress_deadline: seconds([30, 60, 120][rng.random_range(0..3)]),
            auto_revert: rng.random_bool(0.7),
            canary: 0,
        }),
        stop: Some(pb::Stop {
            signal: 15,
            grace: seconds([1, 5, 10, 30][rng.random_range(0..4)]),
            ..Default::default()
        }),
        placement: Some(pb::Placement { on_disconnect: on_disconnect.into(), ..Default::default() }),
        hooks,
        artifacts,
        ..Default::default()
    }
}
