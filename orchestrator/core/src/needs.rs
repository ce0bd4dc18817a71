//! `needs`: a service is started only once those it names are ready, so the names must not form a cycle. Names of
//! services that do not exist are allowed, since a directory of manifests arrives one by one.

use std::collections::BTreeSet;

use crate::state::ClusterState;

/// The cycle that would close if `name` needed `needs`: the names along it, `name` first and last.
pub(crate) fn cycle(state: &ClusterState, name: &str, needs: &[String]) -> Option<Vec<String>> {
    let mut seen = BTreeSet::new();
    needs.iter().find_map(|needed| {
        let mut path = vec![name.to_owned()];
        leads_to(state, needed, name, &mut path, &mut seen).then_some(path)
    })
}

/// Whether following needs from `from` reaches `target`; `path` then ends with it. An explicit stack, for a chain
/// may be as long as there are services.
fn leads_to<'a>(
    state: &'a ClusterState,
    from: &'a str,
    target: &str,
    path: &mut Vec<String>,
    seen: &mut BTreeSet<String>,
) -> bool {
    let needs_of = |name: &str| -> &'a [String] {
        state.services.get(name).and_then(|entry| entry.current()).map_or(&[], |manifest| &manifest.needs)
    };
    let mut stack = vec![(from, needs_of(from).iter())];
    seen.insert(from.to_owned());
    if from == target {
        path.push(target.to_owned());
        return true;
    }
    while let Some((_, rest)) = stack.last_mut() {
        match rest.next() {
            Some(needed) if needed == target => {
                path.extend(stack.iter().map(|(name, _)| (*name).to_owned()));
                path.push(target.to_owned());
                return true;
            }
            Some(needed) if seen.insert(needed.clone()) => stack.push((needed, needs_of(needed).iter())),
            Some(_) => {}
            None => {
                stack.pop();
            }
        }
    }
    false
}

/// For [`ClusterState::check`].
pub(crate) fn check_acyclic(state: &ClusterState) -> Result<(), String> {
    for entry in state.services.iter() {
        let needs = entry.current().map_or(&[][..], |manifest| &manifest.needs);
        if let Some(path) = cycle(state, &entry.name, needs) {
            return Err(format!("needs form a cycle: {}", path.join(" -> ")));
        }
    }
    Ok(())
}
