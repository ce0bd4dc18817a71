//! A registry under test: two replicas and a map of rows that follow one log, agents that do what they are told,
//! and a planner. After every command everything that must always hold is checked.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_orchestrator_core::{Applied, Change, ClusterState, PlanCursor, plan, plan_dirty};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::{self, State};
use nave_proto::pb::plan_step::Step;
use prost::Message as _;

pub(crate) const SECOND: i64 = 1_000_000_000;
pub(crate) const MIB: u64 = 1 << 20;

/// See the file's head.
pub(crate) struct World {
    pub(crate) state: ClusterState,
    replica: ClusterState,
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) now: i64,
    index: u64,
    cursor: PlanCursor,
    /// Instances whose processes come up but never become ready, by (service, template version).
    pub(crate) sick: Vec<(String, u64)>,
    /// Versions whose check finds every process unready, by service.
    pub(crate) unfit: Vec<(String, u64)>,
    /// What nobody gets ahead, by (service, template version), and what agents say of it; empty: nothing.
    pub(crate) unfetched: Vec<(String, u64, String)>,
}

impl World {
    /// Initialised, without hosts.
    pub(crate) fn new() -> Self {
        Self::of_format(nave_proto::COMMAND_FORMAT)
    }

    /// The same, begun by a build that knew no later command format.
    pub(crate) fn of_format(written_by: u32) -> Self {
        let mut world = Self::blank();
        let token = pb::TokenRecord {
            id: "t".into(),
            secret_sha256: vec![7; 32],
            expires_unix_ns: i64::MAX,
            uses_left: 1000,
            ..Default::default()
        };
        let init = pb::InitCluster {
            cluster_id: "00000000000000aa".into(),
            incarnation: 1,
            first_token: Some(token),
        };
        world.apply(pb::Command { written_by, ..world.command(Body::InitCluster(init)) });
        world
    }

    /// Before the first command.
    pub(crate) fn blank() -> Self {
        Self {
            state: ClusterState::new(),
            replica: ClusterState::new(),
            rows: BTreeMap::new(),
            now: 1_000 * SECOND,
            index: 0,
            cursor: PlanCursor::default(),
            sick: Vec::new(),
            unfit: Vec::new(),
            unfetched: Vec::new(),
        }
    }

    /// With hosts h-1.. of 4 cores and 4 GiB, named alpha, beta, gamma…
    pub(crate) fn with_hosts(count: usize) -> Self {
        let mut world = Self::new();
        for name in ["alpha", "beta", "gamma", "delta", "epsilon"].into_iter().take(count) {
            world.join(name);
        }
        world
    }

    /// Applies a command everywhere and checks everything.
    pub(crate) fn apply(&mut self, command: pb::Command) -> Applied {
        self.index += 1;
        let applied = self.state.apply(self.index, command.clone());
        let again = self.replica.apply(self.index, command.clone());
        assert_eq!(applied, again, "replicas differ on {command:?}");
        let mut ids: Vec<_> = applied.changes.iter().map(Change::id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), applied.changes.len(), "a row changed twice in {command:?}");
        for change in &applied.changes {
            match change.value() {
                Some(value) => self.rows.insert(change.key(), value),
                None => self.rows.remove(&change.key()),
            };
        }
        self.check();
        applied
    }

    /// All that holds at any time.
    pub(crate) fn check(&self) {
        if let Err(wrong) = self.state.check() {
            panic!("{wrong}");
        }
        let rows: BTreeMap<_, _> =
            self.state.records().filter_map(|record| Some((record.key(), record.value()?))).collect();
        for (key, value) in &self.rows {
            let row = pb::Row::decode(value.as_slice()).unwrap();
            assert_eq!(rows.get(key), Some(value), "changes left a row that the tables have not: {row:?}");
        }
        assert_eq!(rows.len(), self.rows.len(), "the tables have rows that no change told of");
    }

    pub(crate) fn command(&self, body: Body) -> pb::Command {
        pb::Command {
            time_unix_ns: self.now,
            actor: "operator/test".into(),
            request_id: None,
            written_by: nave_proto::COMMAND_FORMAT,
            body: Some(body),
        }
    }

    pub(crate) fn try_apply(&mut self, body: Body) -> Result<pb::Accepted, pb::Rejected> {
        let before: Vec<_> = self.state.rows().collect();
        let applied = self.apply(self.command(body));
        match applied.reply.result.unwrap() {
            pb::reply::Result::Accepted(accepted) => Ok(accepted),
            pb::reply::Result::Rejected(rejected) => {
                assert!(applied.changes.is_empty(), "refused, yet it changed {:?}", applied.changes);
                assert_eq!(before, self.state.rows().collect::<Vec<_>>());
                Err(rejected)
            }
        }
    }

    pub(crate) fn accept(&mut self, body: Body) -> pb::Accepted {
        match self.try_apply(body.clone()) {
            Ok(accepted) => accepted,
            Err(rejected) => panic!("{} refused: {body:?}", rejected.message),
        }
    }

    pub(crate) fn refuse(&mut self, body: Body) -> (pb::RejectedCode, String) {
        let rejected = self.try_apply(body).unwrap_err();
        (rejected.code(), rejected.message)
    }

    pub(crate) fn blank_entry(&mut self) {
        self.index += 1;
        self.state.apply_blank(self.index);
        self.replica.apply_blank(self.index);
    }

    // Hosts

    pub(crate) fn join(&mut self, name: &str) -> HostId {
        let key = name.bytes().cycle().take(32).collect();
        self.join_as(key, facts(name))
    }

    pub(crate) fn join_as(&mut self, public_key_sha256: Vec<u8>, facts: pb::HostFacts) -> HostId {
        let register = pb::RegisterHost { token_id: "t".into(), public_key_sha256, facts: Some(facts) };
        HostId(self.accept(Body::RegisterHost(register)).host_id)
    }

    pub(crate) fn host_id(&self, name: &str) -> HostId {
        HostId(self.state.host_by_name(name).unwrap().id)
    }

    pub(crate) fn set_status(&mut self, name: &str, status: pb::HostStatus) {
        let host_id = self.host_id(name).0;
        let reason = "in a test".to_owned();
        self.accept(status_of(host_id, status, &reason));
    }

    /// The leader has seen this lost host without a lease for so long.
    pub(crate) fn lease_over(&mut self, host: HostId, for_how_long: Duration) {
        let lease_over_ms = u64::try_from(for_how_long.as_millis()).unwrap();
        let status = pb::HostStatus::Lost.into();
        self.accept(Body::SetHostStatus(pb::SetHostStatus {
            host_id: host.0,
            status,
            lease_over_ms,
            ..Default::default()
        }));
    }

    pub(crate) fn lose(&mut self, name: &str) {
        self.set_status(name, pb::HostStatus::Lost);
    }

    pub(crate) fn update_facts(&mut self, name: &str, change: impl FnOnce(&mut pb::HostFacts)) {
        let id = self.host_id(name);
        let mut facts = self.state.host(id).unwrap().facts.clone().unwrap();
        change(&mut facts);
        self.accept(Body::UpdateHost(pb::UpdateHost { host_id: id.0, facts: Some(facts), session: 0 }));
    }

    pub(crate) fn set_draining(&mut self, name: &str, draining: bool) {
        let host_id = self.host_id(name).0;
        let reason = "in a test".to_owned();
        self.accept(Body::SetHostDraining(pb::SetHostDraining { host_id, draining, reason }));
    }

    pub(crate) fn forget(&mut self, name: &str) {
        let host_id = self.host_id(name).0;
        self.accept(forget(host_id));
    }

    // Services

    pub(crate) fn deploy(&mut self, manifest: pb::Manifest) -> u64 {
        self.accept(apply(manifest)).version
    }

    pub(crate) fn service(&self, name: &str) -> &pb::ServiceRecord {
        self.state.service(name).unwrap_or_else(|| panic!("no service {name}"))
    }

    pub(crate) fn status(&self, name: &str) -> pb::DeploymentStatus {
        self.service(name).deployment.as_ref().unwrap().status()
    }

    pub(crate) fn reason(&self, name: &str) -> &str {
        &self.service(name).deployment.as_ref().unwrap().reason
    }

    pub(crate) fn wanted(&self, name: &str) -> Vec<pb::InstanceRecord> {
        let wanted = self.state.instances_of(name).filter(|i| i.desired() == pb::Desired::Run);
        wanted.map(|record| record.as_ref().clone()).collect()
    }

    pub(crate) fn ready(&self, name: &str) -> usize {
        nave_orchestrator_core::ready_count(&self.state, name)
    }

    /// Names of the hosts that wanted instances are on, sorted.
    pub(crate) fn hosts_of(&self, name: &str) -> Vec<String> {
        let name_of = |i: pb::InstanceRecord| {
            self.state.host(HostId(i.host_id)).unwrap().facts.clone().unwrap_or_default().name
        };
        let mut hosts: Vec<_> = self.wanted(name).into_iter().map(name_of).collect();
        hosts.sort();
        hosts
    }

    pub(crate) fn last_event(&self, kind: &str) -> String {
        let events = self.state.events(&Default::default(), usize::MAX);
        let last = events.iter().rev().find(|event| event.kind == kind);
        last.map_or_else(String::new, |event| event.message.clone())
    }

    // Planning

    /// The steps of the whole plan; the plan of what is dirty must be the same.
    pub(crate) fn steps(&mut self) -> Vec<Step> {
        let whole = plan(&self.state, self.now);
        let dirty = plan_dirty(&self.state, &mut self.cursor, self.now, usize::MAX);
        assert_eq!(whole.steps, dirty.steps, "what is dirty is not all there is to do");
        assert_eq!(whole.wake_at, dirty.wake_at, "a timer is wrong");
        assert!(!whole.more && !dirty.more);
        whole.steps.into_iter().map(|step| step.step.unwrap()).collect()
    }

    pub(crate) fn commit(&mut self, steps: Vec<Step>) {
        let steps = steps.into_iter().map(|step| pb::PlanStep { step: Some(step) }).collect();
        self.accept(Body::CommitPlan(pb::CommitPlan { steps }));
    }

    /// Plans once and commits; says how many steps there were.
    pub(crate) fn plan_once(&mut self) -> usize {
        let steps = self.steps();
        let count = steps.len();
        if count > 0 {
            self.commit(steps);
        }
        count
    }

    /// Plans and commits until there is nothing left to do, agents doing nothing.
    pub(crate) fn plan_all(&mut self) {
        for _ in 0..200 {
            if self.plan_once() == 0 {
                return;
            }
        }
        panic!("the plan never ends: {:?}", self.steps());
    }

    /// Plans, and agents do what they are told, until all is quiet. Time stands still.
    pub(crate) fn settle(&mut self) {
        for _ in 0..500 {
            let steps = self.plan_once();
            let reported = self.agents();
            if steps == 0 && !reported {
                return;
            }
        }
        panic!("it never settles: {:?}", self.steps());
    }

    /// Like `settle`, and goes on to each time that the plan waits for, at most `seconds` ahead.
    pub(crate) fn settle_for(&mut self, seconds: i64) {
        let end = self.now + seconds * SECOND;
        loop {
            self.settle();
            match plan(&self.state, self.now).wake_at {
                Some(at) if at <= end => self.now = self.now.max(at),
                Some(_) | None => break,
            }
        }
        self.now = end;
        self.settle();
    }

    // Agents

    /// Every agent starts and stops what it should and says so; true: something changed.
    pub(crate) fn agents(&mut self) -> bool {
        let hosts: Vec<_> =
            self.state.hosts().filter(|h| h.status() == pb::HostStatus::Connected).cloned().collect();
        let mut changed = false;
        for host in hosts {
            let instances: Vec<_> = self.state.instances_on(HostId(host.id)).cloned().collect();
            let mut report = pb::ReportInstances { host_id: host.id, ..Default::default() };
            for instance in instances {
                match instance.desired() {
                    pb::Desired::Stop => report.gone.push(instance.id),
                    pb::Desired::Run | pb::Desired::Unspecified => {
                        report.instances.extend(self.obey(&instance))
                    }
                }
            }
            let applied = self.apply(self.command(Body::ReportInstances(report)));
            changed |= !applied.changes.is_empty();
        }
        changed
    }

    fn obey(&self, instance: &pb::InstanceRecord) -> Option<pb::InstanceReport> {
        let state = instance.observed.as_ref().and_then(|o| o.state.as_ref());
        let settled = matches!(state, Some(State::Failed(_) | State::Exited(_)));
        let name = || instance.service.clone();
        let ready = !self.sick.contains(&(name(), instance.template_version))
            && !self.unfit.contains(&(name(), instance.version));
        let said = || report(instance, instance.attempt.max(1), running(ready));
        (!settled).then(|| pb::InstanceReport { fetch: self.fetched(instance), ..said() })
    }

    fn fetched(&self, instance: &pb::InstanceRecord) -> Option<pb::FetchState> {
        let asked = instance.fetch.as_ref()?;
        let template_version = asked.template_version;
        let of = |(service, template, _): &&(String, u64, String)| {
            *service == instance.service && *template == template_version
        };
        match self.unfetched.iter().find(of) {
            Some((_, _, problem)) if problem.is_empty() => None,
            Some((_, _, problem)) => {
                Some(pb::FetchState { template_version, done: false, problem: problem.clone() })
            }
            None => Some(pb::FetchState { template_version, done: true, problem: String::new() }),
        }
    }

    /// One instance's agent says something of it.
    pub(crate) fn say(&mut self, id: u64, state: State) {
        let instance = self.state.instance(InstanceId(id)).unwrap().clone();
        let report = report(&instance, instance.attempt.max(1), state);
        self.report(instance.host_id, report);
    }

    pub(crate) fn report(&mut self, host_id: u64, report: pb::InstanceReport) {
        self.accept(Body::ReportInstances(pb::ReportInstances {
            host_id,
            instances: vec![report],
            ..Default::default()
        }));
    }
}

pub(crate) fn apply(manifest: pb::Manifest) -> Body {
    Body::ApplyService(pb::ApplyService { manifest: Some(Box::new(manifest)), expected_version: None })
}

pub(crate) fn scale(name: &str, count: u32) -> Body {
    Body::ScaleService(pb::ScaleService { name: name.into(), count })
}

pub(crate) fn restart(name: &str) -> Body {
    Body::RestartService(pb::RestartService { name: name.into() })
}

pub(crate) fn pause(name: &str, paused: bool) -> Body {
    Body::SetServicePaused(pb::SetServicePaused { name: name.into(), paused })
}

pub(crate) fn promote(name: &str) -> Body {
    Body::PromoteService(pb::PromoteService { name: name.into() })
}

pub(crate) fn rollback(name: &str, to_version: u64) -> Body {
    Body::RollbackService(pb::RollbackService { name: name.into(), to_version })
}

/// A verdict of the leader.
pub(crate) fn status_of(host_id: u64, status: pb::HostStatus, reason: &str) -> Body {
    let reason = reason.to_owned();
    Body::SetHostStatus(pb::SetHostStatus { host_id, status: status.into(), reason, lease_over_ms: 0 })
}

pub(crate) fn forget(host_id: u64) -> Body {
    Body::ForgetHost(pb::ForgetHost { host_id, reason: "the machine burnt".into() })
}

pub(crate) fn delete(name: &str) -> Body {
    Body::DeleteService(pb::DeleteService { name: name.into() })
}

pub(crate) fn facts(name: &str) -> pb::HostFacts {
    pb::HostFacts {
        name: name.into(),
        cpu_millicores: 4000,
        memory_bytes: 4096 * MIB,
        os: "linux".into(),
        arch: "x86_64".into(),
        capabilities: vec![nave_proto::FETCHES_AHEAD.into()],
        ..Default::default()
    }
}

pub(crate) fn manifest(name: &str, count: u32) -> pb::Manifest {
    pb::Manifest {
        name: name.into(),
        command: vec!["serve".into()],
        count,
        health: Some(pb::Health { ready: Some(probe()), ..Default::default() }),
        update: Some(pb::Update { max_parallel: 1, auto_revert: true, ..Default::default() }),
        ..Default::default()
    }
}

/// So that an instance is ready by its agent's word, at once.
pub(crate) fn probe() -> pb::Probe {
    pb::Probe { check: Some(pb::probe::Check::Tcp(true)), ..Default::default() }
}

/// The same service with another command, so that it needs new processes.
pub(crate) fn changed(manifest: &pb::Manifest, command: &str) -> pb::Manifest {
    pb::Manifest { command: vec![command.into()], ..manifest.clone() }
}

pub(crate) fn with_cpu(manifest: pb::Manifest, cpu_millicores: u64) -> pb::Manifest {
    let resources = pb::Resources { cpu_millicores, ..Default::default() };
    pb::Manifest { resources: Some(resources), ..manifest }
}

pub(crate) fn with_port(mut manifest: pb::Manifest, port: u32) -> pb::Manifest {
    let http = pb::Port { protocol: pb::Protocol::Http.into(), service_port: 80, port, calls: None };
    manifest.ports.insert("http".into(), http);
    manifest
}

/// With one artifact, in place of others.
pub(crate) fn with_artifact(manifest: pb::Manifest, sum: &str) -> pb::Manifest {
    let artifact = pb::Artifact { name: "tool".into(), sha256: sum.into(), ..Default::default() };
    pb::Manifest { artifacts: vec![artifact], ..manifest }
}

/// Whether an instance has to stay until its host has what its successor needs: said once more, in other words.
pub(crate) fn stays_to_fetch(
    state: &ClusterState,
    service: &pb::ServiceRecord,
    instance: &pb::InstanceRecord,
) -> bool {
    let manifest = service.manifest.as_ref().unwrap();
    let host = state.host(HostId(instance.host_id)).unwrap();
    let facts = host.facts.as_ref().unwrap();
    let own = state.manifest(&instance.service, instance.version).unwrap();
    let stop_first = manifest.data || manifest.per_host || manifest.ports.values().any(|port| port.port != 0);
    let fetched = instance.fetch.as_ref().is_some_and(|fetch| fetch.done);
    let read = manifest.env_files.len() + manifest.secrets.len();
    let reads = read + manifest.files.iter().filter(|file| !file.source.is_empty()).count() > 0;
    let ended = match instance.observed.as_ref().and_then(|observed| observed.state.as_ref()) {
        Some(State::Failed(_) | State::Exited(_) | State::Lost(_)) => true,
        Some(_) | None => false,
    };
    let leaves = host.draining || host.status() == pb::HostStatus::Lost;
    let alone = state
        .instances_of(&instance.service)
        .filter(|i| i.host_id == instance.host_id && i.desired() == pb::Desired::Run);
    let beside = manifest.per_host && alone.count() > 1;
    let constraints = manifest.placement.as_ref().map_or(&[][..], |placement| &placement.constraints);
    let unmet = constraints
        .iter()
        .any(|text| !text.parse::<nave_proto::constraint::Constraint>().unwrap().holds(facts));
    stop_first
        && manifest.kind() != pb::Kind::Job
        && instance.desired() == pb::Desired::Run
        && instance.template_version != service.template_version
        && facts.capabilities.iter().any(|can| can == "fetch_ahead")
        && (reads || manifest.artifacts.iter().any(|artifact| !own.artifacts.contains(artifact)))
        && !(fetched || ended || leaves || beside || unmet)
}

pub(crate) fn with_constraint(manifest: pb::Manifest, constraint: &str) -> pb::Manifest {
    let placement = pb::Placement { constraints: vec![constraint.into()], ..Default::default() };
    pb::Manifest { placement: Some(placement), ..manifest }
}

pub(crate) fn with_update(mut manifest: pb::Manifest, change: impl FnOnce(&mut pb::Update)) -> pb::Manifest {
    change(manifest.update.get_or_insert_default());
    manifest
}

pub(crate) fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

pub(crate) fn running(ready: bool) -> State {
    let process = pb::ProcessIdentity { pid: 100, ..Default::default() };
    State::Running(observed::Running { process: Some(process), started_unix_ns: 1, ready })
}

pub(crate) fn failed() -> State {
    State::Failed(observed::Failed { last_exit: None })
}

pub(crate) fn exited(code: i32) -> State {
    let exit = pb::ExitRecord { cause: pb::ExitCause::Exit.into(), code, ..Default::default() };
    State::Exited(observed::Exited { exit: Some(exit) })
}

pub(crate) fn report(instance: &pb::InstanceRecord, attempt: u32, state: State) -> pb::InstanceReport {
    let endpoint = match &state {
        State::Running(running) if running.ready => pb::EndpointState::Ready,
        State::Running(_) | State::Starting(_) => pb::EndpointState::Starting,
        State::Pending(_)
        | State::BackingOff(_)
        | State::Stopping(_)
        | State::Exited(_)
        | State::Failed(_)
        | State::Lost(_)
        | State::Unknown(_) => pb::EndpointState::Unspecified,
    };
    pb::InstanceReport {
        instance_id: instance.id,
        epoch: instance.epoch,
        attempt,
        restarts: attempt.saturating_sub(1),
        observed: Some(pb::Observed { state: Some(state) }),
        endpoint: endpoint.into(),
        ..Default::default()
    }
}
