//! The scheduler alone, on one core: a fleet is filled from empty, then one host is lost. Steps are planned in the
//! slices that the leader's loop takes, and each slice is applied as the log would, so a row is the whole work of the
//! registry short of the log itself. Filling is timed by a core's work
//! and not by the clock, so that others on the machine do not count; a loss, too short for that, by the clock.

use std::time::Duration;

use nave_orchestrator_core::limits::STEPS_PER_COMMAND;
use nave_orchestrator_core::{ClusterState, PlanCursor, plan_dirty};
use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::{Running, State};
use tokio::time::Instant;

/// Hosts lost one after another; the table has the one in the middle.
const LOSSES: u64 = 9;

const GIB: u64 = 1 << 30;

/// One row of the table.
struct Case {
    what: &'static str,
    hosts: u64,
    services: u32,
    count: u32,
}

const CASES: [Case; 6] = [
    Case { what: "many services", hosts: 500, services: 100, count: 100 },
    Case { what: "many services", hosts: 5_000, services: 1_000, count: 100 },
    Case { what: "one instance each", hosts: 5_000, services: 100_000, count: 1 },
    Case { what: "few great services", hosts: 5_000, services: 10, count: 10_000 },
    Case { what: "many services", hosts: 50_000, services: 10_000, count: 100 },
    Case { what: "many on a host", hosts: 5_000, services: 10_000, count: 100 },
];

/// Prints the table.
pub(crate) fn run() {
    println!(
        "| fleet | hosts | instances | steps | plan | apply | both, per instance | one host lost: steps | plan | apply | memory, per instance |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    // For a quick look: only rows with at most so many instances, or only those of a name.
    let wanted = std::env::var("NAVE_BENCH_PLAN").unwrap_or_default();
    let most = wanted.parse::<u32>().ok();
    for case in CASES {
        if most.map_or(case.what.contains(&wanted), |most| case.services * case.count <= most) {
            println!("{}", row(&case));
        }
    }
}

fn row(case: &Case) -> String {
    let mut hub = Hub::new();
    (1..=case.hosts).for_each(|id| hub.join(id));
    (0..case.services).for_each(|number| hub.deploy(number, case.count));
    let before = resident_bytes();
    let filled = hub.settle(cpu_time);
    let instances = hub.state.instances().len();
    hub.all_ready(case.hosts);
    hub.settle(cpu_time);
    let memory = resident_bytes().saturating_sub(before);
    let mut lost: Vec<_> =
        (1..=LOSSES).map(|nth| hub.lose(HostId(nth * case.hosts / (LOSSES + 1)))).collect();
    lost.sort_by_key(|took| took.plan + took.apply);
    let lost = &lost[lost.len() / 2];
    let both = filled.plan + filled.apply;
    format!(
        "| {}: {} of {} | {} | {} | {} | {} | {} | {:.1} µs | {} | {} | {} | {} bytes |",
        case.what,
        case.services,
        case.count,
        case.hosts,
        instances,
        filled.steps,
        shown(filled.plan),
        shown(filled.apply),
        both.as_secs_f64() * 1e6 / f64::from(u32::try_from(instances.max(1)).unwrap_or(u32::MAX)),
        lost.steps,
        shown(lost.plan),
        shown(lost.apply),
        memory / u64::try_from(instances.max(1)).unwrap_or(u64::MAX),
    )
}

fn shown(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds >= 1.0 => format!("{seconds:.2} s"),
        seconds => format!("{:.1} ms", seconds * 1e3),
    }
}

/// What a run of the scheduler took until it had nothing left to do.
#[derive(Default)]
struct Took {
    steps: usize,
    plan: Duration,
    apply: Duration,
}

/// A registry with its planner, without a log.
struct Hub {
    state: ClusterState,
    cursor: PlanCursor,
    index: u64,
    now: i64,
}

impl Hub {
    fn new() -> Self {
        let mut hub =
            Self { state: ClusterState::new(), cursor: PlanCursor::default(), index: 0, now: 1_000_000_000 };
        let token = pb::TokenRecord {
            id: "t".into(),
            expires_unix_ns: i64::MAX,
            uses_left: u32::MAX,
            ..Default::default()
        };
        hub.apply(Body::InitCluster(pb::InitCluster {
            cluster_id: "bench".into(),
            incarnation: 1,
            first_token: Some(token),
        }));
        hub
    }

    fn apply(&mut self, body: Body) {
        self.index += 1;
        let command = pb::Command {
            time_unix_ns: self.now,
            actor: "hub".into(),
            body: Some(body),
            ..Default::default()
        };
        let applied = self.state.apply(self.index, command);
        if let Some(pb::reply::Result::Rejected(rejected)) = applied.reply.result {
            println!("refused: {}", rejected.message);
        }
    }

    /// A host of 64 cores and 256 GiB in one of three zones and of forty racks.
    fn join(&mut self, id: u64) {
        let labels = [
            ("zone".to_owned(), ["a", "b", "c"][usize::try_from(id % 3).unwrap_or(0)].to_owned()),
            ("rack".to_owned(), format!("r{}", id % 40)),
        ];
        let facts = pb::HostFacts {
            name: format!("host-{id}"),
            cpu_millicores: 64_000,
            memory_bytes: 256 * GIB,
            os: "linux".into(),
            arch: "x86_64".into(),
            labels: labels.into(),
            ..Default::default()
        };
        let mut key = vec![0; 24];
        key.extend(id.to_be_bytes());
        let register = pb::RegisterHost { token_id: "t".into(), public_key_sha256: key, facts: Some(facts) };
        self.apply(Body::RegisterHost(register));
    }

    /// Ten request shapes; a tenth kept out of a zone, a fifth spread over zones, a twentieth with a fixed port.
    fn deploy(&mut self, number: u32, count: u32) {
        let mut manifest = pb::Manifest {
            name: format!("service-{number}"),
            command: vec!["serve".into()],
            count,
            ..Default::default()
        };
        let shape = u64::from(number % 10) + 1;
        manifest.resources = Some(pb::Resources {
            cpu_millicores: 10 * shape,
            memory_bytes: (32 * shape) << 20,
            ..Default::default()
        });
        let mut placement = pb::Placement::default();
        if number % 10 == 3 {
            placement.constraints.push("label.zone != \"b\"".into());
        }
        if number % 5 == 1 {
            placement.spread = "label.zone".into();
        }
        if number % 20 == 7 {
            let port = pb::Port { service_port: 80, port: 10_000 + number, ..Default::default() };
            manifest.ports.insert("http".into(), port);
        }
        manifest.placement = Some(placement);
        self.apply(Body::ApplyService(pb::ApplyService {
            manifest: Some(Box::new(manifest)),
            expected_version: None,
        }));
    }

    fn settle(&mut self, time: impl Fn() -> Duration) -> Took {
        let mut took = Took::default();
        loop {
            let begun = time();
            let plan = plan_dirty(&self.state, &mut self.cursor, self.now, STEPS_PER_COMMAND);
            took.plan += time() - begun;
            if plan.steps.is_empty() && !plan.more {
                return took;
            }
            took.steps += plan.steps.len();
            let begun = time();
            if !plan.steps.is_empty() {
                self.apply(Body::CommitPlan(pb::CommitPlan { steps: plan.steps }));
            }
            took.apply += time() - begun;
        }
    }

    /// Every agent says that all it was given runs and is ready.
    fn all_ready(&mut self, hosts: u64) {
        for host_id in 1..=hosts {
            let report = |instance: &pb::InstanceRecord| pb::InstanceReport {
                instance_id: instance.id,
                epoch: instance.epoch,
                attempt: 1,
                observed: Some(pb::Observed {
                    state: Some(State::Running(Running {
                        process: Some(pb::ProcessIdentity { pid: 4_000, ..Default::default() }),
                        started_unix_ns: self.now,
                        ready: true,
                    })),
                }),
                endpoint: pb::EndpointState::Ready.into(),
                ports: [("http".to_owned(), 20_000)].into(),
                ..Default::default()
            };
            let instances =
                self.state.instances_on(HostId(host_id)).map(|instance| report(instance)).collect();
            self.apply(Body::ReportInstances(pb::ReportInstances {
                host_id,
                instances,
                ..Default::default()
            }));
        }
    }

    /// The verdict, and everything until its instances are placed again; the verdict counts as applying.
    fn lose(&mut self, host: HostId) -> Took {
        self.now += 3_600_000_000_000;
        let begun = Instant::now();
        self.apply(Body::SetHostStatus(pb::SetHostStatus {
            host_id: host.0,
            status: pb::HostStatus::Lost.into(),
            reason: "not heard for 3 s".into(),
            lease_over_ms: 0,
        }));
        let verdict = begun.elapsed();
        let origin = Instant::now();
        let mut took = self.settle(|| origin.elapsed());
        took.apply += verdict;
        took
    }
}

/// What this thread has had of a core, so that others on the machine do not count.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    pages * 4096
}
