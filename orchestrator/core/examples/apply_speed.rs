//! How long `apply` takes for a distinct service without instances, and how long encoding its rows takes:
//! `cargo run --release -p nave-orchestrator-core --example apply_speed`. The write benchmark's hot path.
//! Counts this thread's own time on a processor (Linux), so that a busy machine measures the same.

#![expect(clippy::print_stdout, reason = "a measurement for people")]

use nave_orchestrator_core::{Change, ClusterState, PlanCursor, plan_dirty};
use nave_proto::pb;

const SERVICES: u64 = 200_000;

fn main() {
    let mut state = ClusterState::new();
    state.apply(1, command(0, pb::command::Body::InitCluster(pb::InitCluster::default())));
    let commands: Vec<_> = (0..SERVICES).map(apply_service).collect();
    let mut changes: Vec<Vec<Change>> = Vec::new();
    let start = on_cpu_ns();
    for (index, command) in (2..).zip(commands) {
        changes.push(state.apply(index, command).changes);
    }
    per("apply", start);
    let start = on_cpu_ns();
    let bytes: usize = changes.iter().flatten().filter_map(Change::value).map(|value| value.len()).sum();
    per("encode", start);
    println!(
        "{} bytes and {} rows each",
        bytes / count(),
        changes.iter().map(Vec::len).sum::<usize>() / count()
    );
    let mut cursor = PlanCursor::default();
    let start = on_cpu_ns();
    let plan = plan_dirty(&state, &mut cursor, 0, 1000);
    per("plan", start);
    println!("{} steps", plan.steps.len());
}

fn per(what: &str, start: u64) {
    let ns = (on_cpu_ns() - start) / SERVICES;
    println!("{what}: {}.{:02} us per service", ns / 1000, ns % 1000 / 10);
}

fn on_cpu_ns() -> u64 {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has it");
    schedstat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("its first number is time on a processor")
}

fn count() -> usize {
    usize::try_from(SERVICES).expect("a few hundred thousand fit")
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
        health: Some(pb::Health { ready: Some(probe), live: None }),
        restart: Some(pb::Restart::default()),
        resources: Some(pb::Resources { cpu_millicores: 500, ..Default::default() }),
        update: Some(pb::Update { max_parallel: 1, auto_revert: true, ..Default::default() }),
        stop: Some(pb::Stop::default()),
        ..Default::default()
    };
    command(
        number,
        pb::command::Body::ApplyService(pb::ApplyService {
            manifest: Some(manifest),
            expected_version: None,
        }),
    )
}
