//! Finds the best host for one instance after another of one service, as [`super::score::HostScore`] orders them,
//! without scoring every host. Hosts that have none of the service's instances are read from the state's ranks, best
//! first, and each is judged once: what does not fit now does not fit later in the same plan. Hosts that have some
//! stand in a small order of their own. With a label to spread over there is one of each per value.

use std::collections::btree_set::Iter;
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::ops::Bound;
use std::rc::Rc;

use nave_proto::ids::HostId;
use nave_proto::pb;

use super::lack::{Lack, Refusals};
use super::placement::{Fleet, Request};
use super::score::Census;
use crate::state::{ClassId, ClusterState, Rank, Reservation};

/// Hosts of all classes are read, and those of unwanted ones passed over, when at least one in so many is wanted.
const PASSED_OVER_MAX: usize = 4;

/// Where the instances of one service go. Keeps the search of one request, anew for each other one.
#[derive(Debug)]
pub(crate) struct Placer<'a> {
    census: Census,
    search: Option<(u64, Search<'a>)>,
}

impl<'a> Placer<'a> {
    pub(crate) fn new(census: Census) -> Self {
        Self { census, search: None }
    }

    /// Room was taken elsewhere than through here.
    pub(crate) fn look_again(&mut self) {
        self.search = None;
    }

    /// Takes room on the best host, or says what each lacks. Requests of one version are the same. `gave_up_on`: for
    /// an instance that gave up, where, and what it still holds there.
    pub(crate) fn place(
        &mut self,
        fleet: &mut Fleet<'a>,
        version: u64,
        request: &Request<'_>,
        gave_up_on: Option<(HostId, &Reservation)>,
    ) -> Result<HostId, Rc<Refusals>> {
        if self.search.as_ref().is_none_or(|(of, _)| *of != version) {
            match (fleet.hopeless(request), gave_up_on) {
                (Some(refusals), None) => return Err(refusals),
                (_, _) => self.search = Some((version, Search::new(fleet, request, &self.census))),
            }
        }
        let Some((_, search)) = &mut self.search else { return Err(Rc::default()) };
        let avoid = gave_up_on.map(|(host, _)| host);
        let host = match search.best(fleet, request, &self.census, avoid) {
            Some(host) => host,
            None => search.last_resort(fleet, request, &self.census, gave_up_on)?,
        };
        let before = fleet.room(host).map(|room| room.rank());
        if let (Some(before), Some(after)) = (before, fleet.give(host, request.wanted)) {
            search.moved(&self.census, fleet, before, after);
        }
        self.census.count(host);
        Ok(host)
    }
}

/// The hosts that may take one more instance of one request.
#[derive(Debug)]
struct Search<'a> {
    domains: Vec<Domain<'a>>,
    /// By instances of the service that are in it; all 0 when hosts are what is counted.
    by_count: BTreeSet<(usize, usize)>,
    numbers: BTreeMap<Option<&'a str>, usize>,
    /// What the hosts lack that were judged and passed over.
    refusals: Refusals,
    /// Open hosts that were never read, as their class does not meet the conditions.
    unread: Vec<(Lack, usize)>,
}

/// The hosts of one value of the label that is spread over, or all.
#[derive(Debug, Default)]
struct Domain<'a> {
    count: usize,
    /// Hosts without instances of the service.
    fresh: Vec<Fresh<'a>>,
    /// Hosts to be judged anew each time, by how many instances of the service they have.
    ranked: BTreeSet<(usize, Rank)>,
    /// Those among them that were lost not long ago.
    unsteady: BTreeSet<(usize, Rank)>,
}

/// Hosts being read in the order in which they take instances: those as the state has them, and those that this plan
/// has touched, as it leaves them.
#[derive(Debug)]
struct Fresh<'a> {
    /// None: of all classes.
    class: Option<ClassId>,
    hosts: Peekable<Iter<'a, Rank>>,
    touched_after: Option<Rank>,
    /// The best that is left, once it has been judged.
    head: Option<Rank>,
}

impl<'a> Search<'a> {
    fn new(fleet: &Fleet<'a>, request: &Request<'_>, census: &Census) -> Self {
        let (domains, by_count, numbers, refusals, unread) = Default::default();
        let mut search = Self { domains, by_count, numbers, refusals, unread };
        match request.conditions.only_host() {
            Some((name, lack)) => search.add_only(fleet, name, lack, census),
            None => search.add_classes(fleet, request, census),
        }
        let mut ranked: BTreeMap<usize, Vec<(usize, Rank)>> = BTreeMap::new();
        for (host, count) in &census.on_host {
            let Some(room) = fleet.room(*host) else { continue };
            let number = search.domain(census.domain(room.facts()));
            if census.has_label() {
                search.count(number, *count);
            }
            if !room.is_open() || !search.reads(request, room.facts()) {
                continue;
            }
            match room.is_unsteady(fleet.now) {
                true => search.domains[number].rank(*count, room.rank(), true),
                false => ranked.entry(number).or_default().push((*count, room.rank())),
            }
        }
        for (number, hosts) in ranked {
            let ranked = &mut search.domains[number].ranked;
            ranked.append(&mut BTreeSet::from_iter(hosts));
        }
        search
    }

    /// Whether a host with these facts is judged, not counted among those that are never read.
    fn reads(&self, request: &Request<'_>, facts: &pb::HostFacts) -> bool {
        match request.conditions.only_host() {
            Some((name, _)) => facts.name == name,
            None => self.unread.is_empty() || request.conditions.unmet_by_class(facts).is_none(),
        }
    }

    fn domain(&mut self, value: Option<&'a str>) -> usize {
        let next = self.domains.len();
        let number = *self.numbers.entry(value).or_insert(next);
        if number == next {
            self.domains.push(Domain::default());
            self.by_count.insert((0, number));
        }
        number
    }

    /// So many instances more in a domain.
    fn count(&mut self, number: usize, more: usize) {
        let domain = &mut self.domains[number];
        self.by_count.remove(&(domain.count, number));
        domain.count += more;
        self.by_count.insert((domain.count, number));
    }

    /// One host is named: nothing else is looked at.
    fn add_only(&mut self, fleet: &Fleet<'a>, name: &str, lack: Lack, census: &Census) {
        let hosts = &fleet.state.hosts;
        let is_open = |host: &HostId| hosts.get(*host).is_some_and(|entry| entry.ranked.is_some());
        let host = hosts.by_name(name).filter(is_open);
        if let Some((host, room)) = host.and_then(|host| Some((host, fleet.room(host)?))) {
            let number = self.domain(census.domain(room.facts()));
            if census.on(host) == 0 {
                self.domains[number].rank(0, room.rank(), room.is_unsteady(fleet.now));
            }
        }
        self.unread.push((lack, hosts.ranks.all().len() - usize::from(host.is_some())));
    }

    fn add_classes(&mut self, fleet: &Fleet<'a>, request: &Request<'_>, census: &Census) {
        let ranks = &fleet.state.hosts.ranks;
        if !census.has_label() && request.conditions.are_of_names() {
            return self.add_fresh(None, None, ranks.all());
        }
        let mut meant = Vec::new();
        let mut unread: BTreeMap<Lack, usize> = BTreeMap::new();
        for (id, class) in ranks.classes() {
            match request.conditions.unmet_by_class(&class.facts) {
                None => meant.push((id, class)),
                Some(lack) => *unread.entry(lack).or_default() += class.hosts.len(),
            }
        }
        let hosts: usize = meant.iter().map(|(_, class)| class.hosts.len()).sum();
        if !census.has_label() && hosts.saturating_mul(PASSED_OVER_MAX) >= ranks.all().len() {
            return self.add_fresh(None, None, ranks.all());
        }
        self.unread.extend(unread);
        for (id, class) in meant {
            self.add_fresh(census.domain(&class.facts), Some(id), &class.hosts);
        }
    }

    fn add_fresh(&mut self, value: Option<&'a str>, class: Option<ClassId>, hosts: &'a BTreeSet<Rank>) {
        let number = self.domain(value);
        let hosts = hosts.iter().peekable();
        let fresh = Fresh { class, hosts, touched_after: None, head: None };
        self.domains[number].fresh.push(fresh);
    }

    /// The best host but `avoid`.
    fn best(
        &mut self,
        fleet: &mut Fleet<'a>,
        request: &Request<'_>,
        census: &Census,
        avoid: Option<HostId>,
    ) -> Option<HostId> {
        let mut view = View { fleet, request, census, avoid, refusals: &mut self.refusals };
        for unsteady in [false, true] {
            let mut best: Option<(usize, (usize, Rank))> = None;
            for (count, number) in &self.by_count {
                if best.is_some_and(|(least, _)| *count > least) {
                    break;
                }
                let domain = &mut self.domains[*number];
                let found =
                    if unsteady { domain.best_unsteady(&mut view) } else { domain.best_steady(&mut view) };
                best = best.into_iter().chain(found.map(|found| (*count, found))).min();
            }
            if let Some((_, (_, rank))) = best {
                return Some(rank.host);
            }
        }
        None
    }

    /// Nothing else is left: the host on which the instance gave up, or what every host lacks.
    fn last_resort(
        &mut self,
        fleet: &mut Fleet<'a>,
        request: &Request<'_>,
        census: &Census,
        gave_up_on: Option<(HostId, &Reservation)>,
    ) -> Result<HostId, Rc<Refusals>> {
        let mut refusals = self.refusals.clone();
        for (lack, hosts) in &self.unread {
            refusals.add_hosts(lack.clone(), *hosts);
        }
        count_closed(fleet.state, &mut refusals);
        let Some((host, held)) = gave_up_on else {
            let refusals = Rc::new(refusals);
            fleet.give_up(request, Rc::clone(&refusals));
            return Err(refusals);
        };
        let Some(room) = fleet.room(host) else { return Err(Rc::new(refusals)) };
        match request.verdict_without(&room, held) {
            None => Ok(host),
            Some(shortage) => {
                let aside = (census.on(host), room.rank());
                if self.domains.iter().any(|domain| domain.has_ranked(&aside)) {
                    refusals.add(host, shortage, request.wanted);
                }
                Err(Rc::new(refusals))
            }
        }
    }

    /// A host took an instance: it has one more of the service, and its domain too.
    fn moved(&mut self, census: &Census, fleet: &Fleet<'a>, before: Rank, after: Rank) {
        let Some(room) = fleet.room(after.host) else { return };
        let number = self.domain(census.domain(room.facts()));
        let domain = &mut self.domains[number];
        let had = census.on(after.host);
        let was_fresh = domain.fresh.iter_mut().find(|fresh| fresh.head == Some(before));
        let was_ranked = domain.ranked.remove(&(had, before)) || domain.unsteady.remove(&(had, before));
        // One that had been passed over, and took back what gave up there, stays passed over.
        if was_ranked || was_fresh.is_some() {
            was_fresh.into_iter().for_each(|fresh| fresh.pass(before));
            domain.rank(had + 1, after, room.is_unsteady(fleet.now));
        }
        if census.has_label() {
            self.count(number, 1);
        }
    }
}

/// What judging a host takes.
struct View<'v, 'a, 'r> {
    fleet: &'v mut Fleet<'a>,
    request: &'v Request<'r>,
    census: &'v Census,
    avoid: Option<HostId>,
    refusals: &'v mut Refusals,
}

impl View<'_, '_, '_> {
    /// Whether a host takes the instance; if not it is counted.
    fn takes(&mut self, host: HostId) -> bool {
        self.fleet.looked += 1;
        let Some(room) = self.fleet.room(host) else { return false };
        match self.request.verdict(&room) {
            None => true,
            Some(shortage) => {
                self.refusals.add(host, shortage, self.request.wanted);
                false
            }
        }
    }

    fn is_unsteady(&self, host: HostId) -> bool {
        self.fleet.room(host).is_some_and(|room| room.is_unsteady(self.fleet.now))
    }

    /// The best of hosts that are judged each time; those that do not fit are taken out.
    fn first_fit(&mut self, ranked: &mut BTreeSet<(usize, Rank)>) -> Option<(usize, Rank)> {
        loop {
            let avoid = self.avoid;
            let first = *ranked.iter().find(|(_, rank)| Some(rank.host) != avoid)?;
            if self.takes(first.1.host) {
                return Some(first);
            }
            ranked.remove(&first);
        }
    }
}

impl Domain<'_> {
    fn rank(&mut self, count: usize, rank: Rank, unsteady: bool) {
        if unsteady { &mut self.unsteady } else { &mut self.ranked }.insert((count, rank));
    }

    fn has_ranked(&self, host: &(usize, Rank)) -> bool {
        self.ranked.contains(host) || self.unsteady.contains(host)
    }

    fn best_steady(&mut self, view: &mut View<'_, '_, '_>) -> Option<(usize, Rank)> {
        let (ranked, unsteady) = (&mut self.ranked, &mut self.unsteady);
        let mut best: Option<Rank> = None;
        for fresh in &mut self.fresh {
            best = best.into_iter().chain(fresh.head(view, ranked, unsteady)).min();
        }
        let fresh = best.map(|rank| (0, rank));
        match ranked.first() {
            Some((count, _)) if *count > 0 && fresh.is_some() => fresh,
            Some(_) => fresh.into_iter().chain(view.first_fit(ranked)).min(),
            None => fresh,
        }
    }

    fn best_unsteady(&mut self, view: &mut View<'_, '_, '_>) -> Option<(usize, Rank)> {
        view.first_fit(&mut self.unsteady)
    }
}

impl Fresh<'_> {
    /// The best host that is left and fits; those that are to be judged each time are put aside.
    fn head(
        &mut self,
        view: &mut View<'_, '_, '_>,
        ranked: &mut BTreeSet<(usize, Rank)>,
        unsteady: &mut BTreeSet<(usize, Rank)>,
    ) -> Option<Rank> {
        if let Some(head) = self.head
            && Some(head.host) != view.avoid
        {
            return Some(head);
        }
        self.head = None;
        while let Some(next) = self.peek(view.fleet) {
            let host = next.host;
            if view.census.on(host) > 0 {
                // Ranked already.
            } else if Some(host) == view.avoid {
                if view.is_unsteady(host) { &mut *unsteady } else { &mut *ranked }.insert((0, next));
            } else if view.is_unsteady(host) {
                unsteady.insert((0, next));
            } else if view.takes(host) {
                self.head = Some(next);
                return self.head;
            }
            self.pass(next);
        }
        None
    }

    fn peek(&mut self, fleet: &Fleet<'_>) -> Option<Rank> {
        while self.hosts.next_if(|rank| fleet.is_touched(rank.host)).is_some() {}
        let after = self.touched_after.map_or(Bound::Unbounded, Bound::Excluded);
        let touched =
            fleet.touched(self.class).and_then(|ranks| ranks.range((after, Bound::Unbounded)).next());
        touched.into_iter().chain(self.hosts.peek().copied()).min().copied()
    }

    /// Goes on after the host that is next.
    fn pass(&mut self, next: Rank) {
        self.head = None;
        if self.hosts.next_if_eq(&&next).is_none() {
            self.touched_after = Some(next);
        }
    }
}

fn count_closed(state: &ClusterState, refusals: &mut Refusals) {
    for host in &state.hosts.closed {
        if let Some(lack) = Lack::of_closed_host(state, *host) {
            refusals.add_hosts(lack, 1);
        }
    }
}

impl Lack {
    fn of_closed_host(state: &ClusterState, host: HostId) -> Option<Self> {
        Self::of_closed(&state.hosts.get(host)?.record)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use nave_proto::pb::row::Row;
    use proptest::prelude::*;

    use super::*;
    use crate::plan::conditions::Conditions;
    use crate::plan::score::HostScore;
    use crate::wants::HostExt as _;

    const NOW: i64 = crate::limits::UNSTEADY_NS + 1_000;
    const MIB: u64 = 1 << 20;

    /// Sizes, labels and troubles of one host, and how many instances of each of three other services it has.
    #[derive(Debug, Clone)]
    struct Given {
        cores: u64,
        zone: Option<bool>,
        disk: bool,
        status: pb::HostStatus,
        draining: bool,
        unsteady: bool,
        load: [usize; 3],
        ours: usize,
    }

    fn host() -> impl Strategy<Value = Given> {
        let status = prop_oneof![
            8 => Just(pb::HostStatus::Connected),
            1 => Just(pb::HostStatus::Lost),
            1 => Just(pb::HostStatus::Silent)
        ];
        let load = [0usize..3, 0..3, 0..3];
        let flags = (prop::bool::weighted(0.1), prop::bool::weighted(0.15), any::<bool>());
        (2u64..6, any::<Option<bool>>(), status, flags, load, 0usize..3).prop_map(
            |(cores, zone, status, (draining, unsteady, disk), load, ours)| Given {
                cores,
                zone,
                disk,
                status,
                draining,
                unsteady,
                load,
                ours,
            },
        )
    }

    fn service(name: &str, cpu_millicores: u64, port: u32) -> [pb::Row; 2] {
        let mut manifest = pb::Manifest { name: name.into(), count: 1, ..Default::default() };
        manifest.resources =
            Some(pb::Resources { cpu_millicores, memory_bytes: 16 * MIB, ..Default::default() });
        if port != 0 {
            manifest.ports.insert("a".into(), pb::Port { port, ..Default::default() });
        }
        let record = pb::ServiceRecord {
            name: name.into(),
            version: 1,
            manifest: Some(Box::new(manifest)),
            ..Default::default()
        };
        let version = pb::VersionRecord { service: name.into(), version: 1, ..Default::default() };
        [Row::Service(record), Row::Version(version)].map(|row| pb::Row { row: Some(row) })
    }

    fn state(hosts: &[Given]) -> ClusterState {
        let mut rows = Vec::new();
        for (name, cpu, port) in [("a", 300, 0), ("b", 100, 80), ("c", 0, 0), ("ours", 200, 0)] {
            rows.extend(service(name, cpu, port));
        }
        let mut instance = 0;
        for (given, id) in hosts.iter().zip(1u64..) {
            let mut labels = BTreeMap::new();
            labels.extend(given.zone.map(|zone| ("zone".to_owned(), zone.to_string())));
            labels.extend(given.disk.then(|| ("disk".to_owned(), "ssd".to_owned())));
            let facts = pb::HostFacts {
                name: format!("host-{id}"),
                cpu_millicores: given.cores * 500,
                memory_bytes: 256 * MIB,
                labels,
                ..Default::default()
            };
            let record = pb::HostRecord {
                id,
                facts: Some(facts),
                public_key_sha256: id.to_be_bytes().to_vec(),
                status: given.status.into(),
                draining: given.draining,
                lost_unix_ns: if given.unsteady { NOW - 500 } else { 0 },
                ..Default::default()
            };
            rows.push(pb::Row { row: Some(Row::Host(record)) });
            let [a, b, c] = given.load;
            for (name, count) in [("a", a), ("b", b.min(1)), ("c", c), ("ours", given.ours)] {
                for _ in 0..count {
                    instance += 1;
                    let record = pb::InstanceRecord {
                        id: instance,
                        service: name.into(),
                        version: 1,
                        host_id: id,
                        desired: pb::Desired::Run.into(),
                        ..Default::default()
                    };
                    rows.push(pb::Row { row: Some(Row::Instance(record)) });
                }
            }
        }
        ClusterState::from_rows(rows, 1).unwrap()
    }

    /// Scores every host.
    fn oracle(
        fleet: &Fleet<'_>,
        request: &Request<'_>,
        census: &Census,
        gave_up_on: Option<(HostId, &Reservation)>,
    ) -> Result<HostId, Refusals> {
        let mut in_domain = BTreeMap::new();
        for (host, count) in &census.on_host {
            let value = census.domain(fleet.room(*host).unwrap().facts()).map(str::to_owned);
            *in_domain.entry(value).or_insert(0) += count;
        }
        let mut refusals = Refusals::default();
        let mut scores = Vec::new();
        for (host, entry) in fleet.state.hosts.iter() {
            let room = fleet.room(host).unwrap();
            let held = gave_up_on.filter(|(on, _)| *on == host).map(|(_, held)| held.clone());
            if let Some(shortage) = request.verdict_without(&room, &held.unwrap_or_default()) {
                refusals.add(host, shortage, request.wanted);
                continue;
            }
            let on_host = census.on(host);
            let value = census.domain(room.facts()).map(str::to_owned);
            let in_domain =
                if census.has_label() { in_domain.get(&value).copied().unwrap_or(0) } else { on_host };
            scores.push(HostScore {
                gave_up_here: gave_up_on.is_some_and(|(on, _)| on == host),
                unsteady: entry.record.is_unsteady(fleet.now),
                in_domain,
                on_host,
                rank: room.rank(),
            });
        }
        scores.into_iter().min().map(|score| score.rank.host).ok_or(refusals)
    }

    /// One service's requests: what it wants, where, and which of them come from an instance that gave up.
    #[derive(Debug, Clone)]
    struct Asked {
        cpu: u64,
        port: bool,
        constraints: Vec<String>,
        spread: &'static str,
        gave_up: Vec<Option<u64>>,
    }

    fn asked(hosts: Range<u64>) -> impl Strategy<Value = Asked> {
        let constraint = prop_oneof![
            Just("label.zone = \"true\"".to_owned()),
            Just("label.zone != \"true\"".to_owned()),
            Just("label.disk = \"ssd\"".to_owned()),
            hosts.clone().prop_map(|id| format!("host = \"host-{id}\"")),
            hosts.clone().prop_map(|id| format!("host != \"host-{id}\"")),
        ];
        let spread = prop_oneof![Just("host"), Just("label.zone"), Just("label.disk")];
        let gave_up = prop::collection::vec(prop::option::weighted(0.1, hosts), 1..16);
        (0u64..8, any::<bool>(), prop::collection::vec(constraint, 0..3), spread, gave_up).prop_map(
            |(cpu, port, constraints, spread, gave_up)| Asked {
                cpu: cpu * 100,
                port,
                constraints,
                spread,
                gave_up,
            },
        )
    }

    fn same_as_the_oracle(hosts: &[Given], services: &[Asked]) {
        let state = state(hosts);
        let mut fleet = Fleet::new(&state, NOW);
        for asked in services {
            let placement = pb::Placement { constraints: asked.constraints.clone(), ..Default::default() };
            let manifest = pb::Manifest { placement: Some(placement), ..Default::default() };
            let conditions = Conditions::of(&manifest);
            let fixed_ports = if asked.port { vec![80] } else { Vec::new() };
            let wanted = Reservation { cpu_millicores: asked.cpu, memory_bytes: 20 * MIB, fixed_ports };
            let request = Request { conditions: &conditions, wanted: &wanted };
            let ours = state.instances_of("ours").map(|instance| HostId(instance.host_id));
            let mut census = Census::new(asked.spread, ours.collect());
            let mut placer = Placer::new(census.clone());
            let held = Reservation { cpu_millicores: 200, memory_bytes: 16 * MIB, fixed_ports: vec![80] };
            let alone = services.len() == 1 && asked.gave_up.iter().all(Option::is_none);
            let exact = alone && asked.constraints.len() < 2;
            for gave_up in &asked.gave_up {
                let gave_up_on = gave_up.map(|host| (HostId(host), &held));
                let expected = oracle(&fleet, &request, &census, gave_up_on);
                let found = placer.place(&mut fleet, 1, &request, gave_up_on);
                let found = found.map_err(|refusals| refusals.as_ref().clone());
                match (&found, &expected) {
                    (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{asked:?}"),
                    // Of several unmet constraints, hosts that are not read are counted under the first of a class;
                    // and what a host lacks is told as it was when it was judged first in this plan.
                    (Err(found), Err(expected)) if !exact => {
                        assert_eq!(found.hosts(), expected.hosts(), "{asked:?}");
                    }
                    (Err(found), Err(expected)) => {
                        let told =
                            |refusals: &Refusals| refusals.sentences(&wanted, 99, |host| host.to_string());
                        assert_eq!(told(found), told(expected), "{asked:?}");
                    }
                    (_, _) => panic!("{found:?}, not {expected:?} for {asked:?}"),
                }
                if let Ok(host) = found {
                    census.count(host);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        #[test]
        fn the_search_finds_what_scoring_every_host_finds(
            hosts in prop::collection::vec(host(), 1..12),
            services in prop::collection::vec(asked(1..12), 1..6),
        ) {
            same_as_the_oracle(&hosts, &services);
        }
    }
}
