//! What this host cannot do at the moment, beside what it never can (`facts`): a sentence for each, for the people who
//! look at `nave hosts`. Whoever notices says so here; the main loop tells the hub when it is others than before. That is
//! a command in the hub's log, so a sentence has nothing in it that changes by itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// More are only counted: a host that runs a thousand services may miss a thousand ports.
const SENTENCES_MAX: usize = 16;

/// Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// By what it is about.
    said: BTreeMap<String, String>,
    is_news: bool,
}

impl Notes {
    /// From now on this is so.
    pub(crate) fn say(&self, about: &str, sentence: String) {
        let mut inner = self.0.lock();
        if inner.said.get(about) != Some(&sentence) {
            inner.said.insert(about.to_owned(), sentence);
            inner.is_news = true;
        }
    }

    /// From now on it is not.
    pub(crate) fn unsay(&self, about: &str) {
        let mut inner = self.0.lock();
        if inner.said.remove(about).is_some() {
            inner.is_news = true;
        }
    }

    /// Somebody new is to be told, who knows nothing of what was said.
    pub(crate) fn repeat(&self) {
        let mut inner = self.0.lock();
        inner.is_news = !inner.said.is_empty();
    }

    /// All sentences, when they have changed since they were last taken.
    pub(crate) fn news(&self) -> Option<Vec<String>> {
        let mut inner = self.0.lock();
        if !std::mem::take(&mut inner.is_news) {
            return None;
        }
        let mut sentences: Vec<String> = inner.said.values().take(SENTENCES_MAX).cloned().collect();
        let more = inner.said.len().saturating_sub(SENTENCES_MAX);
        if more > 0 {
            sentences.push(format!("and {more} more of the kind: the agent's log has them all"));
        }
        Some(sentences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_news_once_and_many_are_counted() {
        let notes = Notes::default();
        assert_eq!(notes.news(), None);
        notes.say("dns", "no names".to_owned());
        notes.say("dns", "no names".to_owned());
        assert_eq!(notes.news(), Some(vec!["no names".to_owned()]));
        assert_eq!(notes.news(), None);
        notes.say("dns", "no names".to_owned());
        assert_eq!(notes.news(), None);
        notes.unsay("dns");
        assert_eq!(notes.news(), Some(Vec::new()));
        (0..100).for_each(|number| notes.say(&format!("port/{number}"), format!("port {number}")));
        let said = notes.news().unwrap();
        assert!(
            said.len() == SENTENCES_MAX + 1 && said[SENTENCES_MAX].starts_with("and 84 more"),
            "{said:?}"
        );
    }
}
