//! Commands at the turns of a process's life (`[hooks]`), each run by the shell as the process itself would be.
//!
//! `pre_start` is part of a start, and its failure a start that failed. `post_start` runs beside the process, `pre_stop`
//! before its stop signal and within its grace. `post_stop` is owed for every attempt that came as far as a hook or a
//! process, and nothing goes on before it has ended. What is open or owed is in the ledger; after a restart of the agent
//! it is run once more, since how far it came is not known, and only after whatever is left of it has been killed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use nave_proto::manifest::same_template;
use nave_proto::pb;
use rand::Rng;

use super::action::{Action, Level};
use super::input::{ProcessKey, SpawnError, SpawnErrorKind};
use super::state::{Starting, State, StopCause, StopStep, Stopping};
use super::stop::human_ms;
use super::{Goal, Supervisor};
use crate::monotonic::Monotonic;

/// Of a manifest whose defaults are not filled in.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Which turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    PreStart,
    PostStart,
    PreStop,
    PostStop,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreStart => "pre_start",
            Self::PostStart => "post_start",
            Self::PreStop => "pre_stop",
            Self::PostStop => "post_stop",
        })
    }
}

/// One command to run.
#[derive(Debug, Clone, PartialEq)]
pub struct HookOrder {
    /// Of the attempt that it belongs to.
    pub key: ProcessKey,
    pub hook: Hook,
    pub command: Vec<String>,
    pub timeout: Duration,
    pub wanted: pb::WantedInstance,
    pub ports: BTreeMap<String, u16>,
    /// The process beside which it runs; none before and after.
    pub beside: Option<pb::ProcessIdentity>,
}

/// How one ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookResult {
    pub took: Duration,
    /// Why it failed, without naming the hook.
    pub outcome: Result<(), String>,
}

/// The hook after the end of the newest process, or attempt at one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum PostStop {
    #[default]
    Nothing,
    Owed,
    Running,
}

impl Supervisor {
    /// What the newest attempt was started as.
    fn of_attempt(&self) -> &pb::WantedInstance {
        self.ran.as_deref().unwrap_or(&self.wanted)
    }

    /// Another template has come in place of `before`. What there is of an attempt keeps its own hooks. A change of
    /// those hooks alone is for the attempt too.
    pub(super) fn keep_hooks(&mut self, before: pb::WantedInstance) {
        let (Some(old), Some(new)) = (&before.manifest, &self.wanted.manifest) else { return };
        let has_hooks = old.hooks.is_some() || new.hooks.is_some();
        if self.ran.is_none() && has_hooks && self.has_attempt() && !same_template(old, new) {
            self.ran = Some(Box::new(before));
        }
    }

    fn has_attempt(&self) -> bool {
        match &self.state {
            State::Pending(_) | State::Running(_) | State::Stopping(_) => true,
            State::Starting(Starting::Preparing { .. } | Starting::PreStart { .. } | Starting::Spawning) => {
                true
            }
            State::Starting(Starting::PickingPorts)
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => self.post_stop != PostStop::Nothing,
        }
    }

    fn hook(&self, hook: Hook) -> Option<&pb::Hook> {
        let hooks = self.of_attempt().manifest.as_ref()?.hooks.as_ref()?;
        match hook {
            Hook::PreStart => hooks.pre_start.as_ref(),
            Hook::PostStart => hooks.post_start.as_ref(),
            Hook::PreStop => hooks.pre_stop.as_ref(),
            Hook::PostStop => hooks.post_stop.as_ref(),
        }
    }

    /// The order to run it, when the manifest has it.
    fn hook_order(&self, hook: Hook) -> Option<Box<HookOrder>> {
        let spec = self.hook(hook)?;
        let beside = match hook {
            Hook::PostStart | Hook::PreStop => self.state.process().cloned(),
            Hook::PreStart | Hook::PostStop => None,
        };
        Some(Box::new(HookOrder {
            key: self.key(),
            hook,
            command: spec.command.clone(),
            timeout: super::duration(spec.timeout.as_ref()).unwrap_or(TIMEOUT),
            wanted: self.of_attempt().clone(),
            ports: self.ports.clone(),
            beside,
        }))
    }

    pub(super) fn has_pre_start(&self) -> bool {
        self.hook(Hook::PreStart).is_some()
    }

    /// What the attempt needs is there.
    pub(super) fn pre_start(&mut self, out: &mut Vec<Action>) {
        let Some(order) = self.hook_order(Hook::PreStart) else { return self.order_process(out) };
        self.state = State::Starting(Starting::PreStart { ending: false });
        self.persist(out);
        out.push(Action::RunHook(order));
    }

    /// The start is not wanted any more; the hook's end decides what comes next.
    pub(super) fn end_pre_start(&mut self, out: &mut Vec<Action>) {
        self.state = State::Starting(Starting::PreStart { ending: true });
        out.push(Action::EndHook { key: self.key(), hook: Hook::PreStart });
    }

    /// The process runs, and this is not known to have been done for it.
    pub(super) fn post_start(&mut self, out: &mut Vec<Action>) {
        let order = self.hook_order(Hook::PostStart);
        self.post_start_open = order.is_some();
        if let Some(order) = order {
            self.persist(out);
            out.push(Action::RunHook(order));
        }
    }

    /// The process ends, so what belongs to its beginning does too.
    pub(super) fn end_post_start(&mut self, out: &mut Vec<Action>) {
        if std::mem::take(&mut self.post_start_open) {
            out.push(Action::EndHook { key: self.key(), hook: Hook::PostStart });
        }
    }

    /// Instead of the stop signal, once drained. False: there is nothing to run first. A process that hangs is not
    /// waited for, and a lease that is over waits for nobody.
    pub(super) fn pre_stop(&mut self, now: Monotonic, out: &mut Vec<Action>) -> bool {
        let Some(mut order) = self.hook_order(Hook::PreStop) else { return false };
        let State::Stopping(stopping) = &mut self.state else { return false };
        let left = stopping.kill_at.since(now);
        match stopping.cause {
            StopCause::Told | StopCause::Probe(_) if left > Duration::ZERO => {}
            StopCause::Told | StopCause::Probe(_) | StopCause::Watchdog(_) | StopCause::Lease => {
                return false;
            }
        }
        order.timeout = order.timeout.min(left);
        stopping.step = StopStep::PreStop { until: now + order.timeout };
        self.persist(out);
        out.push(Action::RunHook(order));
        true
    }

    /// Its time is over; it is killed, and its own word comes too late to be waited for.
    pub(super) fn pre_stop_timed_out(&mut self, had: Duration, out: &mut Vec<Action>) {
        let why = format!("it took longer than {} and was killed", human_ms(had));
        self.note_hook(Hook::PreStop, &HookResult { took: had, outcome: Err(why) }, out);
        out.push(Action::EndHook { key: self.key(), hook: Hook::PreStop });
    }

    /// An attempt has come to its end, after a hook or a process.
    pub(super) fn owe_post_stop(&mut self) {
        if self.hook(Hook::PostStop).is_some() {
            self.post_stop = PostStop::Owed;
        }
    }

    /// Pays what is owed. False: nothing is, and what comes next may come.
    pub(super) fn waits_for_post_stop(&mut self, out: &mut Vec<Action>) -> bool {
        match (self.post_stop, self.hook_order(Hook::PostStop)) {
            (PostStop::Nothing, _) => false,
            (PostStop::Running, _) => true,
            // The manifest has lost it meanwhile.
            (PostStop::Owed, None) => {
                self.post_stop = PostStop::Nothing;
                false
            }
            (PostStop::Owed, Some(order)) => {
                self.post_stop = PostStop::Running;
                self.persist(out);
                out.push(Action::RunHook(order));
                true
            }
        }
    }

    pub(super) fn runs_post_stop(&self) -> bool {
        self.post_stop == PostStop::Running
    }

    /// Whether what is in the cgroup of an ended attempt is a hook that is still to end.
    pub(super) fn runs_hook_alone(&self, epoch: u64) -> bool {
        let starting = matches!(self.state, State::Starting(Starting::PreStart { .. }));
        epoch == self.epoch && (starting || self.post_stop == PostStop::Running)
    }

    pub(super) fn hook_ended<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        key: ProcessKey,
        hook: Hook,
        result: HookResult,
        out: &mut Vec<Action>,
    ) {
        if key != self.key() {
            return;
        }
        match (hook, &mut self.state) {
            (Hook::PreStart, State::Starting(Starting::PreStart { ending })) => {
                let ending = *ending;
                self.pre_start_ended(now, rng, ending, result, out);
            }
            (Hook::PostStart, State::Running(_)) if self.post_start_open => {
                self.post_start_open = false;
                self.note_hook(hook, &result, out);
            }
            (Hook::PreStop, State::Stopping(Stopping { step: StopStep::PreStop { .. }, .. })) => {
                self.note_hook(hook, &result, out);
                self.terminate(out);
            }
            (Hook::PostStop, _) if self.post_stop == PostStop::Running => {
                self.post_stop = PostStop::Nothing;
                self.note_hook(hook, &result, out);
            }
            // It was ended as no longer of use, and what came instead has not waited.
            (Hook::PreStart | Hook::PostStart | Hook::PreStop | Hook::PostStop, _) => {}
        }
    }

    fn pre_start_ended<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        ending: bool,
        result: HookResult,
        out: &mut Vec<Action>,
    ) {
        if !ending {
            self.note_hook(Hook::PreStart, &result, out);
        }
        match result.outcome {
            Err(why) if !ending => {
                let message = format!("pre_start hook failed: {why}");
                let exit = self.exec_error(&SpawnError { kind: SpawnErrorKind::Exec, errno: 0, message });
                self.never_ran(now, rng, exit, false, out);
            }
            Ok(()) if !ending && self.may_start(now) => self.order_process(out),
            Ok(()) | Err(_) => {
                self.owe_post_stop();
                self.state = State::due(now);
            }
        }
    }

    /// What was so when the attempt began may have changed while it was prepared.
    pub(super) fn may_start(&self, now: Monotonic) -> bool {
        self.goal() == Goal::Run && self.keeper_known && !self.lacks_lease(now)
    }

    fn note_hook(&mut self, hook: Hook, result: &HookResult, out: &mut Vec<Action>) {
        let (level, text) = match &result.outcome {
            Ok(()) => {
                (Level::Info, format!("has been through its {hook} hook, in {}", human_ms(result.took)))
            }
            Err(why) => (Level::Warn, format!("had its {hook} hook fail: {why}")),
        };
        out.push(Action::Log { level, message: text.clone() });
        self.note("instance_hook", text);
    }
}
