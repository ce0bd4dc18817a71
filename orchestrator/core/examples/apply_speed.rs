//! How long `apply` takes for a distinct service without instances, and how long encoding its rows takes:
//! `cargo run --release -p nave-orchestrator-core --example apply_speed`. The write benchmark's hot path.
//! Counts this thread's own time on a processor (Linux), so that a busy machine measures the same.

#![expect(clippy::print_stdout, reason = "a measurement for people")]

use nave_orchestrator_core::{Change, ClusterState, PlanCursor, plan_dirty};
use nave_proto::pb;

fn main() {
    let services =
        std::env::args().nth(1).map_or(200_000, |given| given.parse().expect("a number of services"));
    let per = |what: &str, ns: u64| {
        println!("{what}: {}.{:02} us per service", ns / services / 1000, ns / services % 1000 / 10)
    };
    let mut state = ClusterState::new();
    state.apply(1, command(0, pb::command::Body::InitCluster(pb::InitCluster::default())));
    let mut commands: Vec<_> = (2..).zip((0..services).map(apply_service)).collect();
    let (mut apply_ns, mut encode_ns, mut bytes, mut rows) = (0, 0, 0_u64, 0);
    while !commands.is_empty() {
        // As much as the state writer is behind.
        let batch: Vec<_> = commands.drain(..commands.len().min(256)).collect();
        let start = on_cpu_ns();
        let changes: Vec<Vec<Change>> =
            batch.into_iter().map(|(index, command)| state.apply(index, command).changes).collect();
        apply_ns += on_cpu_ns() - start;
        let start = on_cpu_ns();
        bytes +=
            changes.iter().flatten().filter_map(Change::value).map(|value| value.len() as u64).sum::<u64>();
        encode_ns += on_cpu_ns() - start;
        rows += changes.iter().map(|changes| changes.len() as u64).sum::<u64>();
    }
    per("apply", apply_ns);
    per("encode", encode_ns);
    println!("{} bytes and {} rows each", bytes / services, rows / services);
    let start = on_cpu_ns();
    let plan = plan_dirty(&state, &mut PlanCursor::default(), 0, 1000);
    per("plan", on_cpu_ns() - start);
    println!("{} steps", plan.steps.len());
}

fn on_cpu_ns() -> u64 {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has it");
    schedstat
        .split(' ')
        .next()
        .and_then(|ns| ns.parse().ok())
        .expect("its first number is time on a processor")
}

fn command(number: u64, body: pb::command::Body) -> pb::Command {
    let request_id =
        Some(pb::RequestId { client_id: format!("client-{}", number % 512), serial: number / 512 + 1 });
    let time_unix_ns = i64::try_from(number * 25_000).expect("a few seconds");
    pb::Command { time_unix_ns, actor: "operator/bench".into(), request_id, written_by: 1, body: Some(body) }
}

fn apply_service(number: u64) -> pb::Command {
    let probe = pb::Probe { check: Some(pb::probe::Check::Http("/".into())), ..Default::default() };
    let manifest = pb::Manifest {
        // Names in no order, as from many clients.
        name: format!("service-{:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        command: ["python3", "-m", "http.server", "${PORT}"].map(str::to_owned).to_vec(),
        env: [("LOG_LEVEL".to_owned(), "info".to_owned())].into(),
        ports: [("http".to_owned(), pb::Port { service_port: 80, ..Default::default() })].into(),
        health: Some(pb::Health { ready: Some(probe), ..Default::default() }),
        restart: Some(pb::Restart::default()),
        resources: Some(pb::Resources { cpu_millicores: 500, ..Default::default() }),
        update: Some(pb::Update { max_parallel: 1, auto_revert: true, ..Default::default() }),
        stop: Some(pb::Stop::default()),
        ..Default::default()
    };
    command(
        number,
        pb::command::Body::ApplyService(pb::ApplyService {
            manifest: Some(Box::new(manifest)),
            expected_version: None,
        }),
    )
}
