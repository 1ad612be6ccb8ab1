//! Commands about points in time.

use std::time::{Duration, Instant};

use super::args::{CheckpointCommand, HistoryArgs};
use super::client::{Client, segment};
use super::commands::Out;
use super::render::table;
use super::say_error;
use crate::api::{CheckpointRequest, NewCheckpoint, NoteRequest};
use crate::error::{Failure, Result};
use crate::group::{CheckpointStatus, GroupStatus};
use crate::point::{HistoryStatus, Moment};

/// How often it is looked whether a checkpoint has arrived.
const LOOK: Duration = Duration::from_millis(100);

pub(super) async fn history(client: &Client, out: &Out, args: HistoryArgs) -> Result<()> {
    let mut path = format!("/v1/groups/{}/history", segment(&args.group)?);
    if let Some(at) = &args.at {
        path.push_str(&format!("?at={}", segment(at)?));
    }
    let history: HistoryStatus = client.get(&path).await?;
    out.show(&history, history_text);
    Ok(())
}

fn history_text(history: &HistoryStatus) -> String {
    if let Some(chosen) = &history.chosen {
        return format!("{} means frame {}: {}", chosen.at, chosen.frame, chosen.words);
    }
    let line = |what: &str, moment: &Moment| {
        format!("  {what:<5} {}  {}  frame {}", moment.time, moment.local, moment.frame)
    };
    let mut lines = Vec::new();
    match (&history.from, &history.to) {
        (Some(from), Some(to)) => {
            lines.push(format!(
                "group {}: every write can be recovered (UTC, then {})",
                history.group, history.zone
            ));
            lines.push(line("from", from));
            lines.push(line("to", to));
        }
        _ => lines.push(format!("group {} has no point yet", history.group)),
    }
    if !history.gaps.is_empty() {
        lines.push("but no point within:".into());
    }
    for gap in &history.gaps {
        lines.push(line("from", &gap.from));
        let more = if gap.open { ", which goes on" } else { "" };
        lines.push(format!("{}: {}{more}", line("to", &gap.to), gap.reason));
    }
    lines.push(String::new());
    lines.push(checkpoints(&history.checkpoints));
    for branch in &history.branches {
        lines.push(format!(
            "\nbranch {}: frames {} to {}, left behind {}, kept until {}",
            branch.id,
            branch.fork + 1,
            branch.end,
            branch.since,
            branch.kept_until
        ));
        if !branch.checkpoints.is_empty() {
            lines.push(checkpoints(&branch.checkpoints));
        }
    }
    lines.join("\n")
}

pub(super) fn checkpoints(checkpoints: &[CheckpointStatus]) -> String {
    if checkpoints.is_empty() {
        return "no checkpoints".into();
    }
    let rows: Vec<Vec<String>> = checkpoints
        .iter()
        .map(|checkpoint| {
            let mut state = vec![if checkpoint.clean { "clean" } else { "unclean" }];
            state.extend(checkpoint.proven.then_some("proven"));
            state.extend(checkpoint.damage_accepted.then_some("recovered with damage"));
            state.extend(checkpoint.pinned.then_some("pinned"));
            vec![
                checkpoint.id.chars().take(8).collect(),
                checkpoint.time.clone(),
                checkpoint.local.clone(),
                checkpoint.kind.clone(),
                checkpoint.consistent.clone(),
                state.join(", "),
                checkpoint.frame.to_string(),
                checkpoint.label.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(&["ID", "TIME", "LOCAL TIME", "KIND", "CONSISTENT", "STATE", "FRAME", "LABEL"], &rows)
}

pub(super) async fn checkpoint(
    client: &Client,
    out: &Out,
    command: CheckpointCommand,
) -> Result<()> {
    let all = |group: &str| segment(group).map(|group| format!("/v1/groups/{group}/checkpoints"));
    let one = |group: &str, name: &str| {
        all(group).and_then(|all| Ok(format!("{all}/{}", segment(name)?)))
    };
    match command {
        CheckpointCommand::Create { group, label, app, pin, wait, wait_timeout } => {
            let request = CheckpointRequest { label, pin, application: app };
            let mut made: NewCheckpoint = client.post(&all(&group)?, &request).await?;
            if wait {
                made.frame = Some(arrival(client, &group, &made, wait_timeout).await?);
            }
            out.show(&made, |made| match made.frame {
                Some(frame) => {
                    let quiet = made.consistent == "application";
                    let more = if quiet { ", application-consistent" } else { "" };
                    format!("checkpoint {} at frame {frame}{more}", made.id)
                }
                None => format!("checkpoint {} was asked of the production node", made.id),
            });
            if let Some(why) = made.crash_only {
                let text = format!("checkpoint {} is crash-consistent only: {why}", made.id);
                return Err(Failure::refused(text));
            }
        }
        CheckpointCommand::Schedule(command) => {
            super::schedules::schedule(client, out, command).await?
        }
        CheckpointCommand::List { group } => {
            let listed: Vec<CheckpointStatus> = client.get(&all(&group)?).await?;
            out.show(&listed, |listed| checkpoints(listed));
        }
        CheckpointCommand::Pin { group, checkpoint } => {
            let request = NoteRequest { pin: Some(true), ..NoteRequest::default() };
            note(client, out, &one(&group, &checkpoint)?, &request, "is pinned").await?;
        }
        CheckpointCommand::Unpin { group, checkpoint } => {
            let request = NoteRequest { pin: Some(false), ..NoteRequest::default() };
            note(client, out, &one(&group, &checkpoint)?, &request, "is not pinned").await?;
        }
        CheckpointCommand::Label { group, checkpoint, label } => {
            let request = NoteRequest { label: Some(label), ..NoteRequest::default() };
            note(client, out, &one(&group, &checkpoint)?, &request, "was labelled").await?;
        }
        CheckpointCommand::Delete { group, checkpoint } => {
            let gone: CheckpointStatus = client.delete(&one(&group, &checkpoint)?).await?;
            out.show(&gone, |gone| format!("checkpoint {} was deleted here", gone.id));
        }
    }
    Ok(())
}

async fn note(
    client: &Client,
    out: &Out,
    path: &str,
    request: &NoteRequest,
    done: &str,
) -> Result<()> {
    let changed: CheckpointStatus = client.patch(path, request).await?;
    out.show(&changed, |changed| format!("checkpoint {} {done}", changed.id));
    Ok(())
}

/// Waits until a checkpoint is in the log of the recovery node, and tells its frame.
async fn arrival(
    client: &Client,
    group: &str,
    made: &NewCheckpoint,
    within: Duration,
) -> Result<u64> {
    let path = format!("/v1/groups/{}", segment(group)?);
    let since = Instant::now();
    loop {
        let status: GroupStatus = client.get(&path).await?;
        let listed: Vec<CheckpointStatus> = client.get(&format!("{path}/checkpoints")).await?;
        let here = listed.iter().find(|checkpoint| checkpoint.id == made.id);
        let frame = here.map(|checkpoint| checkpoint.frame).or(made.frame);
        if let Some(frame) = frame
            && status.acknowledged.is_none_or(|acknowledged| acknowledged >= frame)
        {
            return Ok(frame);
        }
        if since.elapsed() > within {
            return Err(Failure::unreachable(format!(
                "checkpoint {} of group {group} has not arrived at the recovery node within {} s; \
                 it is not lost, look at it with: srn checkpoint list {group}",
                made.id,
                within.as_secs()
            )));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = tokio::signal::ctrl_c() => {
                say_error("the checkpoint was made; whether it has arrived was not waited for");
                return Err(Failure::refused("not waited for"));
            }
        }
    }
}
