//! What a person must see to on this host: said to the hub with the host's facts, which is a command in its log, so an
//! alarm has no numbers in it that change, and is over only when it has been quiet for a while.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_agent_core::Monotonic;
use nave_proto::ids::InstanceId;

/// A disk at the brim takes a line now and refuses the next.
const CALM: Duration = Duration::from_secs(15);

/// The alarms of one host.
#[derive(Debug, Default)]
pub(crate) struct Alarms {
    /// Whose output the disk refuses, and with what words.
    refused: BTreeMap<InstanceId, String>,
    raised: Option<String>,
    /// Since when nothing is refused while the alarm is still on.
    calm_since: Option<Monotonic>,
}

impl Alarms {
    /// The keeper's word on one instance's output; `refused` is empty when the disk takes it.
    pub(crate) fn output(&mut self, instance: InstanceId, refused: &str) {
        match refused {
            "" => drop(self.refused.remove(&instance)),
            why => drop(self.refused.insert(instance, why.to_owned())),
        }
    }

    /// The sentences to say from now on, when they are others than before. `there`: instances of this host.
    pub(crate) fn look(&mut self, now: Monotonic, there: impl Fn(InstanceId) -> bool) -> Option<Vec<String>> {
        self.refused.retain(|instance, _| there(*instance));
        let Some(why) = self.refused.values().next() else {
            self.raised.as_ref()?;
            if now < *self.calm_since.get_or_insert(now) + CALM {
                return None;
            }
            (self.raised, self.calm_since) = (None, None);
            return Some(Vec::new());
        };
        self.calm_since = None;
        if self.raised.is_some() {
            return None;
        }
        let sentence = format!(
            "the disk of the logs takes nothing ({why}): what services print is read, dropped and counted; make room"
        );
        self.raised = Some(sentence.clone());
        Some(vec![sentence])
    }

    /// When [`Alarms::look`] may have news although nothing happens.
    pub(crate) fn next_wake(&self) -> Option<Monotonic> {
        self.calm_since.map(|since| since + CALM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_is_said_once_and_is_over_when_it_has_been_calm() {
        let at = |seconds: i64| Monotonic(seconds * 1_000_000_000);
        let mut alarms = Alarms::default();
        let full = "No space left on device";
        assert_eq!(alarms.look(at(0), |_| true), None);
        alarms.output(InstanceId(1), full);
        alarms.output(InstanceId(2), full);
        let said = alarms.look(at(1), |_| true).unwrap();
        assert!(said.len() == 1 && said[0].contains(full), "{said:?}");
        alarms.output(InstanceId(1), "");
        assert_eq!(alarms.look(at(2), |_| true), None, "the other still cannot write");
        // The other has left the host meanwhile.
        assert_eq!(alarms.look(at(3), |_| false), None);
        alarms.output(InstanceId(1), full);
        assert_eq!(alarms.look(at(10), |_| true), None, "back within the calm: the same alarm");
        alarms.output(InstanceId(1), "");
        assert_eq!(alarms.look(at(20), |_| true), None);
        assert_eq!(alarms.next_wake(), Some(at(20) + CALM));
        assert_eq!(alarms.look(at(20) + CALM, |_| true), Some(vec![]));
        assert_eq!((alarms.look(at(60), |_| true), alarms.next_wake()), (None, None));
    }
}
