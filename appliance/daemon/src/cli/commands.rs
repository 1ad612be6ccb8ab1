//! What each command does.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;

use super::args::{
    Command, DiskCommand, ExportArgs, FailoverCommand, GroupCommand, Keep, LinkPriority,
    MachineArgs, OnFull, OnIsolatedStart, PeerCommand, Settings, Sync, TokenCommand,
};
use super::client::{Client, segment};
use super::{
    copy, integrity, nbd_cert, points, render, resync, retention, reversal, say, say_error,
};
use crate::api::{
    AddDisk, ExportRequest, GroupChange, OpenExport, PairRequest, StopRequest, TokenRequest,
};
use crate::error::{Failure, Result};
use crate::fleet::{EventRecord, FullPolicy, IsolatedStart, PeerRecord, Priority, Synchronous};
use crate::group::GroupStatus;
use crate::node::{GroupRequest, NewToken, NodeStatus, PeerStatus};
use crate::recovery::{Phase, RecoveryRequest, RecoveryStatus, SignRequest};

/// How often something is looked at again.
const EVERY: Duration = Duration::from_secs(1);

pub(super) struct Out {
    pub(super) json: bool,
}

impl Out {
    /// Prints an answer: as JSON, or as `text` makes of it.
    pub(super) fn show<T: Serialize>(&self, answer: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            say(&serde_json::to_string_pretty(answer).unwrap_or_default());
        } else {
            say(&text(answer));
        }
    }
}

pub(super) async fn run(client: Client, json: bool, command: Command) -> Result<()> {
    let out = Out { json };
    match command {
        // Dealt with before a client is made.
        Command::Daemon { .. } | Command::Inspect(_) => Ok(()),
        Command::Status { watch } => status(&client, &out, watch).await,
        Command::Events => {
            let events: Vec<EventRecord> = client.get("/v1/events").await?;
            out.show(&events, |events| render::events(events));
            Ok(())
        }
        Command::Token(TokenCommand::New { ttl }) => {
            let request = TokenRequest { ttl_s: ttl.as_secs() };
            let token: NewToken = client.post("/v1/tokens", &request).await?;
            out.show(&token, |token| {
                format!(
                    "{}\n\nType it at the other node, after: srn pair {}\nIt works once, until {}.",
                    token.token,
                    this_host(&token.link),
                    token.expires_at
                )
            });
            Ok(())
        }
        Command::Pair { host } => pair(&client, &out, host).await,
        Command::Peer(command) => peer(&client, &out, command).await,
        Command::Group(command) => group(&client, &out, command).await,
        Command::Disk(command) => disk(&client, &out, command).await,
        Command::History(args) => points::history(&client, &out, args).await,
        Command::Checkpoint(command) => points::checkpoint(&client, &out, command).await,
        Command::Retention(command) => retention::retention(&client, &out, command).await,
        Command::Failover(command) => failover(&client, &out, command).await,
        Command::NbdCert(command) => nbd_cert::run(&client, &out, command).await,
        Command::Export(args) => export(&client, &out, args).await,
        Command::Scrub { group } => integrity::scrub(&client, &out, group).await,
        Command::Verify { group, disk } => integrity::verify(&client, &out, group, disk).await,
    }
}

/// What to type at the other node: our name if we listen everywhere.
fn this_host(link: &str) -> String {
    let any = link.starts_with("0.0.0.0:") || link.starts_with("[::]:");
    match (any, link.rsplit_once(':')) {
        (true, Some((_, port))) => {
            let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
            if port == crate::config::LINK_PORT.to_string() {
                name
            } else {
                format!("{name}:{port}")
            }
        }
        _ => link.to_owned(),
    }
}

async fn status(client: &Client, out: &Out, watch: bool) -> Result<()> {
    loop {
        let status: NodeStatus = client.get("/v1/status").await?;
        if watch && !out.json && std::io::stdout().is_terminal() {
            // Home, then clear to the end: less flicker than clearing first.
            let _ = write!(std::io::stdout(), "\x1b[H\x1b[J");
        }
        out.show(&status, render::status);
        if !watch {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

async fn pair(client: &Client, out: &Out, host: String) -> Result<()> {
    if std::io::stdin().is_terminal() {
        let _ = write!(std::io::stderr(), "Token of {host}: ");
    }
    let mut token = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut token)
        .map_err(|error| Failure::invalid(format!("reading the token: {error}")))?;
    let token = token.trim().to_owned();
    // A typing error is told here, before anything leaves this process.
    srn_core::token::Token::parse(&token).map_err(|error| Failure::invalid(error.to_string()))?;
    let peer: PeerRecord = client.post("/v1/peers", &PairRequest { address: host, token }).await?;
    out.show(&peer, |peer| format!("paired with {} (key {})", peer.name, peer.id));
    Ok(())
}

async fn peer(client: &Client, out: &Out, command: PeerCommand) -> Result<()> {
    match command {
        PeerCommand::List => {
            let peers: Vec<PeerStatus> = client.get("/v1/peers").await?;
            out.show(&peers, |peers| render::peers(peers));
        }
        PeerCommand::Remove { peer } => {
            let gone: PeerRecord = client.delete(&format!("/v1/peers/{}", segment(&peer)?)).await?;
            out.show(&gone, |gone| format!("peer {} was removed", gone.name));
        }
    }
    Ok(())
}

fn change(settings: &Settings) -> GroupChange {
    GroupChange {
        checkpoint_every_s: settings.checkpoint_every.map(|every| every.as_secs()),
        history_s: settings.history.map(|history| history.as_secs()),
        keep_branches_s: settings.keep_branches.map(|keep| keep.as_secs()),
        full_policy: settings.on_full.map(|policy| match policy {
            OnFull::Track => FullPolicy::Track,
            OnFull::Throttle => FullPolicy::Throttle,
            OnFull::Stop => FullPolicy::Stop,
        }),
        isolated_start: settings.on_isolated_start.map(|policy| match policy {
            OnIsolatedStart::Serve => IsolatedStart::Serve,
            OnIsolatedStart::Wait => IsolatedStart::Wait,
        }),
        synchronous: settings.sync.map(|mode| match mode {
            Sync::Off => Synchronous::Off,
            Sync::Wait => Synchronous::Wait,
            Sync::Degrade => Synchronous::Degrade,
        }),
        log_cap_bytes: settings.log_size,
        priority: settings.priority.map(|priority| match priority {
            LinkPriority::High => Priority::High,
            LinkPriority::Normal => Priority::Normal,
            LinkPriority::Low => Priority::Low,
        }),
        scrub_every_s: settings.scrub_every.map(|every| every.as_secs()),
        ..GroupChange::default()
    }
}

async fn group(client: &Client, out: &Out, command: GroupCommand) -> Result<()> {
    let path = |name: &str| segment(name).map(|name| format!("/v1/groups/{name}"));
    match command {
        GroupCommand::Create { name, peer, keep, settings } => {
            let change = change(&settings);
            let request = GroupRequest {
                name,
                peer,
                keep: match keep {
                    Keep::Cache => "cache".into(),
                    Keep::Replica => "replica".into(),
                },
                log_cap_bytes: change.log_cap_bytes,
                full_policy: change.full_policy,
                checkpoint_every_s: change.checkpoint_every_s,
                history_s: change.history_s,
                isolated_start: change.isolated_start,
                synchronous: change.synchronous,
                priority: change.priority,
                scrub_every_s: change.scrub_every_s,
            };
            let made: GroupStatus = client.post("/v1/groups", &request).await?;
            out.show(&made, |made| {
                format!(
                    "group {0} was made; add a disk with: srn disk add {0} DISK, and --qmp and \
                     --node, or --size, or --copy-from",
                    made.name
                )
            });
        }
        GroupCommand::List => {
            let groups: Vec<GroupStatus> = client.get("/v1/groups").await?;
            out.show(&groups, |groups| render::groups(groups));
        }
        GroupCommand::Show { name } => {
            let group: GroupStatus = client.get(&path(&name)?).await?;
            out.show(&group, render::group);
        }
        GroupCommand::Set { name, settings, peer, fence_hook, quiesce_hook, quiesce_limit } => {
            let ms = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            let change = GroupChange {
                peer,
                fence_hook,
                quiesce_hook,
                quiesce_limit_ms: quiesce_limit.map(ms),
                ..change(&settings)
            };
            let group: GroupStatus = client.patch(&path(&name)?, &change).await?;
            out.show(&group, render::group);
        }
        GroupCommand::Pause { name } => pause(client, out, &path(&name)?, true, false).await?,
        GroupCommand::Resume { name, yes_not_taken_over } => {
            pause(client, out, &path(&name)?, false, yes_not_taken_over).await?;
        }
        GroupCommand::Reverse { name, give_way, yes } => {
            reversal::reverse(client, out, name, give_way, yes).await?;
        }
        GroupCommand::Resync { name, seed_from, cancel } => {
            resync::resync(client, out, &name, &seed_from, cancel).await?;
        }
        GroupCommand::Branches { name } => reversal::branches(client, out, &name).await?,
        GroupCommand::Branch(command) => reversal::branch(client, out, command).await?,
        GroupCommand::Delete { name, yes } => {
            // A group that cannot be opened can still be deleted: only the question needs to know it.
            if !yes {
                let group: GroupStatus = client.get(&path(&name)?).await?;
                let what = if group.role == "secondary" {
                    "This deletes the replica and all its checkpoints on this node."
                } else {
                    "This deletes what this node keeps of the group; the recovery node keeps its."
                };
                confirm(what, &name, "--yes")?;
            }
            client.delete::<()>(&path(&name)?).await?;
            out.show(&name, |name| format!("group {name} was deleted here"));
        }
    }
    Ok(())
}

async fn pause(
    client: &Client,
    out: &Out,
    path: &str,
    paused: bool,
    not_taken_over: bool,
) -> Result<()> {
    let change = GroupChange { paused: Some(paused), not_taken_over, ..GroupChange::default() };
    let group: GroupStatus = client.patch(path, &change).await?;
    out.show(&group, |group| format!("group {} is {}", group.name, group.state));
    Ok(())
}

/// Asks a person to type a word before something that cannot be undone. `option` says yes without
/// being asked.
pub(super) fn confirm(what: &str, word: &str, option: &str) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::refused(format!(
            "{what} There is no terminal to confirm it at; use {option}"
        )));
    }
    let _ = write!(std::io::stderr(), "{what}\nType {word} to go on: ");
    let mut typed = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut typed)
        .map_err(|error| Failure::invalid(format!("reading the confirmation: {error}")))?;
    if typed.trim() == word {
        Ok(())
    } else {
        Err(Failure::refused("not confirmed; nothing was done"))
    }
}

async fn disk(client: &Client, out: &Out, command: DiskCommand) -> Result<()> {
    match command {
        DiskCommand::Add {
            group,
            name,
            size,
            qmp,
            node,
            copy_from,
            pull,
            every,
            scratch,
            wait,
        } => {
            let path = format!("/v1/groups/{}/disks", segment(&group)?);
            // The daemon has another working directory.
            let absolute = |path: Option<std::path::PathBuf>| match path {
                Some(path) => std::path::absolute(&path)
                    .map(Some)
                    .map_err(|error| Failure::invalid(format!("{}: {error}", path.display()))),
                None => Ok(None),
            };
            let (qmp, scratch) = (absolute(qmp)?, absolute(scratch)?);
            let every_s = every.map(|every| every.as_secs());
            let name_of = name.clone();
            let request =
                AddDisk { name: name_of, size, qmp, node, copy_from, pull, every_s, scratch };
            let status: GroupStatus = client.post(&path, &request).await?;
            if wait {
                return wait_for_copy(client, out, &group, &name).await;
            }
            out.show(&status, |status| {
                let disk = status.disks.iter().find(|disk| disk.name == name);
                let export = disk.and_then(|disk| disk.export.clone());
                let export = export.map(|export| format!(", export {export}")).unwrap_or_default();
                format!("disk {name} was added to group {group}{export}")
            });
        }
        DiskCommand::List { group } => {
            let group: GroupStatus =
                client.get(&format!("/v1/groups/{}", segment(&group)?)).await?;
            out.show(&group.disks, |disks| {
                let lines: Vec<String> = disks.iter().map(render::disk_line).collect();
                if lines.is_empty() { "no disks".into() } else { lines.join("\n") }
            });
        }
        DiskCommand::Remove { group, name } => {
            let path = format!("/v1/groups/{}/disks/{}", segment(&group)?, segment(&name)?);
            let status: GroupStatus = client.delete(&path).await?;
            out.show(&status, |_| format!("disk {name} was removed from group {group}"));
        }
    }
    Ok(())
}

/// Shows how far initial replication is, until the disk and its replica are in step.
async fn wait_for_copy(client: &Client, out: &Out, group: &str, disk: &str) -> Result<()> {
    let path = format!("/v1/groups/{}", segment(group)?);
    let terminal = std::io::stderr().is_terminal();
    loop {
        let status: GroupStatus = client.get(&path).await?;
        let found = status
            .disks
            .iter()
            .find(|found| found.name == disk)
            .ok_or_else(|| Failure::not_found(format!("disk {disk} was removed meanwhile")))?;
        // Without a peer there is nothing to wait for but the copy.
        let in_step = match status.peer {
            Some(_) => found.state == "streaming" && status.lag_bytes == Some(0),
            None => found.copy.is_none() && found.state != "seeding",
        };
        if status.paused {
            return Err(Failure::refused(format!(
                "group {group} is paused: srn group resume {group}"
            )));
        }
        let failed = matches!(found.state.as_str(), "failed" | "fenced" | "diverged");
        let line = match &found.copy {
            Some(copy) => format!(
                "{} {}",
                render::bar(copy.done, copy.total, 30),
                render::progress(copy.done, copy.total, copy.rate)
            ),
            None => format!("{}, {}", found.state, render::at_risk(&status)),
        };
        if terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K{line}");
        } else if !out.json {
            say_error(&line);
        }
        if in_step || failed {
            if terminal {
                say_error("");
            }
            if failed {
                let detail = found.detail.clone().unwrap_or_else(|| found.cause.clone());
                return Err(Failure::refused(format!("disk {disk} is {}: {detail}", found.state)));
            }
            out.show(&status, |_| format!("disk {disk} of group {group} is in step"));
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => {
                say_error("\nthe copy goes on; look at it with: srn status");
                return Ok(());
            }
        }
    }
}

fn recovery_request(machine: &MachineArgs, test: bool) -> RecoveryRequest {
    let sign = match (&machine.wait_serial, &machine.wait_tcp) {
        (Some(text), _) => Some(SignRequest::Serial(text.clone())),
        (None, Some(address)) => Some(SignRequest::Tcp(address.clone())),
        (None, None) => None,
    };
    RecoveryRequest {
        test,
        at: machine.at.clone(),
        force: false,
        production_is_off: false,
        no_start: false,
        cpus: machine.cpus,
        memory_bytes: machine.memory,
        firmware: machine.firmware.clone(),
        bus: machine.bus.clone(),
        network: machine.network.clone(),
        smbios_strings: machine.smbios.clone(),
        sign,
        sign_within_s: machine.wait_timeout.as_secs(),
        accept_damage: machine.accept_damage,
    }
}

async fn failover(client: &Client, out: &Out, command: FailoverCommand) -> Result<()> {
    match command {
        FailoverCommand::Run { group, machine, force, yes, yes_production_is_off, no_start } => {
            let mut request = recovery_request(&machine, false);
            request.force = force;
            request.no_start = no_start;
            request.production_is_off = yes_production_is_off;
            let path = format!("/v1/groups/{}", segment(&group)?);
            let status: GroupStatus = client.get(&path).await?;
            if !yes_production_is_off && (force || needs_force(client, &status).await?) {
                confirm(
                    &format!(
                        "The production node of group {group} is not asked. Two running servers \
                         would be the worst of all:\nmake sure that the production server is off."
                    ),
                    &group,
                    "--yes-production-is-off",
                )?;
                request.production_is_off = true;
            } else if status.role == "secondary" && !yes && !yes_production_is_off {
                confirm(
                    &format!(
                        "Production of group {group} will be stopped, and goes on at this node. \
                         (To try it without that: srn failover test {group})"
                    ),
                    &group,
                    "--yes",
                )?;
            }
            start(client, out, &group, request).await
        }
        FailoverCommand::Test { group, machine } => {
            start(client, out, &group, recovery_request(&machine, true)).await
        }
        FailoverCommand::Stop { id, graceful } => {
            let path = format!("/v1/recoveries/{}/stop", segment(&id)?);
            client.post::<()>(&path, &StopRequest { graceful_s: graceful.as_secs() }).await?;
            out.show(&id, |id| format!("{id} was stopped"));
            Ok(())
        }
        FailoverCommand::List => {
            let all: Vec<RecoveryStatus> = client.get("/v1/recoveries").await?;
            out.show(&all, |all| {
                let lines: Vec<String> = all.iter().map(render::recovery).collect();
                if lines.is_empty() { "no recovered servers".into() } else { lines.join("\n") }
            });
            Ok(())
        }
    }
}

/// Whether the production node cannot be asked to stop in good order.
async fn needs_force(client: &Client, group: &GroupStatus) -> Result<bool> {
    if group.role != "secondary" {
        return Ok(false);
    }
    let peers: Vec<PeerStatus> = client.get("/v1/peers").await?;
    let connected = |peer: &PeerStatus| Some(&peer.name) == group.peer.as_ref() && peer.connected;
    Ok(!peers.iter().any(connected))
}

async fn start(client: &Client, out: &Out, group: &str, request: RecoveryRequest) -> Result<()> {
    let path = format!("/v1/groups/{}/recoveries", segment(group)?);
    let waits = request.sign.is_some();
    let mut status: RecoveryStatus = client.post(&path, &request).await?;
    if waits {
        if !out.json {
            say_error(&format!("{}; waiting for its answer", render::recovery_line(&status)));
        }
        let path = format!("/v1/recoveries/{}", segment(&status.id)?);
        while status.phase == Phase::Running && status.problem.is_none() {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
                _ = tokio::signal::ctrl_c() => {
                    say_error("it goes on; look at it with: srn failover list");
                    return Ok(());
                }
            }
            status = client.get(&path).await?;
        }
    }
    let problem = status.problem.clone().filter(|_| waits);
    out.show(&status, render::recovery);
    match problem {
        Some(problem) => Err(Failure::unreachable(format!("{}: {problem}", status.id))),
        None => Ok(()),
    }
}

async fn export(client: &Client, out: &Out, args: ExportArgs) -> Result<()> {
    let request = ExportRequest {
        group: args.group,
        disk: args.disk,
        at: args.at,
        branch: args.branch,
        accept_damage: args.accept_damage,
    };
    if let Some(path) = &args.raw
        && path.exists()
        && !args.force
    {
        return Err(Failure::conflict(format!(
            "{} is there already; choose another file or use --force",
            path.display()
        )));
    }
    let (open, held): (OpenExport, _) = client.hold("/v1/exports", &request).await?;
    match args.raw {
        Some(path) => {
            let done = copy::to_file(&open, &path).await;
            drop(held);
            let bytes = done?;
            out.show(&open, |open| {
                format!(
                    "{} of content from {} was written to {}",
                    crate::config::Size(bytes),
                    open.point,
                    path.display()
                )
            });
        }
        None => {
            out.show(&open, |open| format!("{}\n{}\nserved until Ctrl-C", open.uri, open.point));
            let _ = tokio::signal::ctrl_c().await;
            drop(held);
        }
    }
    Ok(())
}
