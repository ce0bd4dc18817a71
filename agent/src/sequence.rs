//! In which order ledger records and effects happen, so that a restart of the agent neither repeats nor forgets one.
//!
//! A record that stands before an effect must be durable before it; one that stands after a spawn or a signal says
//! that the keeper has had it, so it waits for the keeper's answer, and with it all that follows for that instance.
//! Exits are acknowledged when no record waits. Everything else shares one write per round.

use std::collections::{BTreeMap, BTreeSet};

use nave_agent_core::{Action, Order};
use nave_proto::ids::InstanceId;
use nave_proto::pb::ledger_record::Record;

/// What may be done now: first the records, then the effects; then the next round, of what is `later`.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Round {
    pub(crate) records: Vec<Record>,
    pub(crate) effects: Vec<Order>,
    pub(crate) later: Vec<Order>,
}

#[derive(Debug, Default)]
pub(crate) struct Sequencer {
    /// Spawns and signals that the keeper has not answered.
    unanswered: BTreeMap<InstanceId, usize>,
    /// What waits for those answers.
    held: BTreeMap<InstanceId, Vec<Order>>,
    /// Exit records to be acknowledged up to here; 0: none.
    acknowledge: u64,
}

impl Sequencer {
    /// Splits off what may be done now. All of the round's effects count as under way.
    pub(crate) fn round(&mut self, orders: Vec<Order>) -> Round {
        let mut round = Round::default();
        let mut acted = BTreeSet::new();
        let mut waiting = BTreeSet::new();
        for order in orders {
            let instance = order.instance;
            if let Action::AcknowledgeExits { up_to_sequence } = order.action {
                self.acknowledge = self.acknowledge.max(up_to_sequence);
            } else if let Some(held) = self.held.get_mut(&instance) {
                held.push(order);
            } else if waiting.contains(&instance) {
                round.later.push(order);
            } else if is_record(&order.action) && self.unanswered.contains_key(&instance) {
                self.held.insert(instance, vec![order]);
            } else if is_record(&order.action) && acted.contains(&instance) {
                waiting.insert(instance);
                round.later.push(order);
            } else {
                self.put(order, &mut round, &mut acted);
            }
        }
        round
    }

    fn put(
        &mut self,
        Order { instance, action }: Order,
        round: &mut Round,
        acted: &mut BTreeSet<InstanceId>,
    ) {
        if let Action::Persist(record) = action {
            round.records.push(Record::Instance(*record));
            return;
        }
        if let Action::ForgetLedger = action {
            round.records.push(Record::Forgotten(instance.0));
        }
        if let Action::Spawn(_) | Action::Signal { .. } = action {
            *self.unanswered.entry(instance).or_default() += 1;
        }
        acted.insert(instance);
        round.effects.push(Order { instance, action });
    }

    /// The keeper has answered a spawn or a signal, or it will never be asked. Returns what waited for that.
    pub(crate) fn answered(&mut self, instance: InstanceId) -> Vec<Order> {
        if let Some(count) = self.unanswered.get_mut(&instance) {
            *count -= 1;
            if *count > 0 {
                return Vec::new();
            }
            self.unanswered.remove(&instance);
        }
        self.held.remove(&instance).unwrap_or_default()
    }

    /// Whether everything decided is done, as far as records care.
    pub(crate) fn is_settled(&self) -> bool {
        self.unanswered.is_empty() && self.held.is_empty()
    }

    /// At the end of a turn: up to which exit record the keeper may forget.
    pub(crate) fn acknowledge(&mut self) -> Option<u64> {
        match self.held.is_empty() {
            true => Some(std::mem::take(&mut self.acknowledge)).filter(|sequence| *sequence > 0),
            false => None,
        }
    }
}

fn is_record(action: &Action) -> bool {
    matches!(action, Action::Persist(_) | Action::ForgetLedger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_agent_core::ProcessKey;
    use nave_agent_core::supervisor::SignalScope;
    use nave_proto::pb;

    fn persist(instance: u64, attempt: u32) -> Order {
        let record = pb::InstanceLedger { instance_id: instance, attempt, ..Default::default() };
        Order { instance: InstanceId(instance), action: Action::Persist(record.into()) }
    }

    fn signal(instance: u64) -> Order {
        let key = ProcessKey { epoch: 1, attempt: 1 };
        let action = Action::Signal {
            key,
            signal: 15,
            scope: SignalScope::Process,
            cause: pb::ExitCause::Unspecified,
        };
        Order { instance: InstanceId(instance), action }
    }

    fn other(instance: u64, action: Action) -> Order {
        Order { instance: InstanceId(instance), action }
    }

    fn attempts(records: &[Record]) -> Vec<(u64, u32)> {
        let instance = |record: &Record| match record {
            Record::Instance(record) => Some((record.instance_id, record.attempt)),
            _ => None,
        };
        records.iter().filter_map(instance).collect()
    }

    #[test]
    fn a_record_after_a_signal_waits_for_the_keepers_answer_and_nobody_else_does() {
        let mut sequencer = Sequencer::default();
        let orders = vec![persist(1, 1), signal(1), persist(1, 2), persist(2, 1), signal(2)];
        let round = sequencer.round(orders);
        assert_eq!(attempts(&round.records), [(1, 1), (2, 1)]);
        assert_eq!(round.effects, [signal(1), signal(2)]);
        assert_eq!(round.later, []);

        // News of the same instance stays behind what waits.
        let round = sequencer.round(vec![signal(1), persist(3, 1)]);
        assert_eq!((attempts(&round.records), round.effects), (vec![(3, 1)], vec![]));
        assert_eq!(sequencer.answered(InstanceId(1)), [persist(1, 2), signal(1)]);
        assert_eq!(sequencer.answered(InstanceId(2)), []);
    }

    #[test]
    fn a_record_after_another_effect_comes_in_the_next_round() {
        let mut sequencer = Sequencer::default();
        let forget = || other(1, Action::Forget { epoch: 1 });
        let round = sequencer.round(vec![forget(), persist(1, 2), other(1, Action::StopProbes)]);
        assert_eq!((attempts(&round.records), round.effects), (vec![], vec![forget()]));
        let next = sequencer.round(round.later);
        assert_eq!(attempts(&next.records), [(1, 2)]);
        assert_eq!(next.effects, [other(1, Action::StopProbes)]);
    }

    #[test]
    fn exits_are_acknowledged_only_when_every_record_is_written() {
        let mut sequencer = Sequencer::default();
        let acknowledge = other(0, Action::AcknowledgeExits { up_to_sequence: 7 });
        sequencer.round(vec![signal(1), persist(1, 2), acknowledge]);
        assert_eq!(sequencer.acknowledge(), None);
        sequencer.answered(InstanceId(1));
        assert_eq!(sequencer.acknowledge(), Some(7));
        assert_eq!(sequencer.acknowledge(), None);
    }
}
