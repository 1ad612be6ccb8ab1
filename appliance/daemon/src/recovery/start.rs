//! Starting a recovery: choosing the point, taking over or cloning, running the machine.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use srn_core::ids::EpochId;
use srn_store::manifest::{Keep, Role};
use srn_targets::qemu::host::Host;
use srn_targets::qemu::probe::{self, Sign};
use srn_targets::qemu::run::{Machine, RunError};

use super::machine::Plan;
use super::{Phase, Progress, Recoveries, Recovery, RecoveryStatus, start_clone_engine, watch_end};
use crate::clock;
use crate::error::{Failure, Kind, Result};
use crate::fleet::{Level, RecoveryRecord};
use crate::group::Group;
use crate::node::Node;
use crate::point::{Point, choose};

/// How long a planned failover waits for the production node to drain.
const DRAIN_PATIENCE: Duration = Duration::from_secs(60);

/// How long a fence hook may take.
const HOOK_PATIENCE: Duration = Duration::from_secs(120);

/// What a person asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoveryRequest {
    /// On a clone that is thrown away.
    pub test: bool,
    /// A point as [`crate::point::choose`] takes it.
    pub at: String,
    /// Without the production node's consent.
    pub force: bool,
    /// A person has made sure that the production server does not run any more.
    pub production_is_off: bool,
    /// Do not start a machine, only take over.
    pub no_start: bool,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// `bios` or `uefi`; found out when not given.
    pub firmware: Option<String>,
    /// How the machine sees its disks.
    pub bus: Option<String>,
    /// What the machine is joined to; nothing when not given.
    pub network: Option<String>,
    /// Strings that the guest finds in its SMBIOS tables.
    #[serde(default)]
    pub smbios_strings: Vec<String>,
    /// How to know that it answers.
    pub sign: Option<SignRequest>,
    /// How long to wait for that, in seconds.
    pub sign_within_s: u64,
    /// Although something in the point is known to be damaged.
    #[serde(default)]
    pub accept_damage: bool,
}

/// A sign of life.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignRequest {
    /// This text on the serial console.
    Serial(String),
    /// A TCP connection to `host:port`.
    Tcp(String),
}

impl Recoveries {
    /// Starts a recovery and returns once its machine runs.
    ///
    /// # Errors
    /// Everything that can be in the way, in words, before anything is changed where that can be
    /// known.
    pub async fn start(
        &self,
        node: &Arc<Node>,
        group: &Arc<Group>,
        request: RecoveryRequest,
    ) -> Result<RecoveryStatus> {
        let asked = clock::mono();
        // One at a time, so that a second one sees what the first has done.
        let one_at_a_time = group.recovering.lock().await;
        check_group(group, &request)?;
        let damage = self.damage_in(group, &request).await?;
        let host =
            Host::find().map_err(|missing| Failure::new(Kind::Missing, missing.to_string()))?;
        let folder = self.context.config().run_dir.join("machines");
        std::fs::create_dir_all(&folder)
            .map_err(|error| Failure::internal(format!("making {}: {error}", folder.display())))?;
        let id = self.free_id(group, request.test);
        let plan = if request.no_start {
            None
        } else {
            let view = self.view_of(group, &request)?;
            Some(self.plan(node, group, &id, &request, view, &host).await?)
        };
        let (point, epoch, clone) = if request.test {
            self.clone_point(group, &request).await?
        } else {
            let point = self.take_over(group, &request).await?;
            // A peer that is there hears of it, and can be turned round.
            if let Some(session) = group.peer().and_then(|peer| node.session_with(peer)) {
                group.session_up(&session).await;
            }
            (point, group.store().epochs().current(), None)
        };
        self.record_damage(group, &point, &damage, request.test).await;
        // Another recovery may have begun since, and none can before this one is known.
        let naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let id = self.free_id(group, request.test);
        let record = RecoveryRecord {
            id: id.clone(),
            group: group.id().to_string(),
            test: request.test,
            epoch: epoch.to_string(),
            point: point.words,
            started_at: clock::wall().0,
            folder: folder.join(&id),
            only_disks: request.no_start,
        };
        self.context.fleet().put_recovery(&record)?;
        let exports = self.publish(node, group, &id, clone.as_ref())?;
        let recovery = Arc::new(Recovery {
            record,
            group: group.clone(),
            clone: Mutex::new(clone),
            exports,
            progress: Mutex::new(Progress {
                phase: Phase::Starting,
                asked,
                started_after_us: None,
                answered_after_us: None,
                answer: None,
                problem: None,
                serial_log: None,
                firmware: None,
            }),
            machine: tokio::sync::Mutex::default(),
        });
        self.lock().insert(id, recovery.clone());
        drop(naming);
        drop(one_at_a_time);
        let Some(plan) = plan else {
            recovery.progress().phase = Phase::Served;
            return Ok(recovery.status());
        };
        let started = self.run_machine(node, &recovery, &request, plan, &host).await;
        if let Err(error) = started {
            recovery.failed(&error);
            if request.test {
                // Nothing half-made stays behind.
                let _ = self.stop(node, &recovery.record.id, Duration::ZERO).await;
                return Err(error);
            }
            let text = format!(
                "{error}; group {} has failed over: mend that, then srn failover stop {}, and \
                 srn failover run {0} again",
                group.name(),
                recovery.record.id
            );
            return Err(Failure::new(error.kind, text));
        }
        Ok(recovery.status())
    }

    /// The disks as they will be, as far as that can be known before anything is done.
    pub(super) fn view_of(
        &self,
        group: &Arc<Group>,
        request: &RecoveryRequest,
    ) -> Result<srn_store::group::View> {
        let goes_on = group.role() == Role::Primary && !request.test;
        let view = if goes_on {
            group.store().view_head()
        } else {
            group.store().view_at(choose(group, &request.at)?.seq)
        };
        view.map_err(Failure::from)
    }

    fn free_id(&self, group: &Group, test: bool) -> String {
        let all = self.lock();
        let stem = if test { format!("{}-test", group.name()) } else { group.name() };
        let mut id = stem.clone();
        let mut number = 2;
        while all.contains_key(&id) {
            id = format!("{stem}-{number}");
            number += 1;
        }
        id
    }

    /// Makes a writable clone of the chosen point.
    async fn clone_point(
        &self,
        group: &Arc<Group>,
        request: &RecoveryRequest,
    ) -> Result<(Point, EpochId, Option<Arc<crate::group::engine::Engine>>)> {
        let point = choose(group, &request.at)?;
        // The point may lie in the segment that is being written.
        group.engine().close_segment().await;
        // A clone reigns over nothing.
        let epoch = EpochId::new(0, clock::random());
        let (store, seq) = (group.store().clone(), point.seq);
        let made = tokio::task::spawn_blocking(move || store.clone_at(epoch, seq, clock::now()));
        let appender =
            made.await.map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
        let engine = start_clone_engine(group, appender)?;
        let text = format!("test failover from {}", point.words);
        self.context.event(Level::Info, Some(&group.name()), &text);
        Ok((point, epoch, Some(engine)))
    }

    /// Makes this node the primary from the chosen point on.
    async fn take_over(&self, group: &Arc<Group>, request: &RecoveryRequest) -> Result<Point> {
        let name = group.name();
        if group.role() == Role::Primary {
            // Failed over before: the server is started again from where it stopped.
            let running = self.of_group(group.id());
            if !running.is_empty() {
                return Err(Failure::conflict(format!(
                    "group {name} was failed over and runs as {}; stop that first with \
                     srn failover stop {}",
                    running.join(", "),
                    running.join(" ")
                )));
            }
            if request.at != "latest" {
                return Err(Failure::refused(format!(
                    "group {name} has failed over already and goes on from where it stopped; try \
                     {at} with srn failover test {name} --at {at}, or write its disks to files \
                     with srn export {name} DISK --at {at} --raw FILE",
                    at = request.at
                )));
            }
            let head = group.store().head().seq;
            return Ok(Point { seq: head, words: format!("frame {head}, where it stopped") });
        }
        let session = group.session();
        let planned = session.is_some() && !request.force;
        if !planned && !request.production_is_off {
            let why = if session.is_some() {
                "a forced failover does not ask the production node"
            } else {
                "the production node is not connected, so it cannot be asked to stop"
            };
            return Err(Failure::refused(format!(
                "{why}; two running servers would be the worst of all: make sure that the \
                 production server of group {name} is off, and confirm it with \
                 --yes-production-is-off"
            )));
        }
        // Before anything is changed: is there such a point at all?
        choose(group, &request.at)?;
        let held = group.hold_offers().await;
        let point = if planned {
            let _ = group.drain_primary(&held, DRAIN_PATIENCE).await?;
            // What came in meanwhile counts, and whether a resync was under way at the end.
            match choose(group, &request.at) {
                Ok(point) => point,
                Err(error) => return Err(group.let_primary_go_on(error).await),
            }
        } else {
            run_hook(group).await?;
            // What came in meanwhile counts.
            choose(group, &request.at)?
        };
        match group.take_over(&held, point.seq).await {
            Ok(_) => Ok(point),
            Err(error) if group.role() == Role::Primary => Err(error),
            Err(error) => Err(group.let_primary_go_on(error).await),
        }
    }

    async fn run_machine(
        &self,
        node: &Arc<Node>,
        recovery: &Arc<Recovery>,
        request: &RecoveryRequest,
        plan: Plan,
        host: &Host,
    ) -> Result<()> {
        let spec = plan.with_disks(node, &recovery.group, &recovery.record.id, &recovery.exports);
        recovery.progress().firmware = Some(plan.firmware);
        // What an earlier life of the same name has left.
        let _ = srn_targets::qemu::run::remove(&recovery.record.folder);
        let machine =
            Machine::start(host, &spec, &recovery.record.folder).await.map_err(|error| {
                let kind = match &error {
                    RunError::Missing(_) => Kind::Missing,
                    RunError::Spec(_) => Kind::Invalid,
                    _ => Kind::Internal,
                };
                Failure::new(kind, format!("starting the machine: {error}"))
            })?;
        let machine = Arc::new(machine);
        {
            let mut progress = recovery.progress();
            progress.phase = Phase::Running;
            progress.started_after_us = Some(clock::mono().since(progress.asked));
            progress.serial_log = Some(machine.serial_log());
        }
        *recovery.machine.lock().await = Some(machine.clone());
        tokio::spawn(watch_end(self.context.clone(), recovery.clone(), machine.clone()));
        if let Some(sign) = request.sign.clone() {
            let within = Duration::from_secs(request.sign_within_s);
            tokio::spawn(watch_sign(recovery.clone(), machine, sign, within));
        }
        Ok(())
    }
}

async fn watch_sign(
    recovery: Arc<Recovery>,
    machine: Arc<Machine>,
    sign: SignRequest,
    within: Duration,
) {
    let sign = match sign {
        SignRequest::Serial(text) => Sign::Serial(text),
        SignRequest::Tcp(address) => Sign::Tcp { address, send: None, expect: None },
    };
    let seen = probe::wait(&machine, &[sign], within).await;
    let mut progress = recovery.progress();
    match seen {
        Ok(answer) => {
            progress.phase = Phase::Answered;
            progress.answered_after_us = Some(clock::mono().since(progress.asked));
            progress.answer = Some(answer.matched);
        }
        Err(error) => progress.problem = Some(error.to_string()),
    }
}

fn check_group(group: &Group, request: &RecoveryRequest) -> Result<()> {
    let name = group.name();
    if group.store().keep() == Keep::Cache {
        return Err(Failure::refused(format!(
            "this node keeps only a cache of group {name}; fail over at the recovery node"
        )));
    }
    let failed_over = group.store().epochs().list().len() > 1;
    if group.role() == Role::Primary && !request.test && !failed_over {
        return Err(Failure::refused(format!(
            "this node is the production node of group {name}; fail over at the recovery node, or \
             try a test failover here"
        )));
    }
    Ok(())
}

/// Runs the program that makes sure that production is off.
async fn run_hook(group: &Group) -> Result<()> {
    let Some(hook) = group.settings().fence_hook else { return Ok(()) };
    let name = group.name();
    log::info!("group {name}: running the fence hook {}", hook.display());
    let run = tokio::process::Command::new(&hook)
        .arg(&name)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let failed = |why: String| {
        Failure::refused(format!(
            "the fence hook {} of group {name} {why}; nothing was failed over",
            hook.display()
        ))
    };
    match tokio::time::timeout(HOOK_PATIENCE, run).await {
        Err(_) => Err(failed(format!("took longer than {} s", HOOK_PATIENCE.as_secs()))),
        Ok(Err(error)) => Err(failed(format!("cannot be run: {error}"))),
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let last = words.lines().last().unwrap_or_default().trim().to_owned();
            Err(failed(format!("failed ({}): {last}", output.status)))
        }
    }
}
