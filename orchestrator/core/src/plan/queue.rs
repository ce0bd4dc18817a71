//! Services that a plan has yet to look at, those of the highest priority first, so that they get what room there is.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::state::Services;
use crate::wants::ManifestExt as _;

/// Each service stands in it once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queue {
    order: BTreeSet<(Reverse<u32>, Arc<str>)>,
    /// Looked up by name only, never gone through in its own order.
    priorities: HashMap<Arc<str>, u32>,
}

impl Queue {
    /// Puts a service in at its present priority, wherever it stood before.
    pub(crate) fn insert(&mut self, services: &Services, name: &Arc<str>) {
        let entry = services.get(name).and_then(|entry| entry.current());
        let priority = entry.map_or(0, |manifest| manifest.priority());
        if let Some(before) = self.priorities.insert(Arc::clone(name), priority) {
            if before == priority {
                return;
            }
            self.order.remove(&(Reverse(before), Arc::clone(name)));
        }
        self.order.insert((Reverse(priority), Arc::clone(name)));
    }

    pub(crate) fn pop_first(&mut self) -> Option<Arc<str>> {
        let (_, name) = self.order.pop_first()?;
        self.priorities.remove(&name);
        Some(name)
    }
}
