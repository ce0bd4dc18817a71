//! A model of the deployment machine: one service on a few hosts, and seeded histories of everything that can happen to
//! its deployments. After each event the promises are checked; a failing seed is printed and replays alone:
//! `NAVE_MODEL_SEED=N cargo test --test decide model`. `NAVE_MODEL_RUNS` says how many histories there are.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_orchestrator_core::{ClusterState, PlanCursor, desired_count, plan, plan_dirty, ready_count};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::{self, State};
use nave_proto::pb::{DeploymentStatus, HostStatus};

use crate::world::{
    SECOND, apply, changed, delete, facts, failed, manifest, pause, probe, promote, report, restart,
    rollback, running, scale, seconds, status_of, stays_to_fetch, with_artifact, with_port, with_update,
};

/// In an ordinary run of the tests; `make model` asks for 100,000.
const RUNS: u64 = 1_500;
const EVENTS: u64 = 48;
/// A check of all indexes costs as much as ten events.
const CHECK_EACH: u64 = 12;
const HOSTS: [&str; 4] = ["alpha", "beta", "gamma", "delta"];
const WEB: &str = "web";

/// The same numbers from the same seed, whatever the build.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn often(&mut self, percent: u64) -> bool {
        self.roll(100) < percent
    }
}

struct Model {
    state: ClusterState,
    cursor: PlanCursor,
    stale: Vec<pb::PlanStep>,
    dice: Dice,
    now: i64,
    index: u64,
    /// Reverts since a person last did anything.
    reverts: u32,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut model = Self {
            state: ClusterState::new(),
            cursor: PlanCursor::default(),
            stale: Vec::new(),
            dice: Dice(seed),
            now: 1_000 * SECOND,
            index: 0,
            reverts: 0,
        };
        let token = pb::TokenRecord {
            id: "t".into(),
            secret_sha256: vec![7; 32],
            expires_unix_ns: i64::MAX,
            uses_left: 1000,
            ..Default::default()
        };
        let cluster_id = "00000000000000aa".into();
        model.send(Body::InitCluster(pb::InitCluster {
            cluster_id,
            incarnation: 1,
            first_token: Some(token),
        }));
        for name in HOSTS {
            let public_key_sha256 = name.bytes().cycle().take(32).collect();
            let facts = Some(facts(name));
            model.send(Body::RegisterHost(pb::RegisterHost {
                token_id: "t".into(),
                public_key_sha256,
                facts,
            }));
        }
        model
    }

    fn send(&mut self, body: Body) -> bool {
        self.index += 1;
        let command = pb::Command {
            time_unix_ns: self.now,
            actor: "model".into(),
            written_by: nave_proto::COMMAND_FORMAT,
            request_id: None,
            body: Some(body),
        };
        let applied = self.state.apply(self.index, command);
        if self.index.is_multiple_of(CHECK_EACH)
            && let Err(wrong) = self.state.check()
        {
            panic!("{wrong}");
        }
        matches!(applied.reply.result, Some(pb::reply::Result::Accepted(_)))
    }

    fn person(&mut self, body: Body) {
        if self.send(body) {
            self.reverts = 0;
        }
    }

    fn event(&mut self) {
        match self.dice.roll(100) {
            0..6 => {
                let manifest = self.manifest();
                self.person(apply(manifest));
            }
            6..9 => self.person(restart(WEB)),
            9..12 => {
                let count = u32::try_from(self.dice.roll(6)).unwrap();
                self.person(scale(WEB, count));
            }
            12..14 => {
                let to = self.dice.roll(4);
                self.person(rollback(WEB, to));
            }
            14..18 => self.person(pause(WEB, true)),
            18..22 => self.person(pause(WEB, false)),
            22..26 => self.person(promote(WEB)),
            26..27 => self.person(delete(WEB)),
            27..31 => {
                let (host_id, draining) = (self.host(), self.dice.often(55));
                self.send(Body::SetHostDraining(pb::SetHostDraining {
                    host_id,
                    draining,
                    reason: String::new(),
                }));
            }
            31..34 => {
                let status = if self.dice.often(40) { HostStatus::Lost } else { HostStatus::Connected };
                let host = self.host();
                self.send(status_of(host, status, ""));
            }
            34..44 => {
                let step = [1, 1, 2, 5, 10, 40, 130][usize::try_from(self.dice.roll(7)).unwrap()];
                self.now += step * SECOND;
            }
            44..66 => self.report(false),
            66..67 => self.other_agent(),
            67..70 => {
                let stale = self.stale.clone();
                self.commit(stale);
            }
            _ => {
                let steps = plan(&self.state, self.now).steps;
                let dirty = plan_dirty(&self.state, &mut self.cursor, self.now, usize::MAX);
                assert_eq!(steps, dirty.steps, "what is dirty is not all there is to do");
                self.stale = steps.clone();
                self.commit(steps);
            }
        }
    }

    /// An agent of another build, which says how far its fetches are, or not.
    fn other_agent(&mut self) {
        let host_id = self.host();
        let mut facts = self.state.host(HostId(host_id)).unwrap().facts.clone().unwrap();
        facts.capabilities = match facts.capabilities.is_empty() {
            true => vec![nave_proto::FETCHES_AHEAD.into()],
            false => Vec::new(),
        };
        self.send(Body::UpdateHost(pb::UpdateHost { host_id, facts: Some(facts), session: 0 }));
    }

    fn host(&mut self) -> u64 {
        self.dice.roll(HOSTS.len() as u64) + 1
    }

    fn manifest(&mut self) -> pb::Manifest {
        let count = u32::try_from(self.dice.roll(5)).unwrap();
        let mut web = changed(
            &manifest(WEB, count),
            ["one", "two", "three"][usize::try_from(self.dice.roll(3)).unwrap()],
        );
        if self.dice.often(15) {
            web = pb::Manifest { count: 0, per_host: true, ..web };
        } else if self.dice.often(25) {
            web.data = true;
        }
        if self.dice.often(25) {
            web = with_port(web, 8080);
        }
        if self.dice.often(50) {
            let sum = ["a", "b"][usize::try_from(self.dice.roll(2)).unwrap()];
            web = with_artifact(web, sum);
        }
        if self.dice.often(20) {
            web.env_files = vec!["/etc/web.env".into()];
        }
        if self.dice.often(40) {
            web.health = None;
        } else if self.dice.often(30) {
            let check = Some(pb::probe::Check::Http("/ready".into()));
            web.health =
                Some(pb::Health { ready: Some(pb::Probe { check, ..probe() }), ..Default::default() });
        }
        let dice = &mut self.dice;
        with_update(web, |update| {
            update.max_parallel = u32::try_from(dice.roll(2)).unwrap() + 1;
            update.canary = if dice.often(40) { u32::try_from(dice.roll(3)).unwrap() } else { 0 };
            update.min_ready = seconds([0, 0, 5][usize::try_from(dice.roll(3)).unwrap()]);
            update.progress_deadline = seconds(60);
            update.auto_revert = dice.often(70);
        })
    }

    /// Agents say what is so; `honest`: all of them, and every process is well.
    fn report(&mut self, honest: bool) {
        let instances: Vec<_> = self.state.instances().cloned().collect();
        for instance in instances {
            let host = self.state.host(HostId(instance.host_id)).map(|host| host.status());
            if host != Some(HostStatus::Connected) || !(honest || self.dice.often(50)) {
                continue;
            }
            let mut say = pb::ReportInstances { host_id: instance.host_id, ..Default::default() };
            if instance.desired() == pb::Desired::Stop {
                say.gone.push(instance.id);
            } else {
                let state = if honest { running(true) } else { self.state_of(&instance) };
                let ends = matches!(state, State::BackingOff(_));
                let said = report(&instance, instance.attempt.max(1) + u32::from(ends), state);
                let fetch = if honest { fetched(&instance) } else { self.fetch_of(&instance) };
                say.instances.push(pb::InstanceReport { fetch, ..said });
            }
            self.send(Body::ReportInstances(say));
        }
    }

    /// Fetched late, or never, or a word about another template.
    fn fetch_of(&mut self, instance: &pb::InstanceRecord) -> Option<pb::FetchState> {
        let mut fetch = fetched(instance)?;
        match self.dice.roll(100) {
            0..40 => return None,
            40..60 => fetch = pb::FetchState { done: false, problem: "not found".into(), ..fetch },
            60..65 => fetch.template_version -= 1,
            _ => {}
        }
        Some(fetch)
    }

    /// What gave up stays so; the rest is well, mostly.
    fn state_of(&mut self, instance: &pb::InstanceRecord) -> State {
        let was = instance.observed.as_ref().and_then(|observed| observed.state.clone());
        match (was, self.dice.roll(100)) {
            (Some(State::Failed(given_up)), _) => State::Failed(given_up),
            (_, 0..10) => running(false),
            (_, 10..14) => State::BackingOff(observed::BackingOff::default()),
            (_, 14..17) => failed(),
            (_, 17..22) => State::Starting(observed::Starting {}),
            (_, _) => running(true),
        }
    }

    fn commit(&mut self, steps: Vec<pb::PlanStep>) {
        let before = self.state.clone();
        self.send(Body::CommitPlan(pb::CommitPlan { steps }));
        self.judge(&before);
    }

    /// What a plan, fresh or old, must never do.
    fn judge(&mut self, before: &ClusterState) {
        let (Some(was), Some(is)) = (before.service(WEB), self.state.service(WEB).cloned()) else { return };
        if was.version != is.version {
            self.may_fail(before, was);
            self.reverted(was, &is);
            return;
        }
        if is.deleting {
            return;
        }
        let (had, has) = (Census::of(before, &is, self.now), Census::of(&self.state, &is, self.now));
        let manifest = is.manifest.as_ref().unwrap();
        let update = manifest.update.unwrap();
        let (parallel, slots) = (update.max_parallel as usize, desired_count(&self.state, WEB));
        let stop_first = manifest.per_host || manifest.data || !manifest.ports.is_empty();
        let floor = if stop_first { slots.saturating_sub(parallel) } else { slots };
        let floor = floor.saturating_sub(stranded(&self.state, &is));
        let emptied = manifest.per_host && self.state.hosts().any(|host| host.draining);
        if !emptied {
            let (was, is) = (ready_count(before, WEB), ready_count(&self.state, WEB));
            assert!(is >= was.min(floor), "{was} were ready, {is} are, {floor} is the least");
        }
        self.judge_fetches(before, &is, &has);
        self.judge_checks(before, &is, parallel);
        let deployment = was.deployment.as_ref().unwrap();
        let status = deployment.status();
        // Once none is left to replace, the rest comes at once.
        let brings = self.state.instances_of(WEB).any(|i| before.instance(InstanceId(i.id)).is_none());
        if had.old > 0 && has.old > 0 && has.current > had.current && brings {
            // What was away with its host comes back to a deployment that has long ended.
            let open = matches!(status, DeploymentStatus::Running | DeploymentStatus::Successful);
            assert!(open || had.old_templates == 0, "{status:?} replaces");
            let most =
                if deployment.canary > 0 { parallel.max(deployment.canary as usize) } else { parallel };
            assert!(stop_first || has.unhealthy <= most, "{} of {most} are not healthy yet", has.unhealthy);
        }
        if status == DeploymentStatus::Paused && had.old_templates > 0 {
            assert!(has.current <= had.current, "paused, and yet it brings new ones");
            assert!(
                has.staying_old + has.spare_old >= had.staying_old + had.spare_old,
                "paused, and yet old ones go"
            );
        }
        // Of `per_host`, one that was beside a better one may take its place; and who leaves a draining host may have
        // the version already, as one of more than are meant to try it (a rollback found them so).
        if deployment.canary > 0 && has.old_templates > 0 && has.current > had.current && !manifest.per_host {
            let more = has.current_templates > had.current_templates;
            assert!(!more || has.current <= deployment.canary as usize, "{} canaries", has.current);
        }
        if deployment.canary > 0 && had.old_templates > 0 && !stop_first && had.old <= slots {
            // One that is not ready may make room.
            let (had, has) = (had.ready_old, has.ready_old);
            assert!(
                has >= had,
                "{had} old ones were ready, {has} do, and nobody has promoted the new version"
            );
        }
        let now = is.deployment.as_ref().unwrap().status();
        if now == DeploymentStatus::Successful && status != now {
            assert_eq!((has.current, has.unhealthy, has.old), (slots, 0, 0), "successful without being so");
            assert_eq!(is.stable_version, is.version);
            let otherwise = self.checked_otherwise(&is);
            assert!(
                otherwise.is_empty(),
                "version {} ({}) is successful, {otherwise:?}",
                is.version,
                is.template_version
            );
        }
        if now == DeploymentStatus::Failed && status != now {
            assert_eq!(status, DeploymentStatus::Running, "only what runs fails");
            self.may_fail(before, was);
        }
    }

    /// Another check may find all of them unready: what is ready goes over to it a few at a time, and never while a person
    /// has it stand still.
    fn judge_checks(&self, before: &ClusterState, service: &pb::ServiceRecord, parallel: usize) {
        let check = |version: u64| self.check_of(version);
        let goes_over = |i: &&Arc<pb::InstanceRecord>| {
            let now = self.state.instance(InstanceId(i.id)).filter(|now| now.epoch == i.epoch);
            i.ready_since_unix_ns != 0
                && now.is_some_and(|now| now.version != i.version && check(now.version).is_some())
                && check(i.version) != check(service.version)
        };
        let over = before.instances_of(WEB).filter(goes_over).count();
        assert!(over <= parallel, "{over} go over to another check at a time, {parallel} is the most");
        let paused = service.deployment.as_ref().unwrap().status() == DeploymentStatus::Paused;
        assert!(!paused || over == 0, "paused, and yet another check comes into force");
    }

    fn check_of(&self, version: u64) -> Option<pb::Probe> {
        let row = self.state.service_version(WEB, version)?;
        row.manifest.as_ref()?.health.as_ref()?.ready.clone()
    }

    /// Instances that another check than the current one calls ready.
    fn checked_otherwise(&self, service: &pb::ServiceRecord) -> Vec<String> {
        let wanted = self.check_of(service.version);
        let other = |i: &&Arc<pb::InstanceRecord>| {
            let wanted_here = i.desired() == pb::Desired::Run && i.ready_since_unix_ns != 0;
            wanted_here && wanted.is_some() && self.check_of(i.version) != wanted
        };
        let says = |i: &Arc<pb::InstanceRecord>| {
            format!("{} of version {} (template {}) on {}", i.id, i.version, i.template_version, i.host_id)
        };
        self.state.instances_of(WEB).filter(other).map(says).collect()
    }

    /// No slot is emptied before its host has what the next one needs, and few fetch at a time.
    fn judge_fetches(&self, before: &ClusterState, service: &pb::ServiceRecord, has: &Census) {
        let drained = |host: u64| before.host(HostId(host)).is_some_and(|host| host.draining);
        let old = |i: &&Arc<pb::InstanceRecord>| {
            let other = i.template_version != service.template_version;
            i.desired() == pb::Desired::Run && (other || drained(i.host_id))
        };
        let stops = |i: &&Arc<pb::InstanceRecord>| {
            let now = self.state.instance(InstanceId(i.id));
            now.is_none_or(|now| now.desired() == pb::Desired::Stop)
        };
        let stopped = before.instances_of(WEB).filter(old).filter(stops);
        let (early, others): (Vec<_>, Vec<_>) = stopped.partition(|i| stays_to_fetch(before, service, i));
        if !early.is_empty() {
            let stand = has.old + has.current - has.unhealthy + others.len();
            let slots = desired_count(&self.state, WEB);
            // Who is one too many leaves no slot: its next one stands already.
            assert!(
                stand >= slots || has.current >= slots,
                "{} is stopped, and its host has not what the next one needs",
                early[0].id
            );
        }
        let asked = |state: &ClusterState| {
            let open = |i: &&Arc<pb::InstanceRecord>| i.fetch.is_some() && stays_to_fetch(state, service, i);
            state.instances_of(WEB).filter(open).count()
        };
        let (had, has) = (asked(before), asked(&self.state));
        let parallel = service.manifest.as_ref().unwrap().update.unwrap().max_parallel as usize;
        assert!(has <= had.max(parallel), "{has} fetch at a time, {parallel} is the most");
    }

    /// A deployment fails by its deadline or by an instance that gave up, and never while it waits for a person.
    fn may_fail(&self, before: &ClusterState, was: &pb::ServiceRecord) {
        let deployment = was.deployment.as_ref().unwrap();
        let gave_up =
            before.instances_of(WEB).any(|i| matches!(state(i), Some(State::Failed(_) | State::Exited(_))));
        let census = Census::of(before, was, self.now);
        let canaries = (deployment.canary as usize).min(desired_count(before, WEB));
        let waits =
            canaries > 0 && census.old_templates > 0 && census.current >= canaries && census.unhealthy == 0;
        assert!(gave_up || !waits, "failed while it waited for a person");
        assert!(gave_up || self.now >= deployment.progress_deadline_unix_ns, "failed before its time");
    }

    /// Only the hub makes versions in a plan, and only to go back to one that was fully ready.
    fn reverted(&mut self, was: &pb::ServiceRecord, is: &pb::ServiceRecord) {
        self.reverts += 1;
        assert!(self.reverts <= 1, "round in circles");
        assert_eq!(is.version, was.version + 1);
        let (deployment, target) = (is.deployment.as_ref().unwrap(), was.stable_version);
        assert_eq!((deployment.from_version, deployment.reverted_to), (was.version, is.version));
        assert!(target != 0 && was.manifest.as_ref().unwrap().update.unwrap().auto_revert);
        assert_eq!((deployment.canary, deployment.status() == DeploymentStatus::Paused), (0, false));
        assert!(deployment.reason.contains(&format!("back to version {target}")), "{}", deployment.reason);
    }

    /// Persons decide, hosts return, processes are well, time passes: then every deployment has ended.
    fn ends(&mut self) {
        for host in 1..=HOSTS.len() as u64 {
            self.send(status_of(host, HostStatus::Connected, ""));
            self.send(Body::SetHostDraining(pb::SetHostDraining {
                host_id: host,
                draining: false,
                reason: String::new(),
            }));
        }
        for decision in [pause(WEB, false), promote(WEB)] {
            self.person(decision);
            let end = self.now + 3 * 3600 * SECOND;
            while self.now < end {
                let planned = plan(&self.state, self.now);
                let (quiet, wake) = (planned.steps.is_empty(), planned.wake_at.unwrap_or(end));
                self.commit(planned.steps);
                let before = self.state.revision();
                self.report_anew();
                if quiet && before == self.state.revision() {
                    self.now = self.now.max(wake).min(end);
                }
            }
        }
        assert_eq!(plan(&self.state, self.now).steps, [], "it is quiet");
        if let Err(wrong) = self.state.check() {
            panic!("{wrong}");
        }
        let Some(service) = self.state.service(WEB) else { return };
        let status = service.deployment.as_ref().unwrap().status();
        assert!(!service.deleting, "still being deleted");
        assert!(
            matches!(status, DeploymentStatus::Successful | DeploymentStatus::Failed),
            "{status:?} for ever"
        );
        if status == DeploymentStatus::Successful {
            let all = self.state.instances_of(WEB).count();
            assert_eq!((ready_count(&self.state, WEB), all), (desired_count(&self.state, WEB), all));
        }
    }

    /// Only what is news, so that quiet can be told.
    fn report_anew(&mut self) {
        let all: Vec<_> = self.state.instances().cloned().collect();
        for instance in all {
            let mut say = pb::ReportInstances { host_id: instance.host_id, ..Default::default() };
            match (instance.desired(), state(&instance)) {
                (pb::Desired::Stop, _) => say.gone.push(instance.id),
                (_, Some(State::Running(running))) if running.ready && !fetches(&instance) => continue,
                (_, Some(State::Failed(_))) => continue,
                (_, _) => say.instances.push(pb::InstanceReport {
                    fetch: fetched(&instance),
                    ..report(&instance, instance.attempt.max(1), running(true))
                }),
            }
            self.send(Body::ReportInstances(say));
        }
    }
}

/// Places that stay empty, since their data is on a host that is being drained.
fn stranded(state: &ClusterState, service: &pb::ServiceRecord) -> usize {
    let manifest = service.manifest.as_ref().unwrap();
    let drained = |host: u64| {
        let host = state.host(HostId(host)).unwrap();
        host.draining && host.status() != HostStatus::Lost
    };
    let empty = |ordinal: u32| {
        let wanted = |i: &Arc<pb::InstanceRecord>| i.desired() == pb::Desired::Run && i.ordinal == ordinal;
        manifest.data && ordinal < manifest.count && !state.instances_of(WEB).any(wanted)
    };
    service.data_hosts.iter().filter(|(ordinal, host)| empty(**ordinal) && drained(**host)).count()
}

fn fetches(instance: &pb::InstanceRecord) -> bool {
    instance.fetch.as_ref().is_some_and(|fetch| !fetch.done)
}

/// What an agent says that has all that it was asked for.
fn fetched(instance: &pb::InstanceRecord) -> Option<pb::FetchState> {
    let template_version = instance.fetch.as_ref()?.template_version;
    Some(pb::FetchState { template_version, done: true, problem: String::new() })
}

fn state(instance: &pb::InstanceRecord) -> Option<&State> {
    instance.observed.as_ref()?.state.as_ref()
}

fn is_ready(instance: &pb::InstanceRecord) -> bool {
    matches!(state(instance), Some(State::Running(running)) if running.ready)
}

/// Wanted instances, as the judge counts them.
#[derive(Debug, Default)]
struct Census {
    current: usize,
    /// Of the wanted version, wherever they are.
    current_templates: usize,
    /// Of those, not yet ready for long enough.
    unhealthy: usize,
    old: usize,
    old_templates: usize,
    staying_old: usize,
    /// Of those, the ready ones.
    ready_old: usize,
    spare_old: usize,
}

impl Census {
    fn of(state: &ClusterState, service: &pb::ServiceRecord, now: i64) -> Self {
        let manifest = service.manifest.as_ref().unwrap();
        let deployment = service.deployment.as_ref().unwrap();
        let mut wait = if manifest.health.is_none() { SECOND } else { 0 };
        if deployment.from_version != 0 {
            wait = wait.max(manifest.update.unwrap().min_ready.map_or(0, |d| d.seconds * SECOND));
        }
        let mut census = Self::default();
        let mut on_host: BTreeMap<u64, usize> = BTreeMap::new();
        for instance in state.instances_of(WEB).filter(|i| i.desired() == pb::Desired::Run) {
            let host = state.host(HostId(instance.host_id)).unwrap();
            let (lost, draining) = (host.status() == HostStatus::Lost, host.draining);
            let second =
                manifest.per_host && std::mem::replace(on_host.entry(instance.host_id).or_default(), 1) > 0;
            census.current_templates += usize::from(instance.template_version == service.template_version);
            if instance.template_version != service.template_version {
                census.old_templates += usize::from(!(manifest.per_host && (lost || draining)));
                census.staying_old += usize::from(!draining && !lost && !second);
                let stays = !draining && !lost && !second;
                census.ready_old += usize::from(stays && is_ready(instance));
                census.spare_old += usize::from(second && !draining && !lost);
            }
            if manifest.per_host && (lost || draining || second) {
                continue;
            }
            if instance.template_version != service.template_version || (draining && !lost) {
                census.old += 1;
                continue;
            }
            census.current += 1;
            census.unhealthy += usize::from(!is_ready(instance) || now < instance.ready_since_unix_ns + wait);
        }
        census
    }
}

fn history(seed: u64) {
    let mut model = Model::new(seed);
    let first = model.manifest();
    model.person(apply(first));
    for _ in 0..EVENTS {
        model.event();
    }
    model.ends();
}

#[test]
fn any_deployment_keeps_to_its_rules_and_ends() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("NAVE_MODEL_SEED") {
        return history(seed);
    }
    let runs = number("NAVE_MODEL_RUNS").unwrap_or(RUNS);
    let mut broken = Vec::new();
    for seed in 1..=runs {
        if let Err(panic) = std::panic::catch_unwind(|| history(seed)) {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            let what = text.lines().next().unwrap_or_default().chars().take(300).collect::<String>();
            broken.push(format!("seed {seed}: {what}"));
        }
        if broken.len() >= 10 {
            break;
        }
    }
    assert!(
        broken.is_empty(),
        "{} of {runs} histories break; the first:\n{}",
        broken.len(),
        broken.join("\n")
    );
}
