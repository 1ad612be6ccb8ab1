//! Commands about what is kept of a group's history.

use super::args::{PolicyArgs, RetentionCommand};
use super::client::{Client, segment};
use super::commands::{Out, confirm};
use super::render::table;
use crate::api::RetentionChange;
use crate::config::Size;
use crate::error::Result;
use crate::group::{PolicyChange, RetentionStatus};

fn change(args: &PolicyArgs) -> PolicyChange {
    PolicyChange {
        window_s: args.window.map(|window| window.as_secs()),
        ten_minutes: args.ten_minutes,
        hours: args.hours,
        days: args.days,
        weeks: args.weeks,
        months: args.months,
        min_points: args.min_points,
        cap_bytes: args.replica_cap,
    }
}

pub(super) async fn retention(client: &Client, out: &Out, command: RetentionCommand) -> Result<()> {
    let path = |group: &str| segment(group).map(|group| format!("/v1/groups/{group}/retention"));
    match command {
        RetentionCommand::Show { group } => {
            let status: RetentionStatus = client.get(&path(&group)?).await?;
            out.show(&status, policy_text);
        }
        RetentionCommand::Preview { group, policy } => {
            let path = format!("{}/preview", path(&group)?);
            let status: RetentionStatus = client.post(&path, &change(&policy)).await?;
            out.show(&status, |status| format!("{}\n\n{}", policy_text(status), fates(status)));
        }
        RetentionCommand::Set { group, policy, yes } => {
            let change = change(&policy);
            let preview = format!("{}/preview", path(&group)?);
            let would: RetentionStatus = client.post(&preview, &change).await?;
            let loses = would.drops > 0 || would.shortens;
            if loses && !yes {
                let shorter =
                    if would.shortens { ", and the full history is shortened" } else { "" };
                let what = format!(
                    "{} checkpoints of group {group} that are kept now are dropped{shorter}. (Look \
                     at it with: srn retention preview {group})",
                    would.drops
                );
                confirm(&what, &group, "--yes")?;
            }
            let request = RetentionChange { change, confirmed: loses };
            let status: RetentionStatus = client.patch(&path(&group)?, &request).await?;
            out.show(&status, policy_text);
        }
        RetentionCommand::Resume { group } => {
            let path = format!("{}/resume", path(&group)?);
            let status: RetentionStatus = client.post(&path, &()).await?;
            out.show(&status, policy_text);
        }
    }
    Ok(())
}

fn policy_text(status: &RetentionStatus) -> String {
    let policy = &status.policy;
    let window = std::time::Duration::from_secs(status.window_s);
    let mut lines = vec![
        format!("group {}", status.group),
        format!("  every write   for {}", humantime::format_duration(window)),
        format!(
            "  checkpoints   the newest of {} x 10 min, {} h, {} d, {} weeks, {} months; {} at \
             least",
            policy.ten_minutes,
            policy.hours,
            policy.days,
            policy.weeks,
            policy.months,
            policy.min_points
        ),
        format!(
            "  space         {} now, {}",
            Size(status.used_bytes),
            policy
                .cap_bytes
                .map_or_else(|| "without a cap".to_owned(), |cap| format!("{} at most", Size(cap)))
        ),
    ];
    if let Some(from) = &status.full_from {
        lines.push(format!("  reaches back  to {} ({})", from.time, from.local));
    }
    if let Some(seconds) = status.squeezed_to_s {
        lines.push(format!("  for want of space the full history is {seconds} s only"));
    }
    if let Some(why) = &status.paused {
        lines.push(format!("  PAUSED        {why}"));
    }
    let kept = status.points.iter().filter(|point| point.keep).count();
    lines.push(format!("  {kept} of {} checkpoints are kept", status.points.len()));
    lines.join("\n")
}

fn fates(status: &RetentionStatus) -> String {
    let rows: Vec<Vec<String>> = status
        .points
        .iter()
        .map(|point| {
            vec![
                point.checkpoint.id.chars().take(8).collect(),
                point.checkpoint.time.clone(),
                if point.keep { "keep" } else { "drop" }.into(),
                point.why.clone(),
                point.checkpoint.label.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(&["ID", "TIME", "", "WHY", "LABEL"], &rows)
}
