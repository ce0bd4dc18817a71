//! How the Raft membership comes to be what the cluster's row says: one step at a time, each looked at afresh, so a
//! leader that dies between two steps leaves nothing that the next one cannot go on from.
//!
//! A member joins as a learner, votes once it has caught up, and then its reservation is settled; one that takes
//! another's place votes and unseats it in one joint change. One that leaves hands over first when it leads. No step
//! is taken that leaves voters of whom no majority answers.

use std::collections::{BTreeMap, BTreeSet};

use nave_proto::ids::MemberId;
use nave_proto::pb;

/// A learner may lack this many entries when it is given a vote: some ten milliseconds of log at full speed.
pub const LAG_MAX: u64 = 1000;

/// A learner or voter as the leader sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Newest log index that it is known to hold.
    pub matched: u64,
    /// It has answered a moment ago; the leader itself always has.
    pub answers: bool,
}

/// The Raft membership on the leader, and how its members fare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    pub own: MemberId,
    /// One set; two while a change is between its two halves.
    pub configs: Vec<BTreeSet<MemberId>>,
    /// Voters and learners.
    pub members: BTreeMap<MemberId, Progress>,
    /// The newest membership entry is committed.
    pub committed: bool,
    pub last_index: u64,
    /// Of those that are joining and not in here yet: whether they can be added, or why not.
    pub probed: BTreeMap<MemberId, Result<(), String>>,
}

/// What the leader should do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write the second half of a joint change.
    Flatten,
    AddLearner(MemberId),
    /// Exactly these vote from now on; whoever voted and is not among them leaves.
    SetVoters(BTreeSet<MemberId>),
    RemoveLearner(MemberId),
    /// To any other voter that stays: this one must not lead when it leaves.
    HandOver {
        leaving: MemberId,
    },
    /// Say in the log that this one has joined.
    Settle(MemberId),
}

/// A step that can be taken, and what the others wait for, by member.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Next {
    pub step: Option<Step>,
    pub waits: BTreeMap<MemberId, String>,
}

/// Decides the next step. With nobody joining or leaving and a plain membership there is none.
pub fn next(cluster: &pb::ClusterRecord, raft: &Membership) -> Next {
    let mut next = Next::default();
    if !raft.committed {
        return next;
    }
    if raft.configs.len() > 1 {
        next.step = Some(Step::Flatten);
        return next;
    }
    for id in cluster.retired_members.iter().map(|id| MemberId(*id)) {
        if raft.members.contains_key(&id) {
            next.take(id, leave(id, raft));
        }
    }
    for reservation in &cluster.joining {
        next.take(MemberId(reservation.id), join(reservation, raft));
    }
    next
}

/// Why a change of members was refused, for the person who asked for it.
pub fn refuse_removal(id: MemberId, raft: &Membership) -> Result<(), String> {
    match leave(id, raft) {
        Ok(_) => Ok(()),
        Err(why) => Err(why),
    }
}

impl Next {
    fn take(&mut self, id: MemberId, step: Result<Step, String>) {
        match step {
            Ok(step) if self.step.is_none() => self.step = Some(step),
            Ok(_) => drop(self.waits.insert(id, "waits for another change of members".to_owned())),
            Err(why) => drop(self.waits.insert(id, why)),
        }
    }
}

fn leave(id: MemberId, raft: &Membership) -> Result<Step, String> {
    let voters = raft.voters();
    if !voters.contains(&id) {
        return Ok(Step::RemoveLearner(id));
    }
    let rest: BTreeSet<MemberId> = voters.into_iter().filter(|voter| *voter != id).collect();
    if rest.is_empty() {
        return Err(format!("{id} is the last member that votes; add another one first"));
    }
    raft.have_majority(&rest).map_err(|silent| {
        format!("without {id} no majority would answer: {silent}; start those or remove them first")
    })?;
    Ok(unseat(id, rest, raft))
}

fn join(reservation: &pb::MemberReservation, raft: &Membership) -> Result<Step, String> {
    let id = MemberId(reservation.id);
    let voters = raft.voters();
    let old = MemberId(reservation.replaces);
    if voters.contains(&id) && !voters.contains(&old) {
        return Ok(Step::Settle(id));
    }
    let Some(progress) = raft.members.get(&id) else {
        return match raft.probed.get(&id) {
            Some(Ok(())) => Ok(Step::AddLearner(id)),
            Some(Err(why)) => Err(why.clone()),
            None => Err(format!("waits until {} answers", reservation.address)),
        };
    };
    let behind = raft.last_index.saturating_sub(progress.matched);
    if !progress.answers {
        return Err(format!("{} does not answer", reservation.address));
    }
    if behind > LAG_MAX {
        return Err(format!("catches up, {behind} entries behind"));
    }
    let wanted: BTreeSet<MemberId> = voters.into_iter().filter(|voter| *voter != old).chain([id]).collect();
    raft.have_majority(&wanted)
        .map_err(|silent| format!("no majority would answer: {silent}; start those or remove them first"))?;
    Ok(unseat(old, wanted, raft))
}

/// A member that leads is not unseated: the next leader does it.
fn unseat(leaving: MemberId, voters: BTreeSet<MemberId>, raft: &Membership) -> Step {
    if leaving == raft.own { Step::HandOver { leaving } } else { Step::SetVoters(voters) }
}

impl Membership {
    fn voters(&self) -> BTreeSet<MemberId> {
        self.configs.iter().flatten().copied().collect()
    }

    /// Whether more than half of these answer; else who does not.
    fn have_majority(&self, voters: &BTreeSet<MemberId>) -> Result<(), String> {
        let answers = |id: &&MemberId| self.members.get(id).is_some_and(|progress| progress.answers);
        if voters.iter().filter(answers).count() > voters.len() / 2 {
            return Ok(());
        }
        let silent: Vec<_> = voters.iter().filter(|id| !answers(id)).map(MemberId::to_string).collect();
        Err(format!("{} of {} do not ({})", silent.len(), voters.len(), silent.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u64]) -> BTreeSet<MemberId> {
        ids.iter().copied().map(MemberId).collect()
    }

    /// Member 1 leads; all hold the whole log and answer.
    fn raft(voters: &[u64], learners: &[u64]) -> Membership {
        let whole = Progress { matched: 5000, answers: true };
        Membership {
            own: MemberId(1),
            configs: vec![ids(voters)],
            members: ids(voters).into_iter().chain(ids(learners)).map(|id| (id, whole)).collect(),
            committed: true,
            last_index: 5000,
            probed: BTreeMap::new(),
        }
    }

    fn joining(id: u64, replaces: u64) -> pb::ClusterRecord {
        let address = "hub-4:7400".to_owned();
        let reservation = pb::MemberReservation { id, replaces, address, ..Default::default() };
        pb::ClusterRecord { joining: vec![reservation], ..Default::default() }
    }

    fn leaving(ids: &[u64]) -> pb::ClusterRecord {
        pb::ClusterRecord { retired_members: ids.to_vec(), ..Default::default() }
    }

    fn step(cluster: &pb::ClusterRecord, raft: &Membership) -> Option<Step> {
        next(cluster, raft).step
    }

    fn wait(cluster: &pb::ClusterRecord, raft: &Membership) -> String {
        let next = next(cluster, raft);
        assert_eq!(next.step, None);
        next.waits.into_values().next().unwrap()
    }

    fn silent(mut raft: Membership, ids: &[u64]) -> Membership {
        for id in ids {
            raft.members.get_mut(&MemberId(*id)).unwrap().answers = false;
        }
        raft
    }

    #[test]
    fn nothing_wanted_means_nothing_done() {
        assert_eq!(next(&pb::ClusterRecord::default(), &raft(&[1, 2, 3], &[])), Next::default());
        assert_eq!(next(&leaving(&[9]), &raft(&[1, 2, 3], &[])), Next::default(), "it has left long ago");
    }

    #[test]
    fn a_member_joins_as_a_learner_then_votes_then_is_settled() {
        let cluster = joining(4, 0);
        let mut now = raft(&[1, 2, 3], &[]);
        assert_eq!(wait(&cluster, &now), "waits until hub-4:7400 answers");
        now.probed.insert(MemberId(4), Err("it has a log of its own".to_owned()));
        assert_eq!(wait(&cluster, &now), "it has a log of its own");
        now.probed.insert(MemberId(4), Ok(()));
        assert_eq!(step(&cluster, &now), Some(Step::AddLearner(MemberId(4))));
        let mut now = raft(&[1, 2, 3], &[4]);
        now.members.insert(MemberId(4), Progress { matched: 0, answers: true });
        assert_eq!(wait(&cluster, &now), "catches up, 5000 entries behind");
        let now = raft(&[1, 2, 3], &[4]);
        assert_eq!(step(&cluster, &now), Some(Step::SetVoters(ids(&[1, 2, 3, 4]))));
        assert_eq!(wait(&cluster, &silent(now, &[4])), "hub-4:7400 does not answer");
        assert_eq!(step(&cluster, &raft(&[1, 2, 3, 4], &[])), Some(Step::Settle(MemberId(4))));
    }

    #[test]
    fn one_that_takes_anothers_place_does_so_in_one_change() {
        let now = raft(&[1, 2, 3], &[4]);
        assert_eq!(step(&joining(4, 3), &now), Some(Step::SetVoters(ids(&[1, 2, 4]))));
        // The old one is dead: that is what replacing is for.
        assert_eq!(step(&joining(4, 3), &silent(now.clone(), &[3])), Some(Step::SetVoters(ids(&[1, 2, 4]))));
        assert_eq!(step(&joining(4, 1), &now), Some(Step::HandOver { leaving: MemberId(1) }));
        assert_eq!(step(&joining(4, 3), &raft(&[1, 2, 4], &[])), Some(Step::Settle(MemberId(4))));
        // Also when it votes beside the old one.
        assert_eq!(step(&joining(4, 3), &raft(&[1, 2, 3, 4], &[])), Some(Step::SetVoters(ids(&[1, 2, 4]))));
    }

    #[test]
    fn a_member_leaves_when_the_rest_can_go_on() {
        let now = raft(&[1, 2, 3], &[4]);
        assert_eq!(step(&leaving(&[3]), &now), Some(Step::SetVoters(ids(&[1, 2]))));
        assert_eq!(step(&leaving(&[4]), &now), Some(Step::RemoveLearner(MemberId(4))));
        assert_eq!(step(&leaving(&[1]), &now), Some(Step::HandOver { leaving: MemberId(1) }));
        let one_away = silent(now, &[3]);
        assert_eq!(step(&leaving(&[3]), &one_away), Some(Step::SetVoters(ids(&[1, 2]))));
        let why = wait(&leaving(&[2]), &one_away);
        assert!(why.contains("1 of 2 do not (m-3)"), "{why}");
        assert!(wait(&leaving(&[1]), &raft(&[1], &[])).contains("last member that votes"));
    }

    #[test]
    fn one_change_at_a_time_and_each_from_a_committed_membership() {
        let mut now = raft(&[1, 2, 3, 4, 5], &[]);
        let both = next(&leaving(&[4, 5]), &now);
        assert_eq!(both.step, Some(Step::SetVoters(ids(&[1, 2, 3, 5]))));
        assert_eq!(both.waits[&MemberId(5)], "waits for another change of members");
        now.committed = false;
        assert_eq!(next(&leaving(&[4, 5]), &now), Next::default());
        now.committed = true;
        now.configs = vec![ids(&[1, 2, 3, 4, 5]), ids(&[1, 2, 3])];
        assert_eq!(step(&leaving(&[4, 5]), &now), Some(Step::Flatten));
    }
}
