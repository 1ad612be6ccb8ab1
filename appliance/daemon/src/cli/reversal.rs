//! Commands that turn the direction of a group, and those about branches.

use super::args::BranchCommand;
use super::client::{Client, segment};
use super::commands::{Out, confirm};
use super::render;
use crate::config::Size;
use crate::error::Result;
use crate::group::{BranchStatus, Reversal};
use crate::node::ReversalRequest;

/// Lets this node follow the peer that has taken over.
pub(super) async fn reverse(
    client: &Client,
    out: &Out,
    name: String,
    give_way: bool,
    yes: bool,
) -> Result<()> {
    let path = format!("/v1/groups/{}/reversal", segment(&name)?);
    let look = ReversalRequest { only_look: true, give_way, ..ReversalRequest::default() };
    let found: Reversal = client.post(&path, &look).await?;
    if !yes && (found.changes > 0 || give_way) {
        confirm(&question(&found), &name, "--yes")?;
    }
    let request = ReversalRequest { keep_tail: true, give_way, only_look: false };
    let done: Reversal = client.post(&path, &request).await?;
    out.show(&done, told);
    Ok(())
}

fn question(found: &Reversal) -> String {
    let name = &found.group;
    if found.changes == 0 {
        return format!(
            "This node follows its peer from frame {} on and takes no writes any more.",
            found.fork
        );
    }
    format!(
        "This node follows its peer from frame {} on. What was written here behind that is not at \
         the peer: {} in {} changes, from {} to {}. It is kept as a branch (srn group branches \
         {name}) and can be exported (srn export {name} DISK --branch ID --raw FILE).",
        found.fork,
        Size(found.bytes),
        found.changes,
        found.first.as_deref().unwrap_or("?"),
        found.last.as_deref().unwrap_or("?"),
    )
}

fn told(done: &Reversal) -> String {
    let name = &done.group;
    let mut text = format!(
        "group {name} follows its peer from frame {} on; this node is its recovery node now",
        done.fork
    );
    if let Some(branch) = &done.branch {
        text.push_str(&format!(
            "\n{} frames that were only here are kept as branch {branch}: srn group branches {name}",
            done.frames
        ));
    }
    text
}

/// Lists the branches of a group.
pub(super) async fn branches(client: &Client, out: &Out, name: &str) -> Result<()> {
    let path = format!("/v1/groups/{}/branches", segment(name)?);
    let branches: Vec<BranchStatus> = client.get(&path).await?;
    out.show(&branches, |branches| table(branches));
    Ok(())
}

fn table(branches: &[BranchStatus]) -> String {
    if branches.is_empty() {
        return "no branches".into();
    }
    let rows: Vec<Vec<String>> = branches
        .iter()
        .map(|branch| {
            vec![
                branch.id.clone(),
                branch.fork.to_string(),
                branch.frames.to_string(),
                Size(branch.bytes).to_string(),
                branch.since.clone(),
                branch.kept_until.clone(),
            ]
        })
        .collect();
    render::table(&["ID", "FORK", "FRAMES", "LOG", "LEFT BEHIND", "KEPT UNTIL"], &rows)
}

pub(super) async fn branch(client: &Client, out: &Out, command: BranchCommand) -> Result<()> {
    match command {
        BranchCommand::Delete { group, id, yes } => {
            if !yes {
                let what =
                    format!("This deletes branch {id} of group {group}; no other node has it.");
                confirm(&what, &id, "--yes")?;
            }
            let path = format!("/v1/groups/{}/branches/{}", segment(&group)?, segment(&id)?);
            client.delete::<()>(&path).await?;
            out.show(&id, |id| format!("branch {id} was deleted"));
        }
    }
    Ok(())
}
