//! What a person does to the agent of this host: install it as a unit, replace its program. Neither needs the hub.
//! Running it is in `roles`.

mod install;
mod prove;
mod stage;
mod upgrade;

use crate::args::AgentVerb;
use crate::failure::Failure;

pub(crate) fn run(verb: &AgentVerb) -> Result<(), Failure> {
    match verb {
        AgentVerb::Install(args) => install::run(args),
        AgentVerb::Upgrade(args) => upgrade::run(args),
        AgentVerb::Prove(args) => prove::run(args),
    }
}
