//! The daemon's answers as text for people.

use serde::Serialize;

use crate::bandwidth::Rate;
use crate::clock;
use crate::config::Size;
use crate::fleet::{EventRecord, Level, Priority};
use crate::group::{DiskStatus, GroupStatus, PassStatus, PullStatus, QuiesceStatus};
use crate::node::{NodeStatus, PeerStatus};
use crate::recovery::{Phase, RecoveryStatus};

/// Lines of columns, each as wide as its widest cell.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        text.trim_end().to_owned()
    };
    let mut lines = vec![line(head.to_vec())];
    lines.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
    lines.join("\n")
}

pub(super) fn status(status: &NodeStatus) -> String {
    let mut out = Vec::new();
    out.push(verdict(status));
    out.extend(
        status.verdict.reasons.iter().skip(1).map(|reason| format!("         and {reason}")),
    );
    out.push(String::new());
    let node = &status.node;
    let free = node.state_free_bytes.map(|free| format!(", {} free", Size(free)));
    out.push(format!(
        "node {} (srn {}) listens on UDP {}{}",
        node.name,
        node.version,
        node.link,
        free.unwrap_or_default()
    ));
    out.extend(node.bandwidth.as_ref().map(|bandwidth| format!("link {bandwidth}")));
    for peer in &status.peers {
        out.push(format!("peer {}", peer_line(peer)));
    }
    for group in &status.groups {
        out.push(String::new());
        out.push(group_line(group));
        out.extend(group.disks.iter().map(|disk| format!("  {}", disk_line(disk))));
    }
    for (name, why) in &status.broken_groups {
        out.push(String::new());
        out.push(format!("group {name} cannot be opened: {why}"));
    }
    if !status.recoveries.is_empty() {
        out.push(String::new());
        out.extend(status.recoveries.iter().map(recovery_line));
    }
    out.join("\n")
}

fn verdict(status: &NodeStatus) -> String {
    match status.verdict.reasons.first() {
        None => {
            let count = status.groups.len();
            let groups = if count == 1 { "1 group".into() } else { format!("{count} groups") };
            format!("SAFE: {groups} in step")
        }
        Some(reason) => format!("NOT SAFE because {reason}"),
    }
}

fn peer_line(peer: &PeerStatus) -> String {
    let hint = peer.hint.as_ref().map(|hint| format!("\n  {hint}"));
    format!("{} {}{}", peer.name, peer_state(peer), hint.unwrap_or_default())
}

/// How the way to a peer stands.
fn peer_state(peer: &PeerStatus) -> String {
    let Some(remote) = &peer.remote else {
        let trouble = peer.trouble.as_ref().map(|trouble| format!(": {trouble}"));
        return format!("NOT CONNECTED{}", trouble.unwrap_or_default());
    };
    let mut text = format!("connected at {remote}");
    if let Some(rtt) = peer.rtt_ms {
        text.push_str(&format!(", round trip {rtt:.1} ms"));
    }
    if let Some(loss) = peer.loss_percent.filter(|loss| *loss >= 0.05) {
        text.push_str(&format!(", loss {loss:.1} %"));
    }
    if let Some(rate) = peer.rate {
        text.push_str(&format!(", takes {}", Rate(rate)));
    }
    if let Some(bytes) = peer.packet_bytes {
        text.push_str(&format!(", packets of {bytes}"));
    }
    if let Some(limit) = peer.limit {
        text.push_str(&format!(", limited to {}", Rate(limit)));
    }
    text
}

/// What would be lost now, in words.
pub(super) fn at_risk(group: &GroupStatus) -> String {
    match (group.lag_seconds, group.lag_bytes, &group.lag_unknown_since) {
        (Some(seconds), Some(bytes), _) => format!("at risk {seconds:.1} s, {}", Size(bytes)),
        (_, _, Some(since)) => format!("at risk: unknown since {since}"),
        _ => "not replicated".into(),
    }
}

fn group_line(group: &GroupStatus) -> String {
    let mut text = format!("group {}", group.name);
    let peer = group.peer.as_deref().unwrap_or("no peer");
    let arrow = if group.role == "primary" { "to" } else { "from" };
    text.push_str(&format!(" ({} {}, {arrow} {peer}): {}", group.role, group.keep, group.state));
    if !group.cause.is_empty() {
        text.push_str(&format!(", {}", group.cause));
    }
    if let Some(detail) = &group.detail {
        text.push_str(&format!(" ({detail})"));
    }
    if let Some(since) = &group.unsafe_since {
        text.push_str(&format!(" since {since}"));
    }
    if let Some(resync) = &group.resync {
        text.push_str(&format!(
            "\n  resync ({}): {}",
            resync.kind,
            progress(resync.done, resync.total, resync.rate)
        ));
    } else if group.resync_asked {
        text.push_str("\n  resync: asked for, begins when the production node offers the group");
    }
    if let Some(work) = &group.work {
        text.push_str(&format!(
            "\n  {}: {}",
            work.kind,
            progress(work.done, work.total, work.rate)
        ));
    }
    text.push_str(&format!("\n  {}", at_risk(group)));
    let log = match group.log.cap {
        Some(cap) => format!("log {} of {}", Size(group.log.bytes), Size(cap)),
        None => format!("log {}", Size(group.log.bytes)),
    };
    text.push_str(&format!(", {log}, frame {}", group.head));
    if let Some(acknowledged) = group.acknowledged {
        text.push_str(&format!(" ({acknowledged} acknowledged)"));
    }
    if let Some(time) = &group.head_time {
        text.push_str(&format!(" of {time}"));
    }
    text
}

pub(super) fn disk_line(disk: &DiskStatus) -> String {
    let mut text = format!("disk {}: {}, {}", disk.name, Size(disk.size), disk.state);
    if let Some(source) = &disk.source {
        text.push_str(&format!(" ({source})"));
    }
    if let Some(copy) = &disk.copy {
        text.push_str(&format!(", {}", progress(copy.done, copy.total, copy.rate)));
    }
    if let Some(pull) = &disk.pull {
        text.push_str(&passes(pull));
    }
    text
}

/// What is to be said of the passes over a pulled disk.
fn passes(pull: &PullStatus) -> String {
    let every = humantime::format_duration(std::time::Duration::from_secs(pull.every_s));
    let mut text = format!("\n    read every {every} from {}", pull.uri);
    let what = |pass: &PassStatus| match (pass.kind.as_str(), &pass.reason) {
        ("changes", _) => "what changed".to_owned(),
        ("first", _) => "everything, for the first time".to_owned(),
        (_, Some(reason)) => format!("everything, as {reason}"),
        (_, None) => "everything".to_owned(),
    };
    match (&pull.newest, &pull.last) {
        (Some(newest), Some(last)) => text.push_str(&format!(
            "; newest point of {newest}: {}, {} read, {} new",
            what(last),
            Size(last.read),
            Size(last.new)
        )),
        (Some(newest), None) => text.push_str(&format!("; newest point of {newest}")),
        (None, _) => text.push_str("; no point yet"),
    }
    match (&pull.pass, &pull.next) {
        (Some(pass), _) => {
            text.push_str(&format!("\n    reads {} now, of {}", what(pass), pass.time));
        }
        (None, Some(next)) => text.push_str(&format!("\n    next pass at {next}")),
        (None, None) => {}
    }
    if let Some(waits) = &pull.waits {
        text.push_str(&format!("; waits for {waits}"));
    }
    if let Some(failed) = &pull.failed {
        text.push_str(&format!("; the last one failed: {failed}"));
    }
    text
}

/// How far, how fast, how long still.
pub(super) fn progress(done: u64, total: u64, rate: u64) -> String {
    let percent = if total == 0 { 0.0 } else { done as f64 * 100.0 / total as f64 };
    let left = match total.saturating_sub(done).checked_div(rate) {
        Some(seconds) => {
            let left = std::time::Duration::from_secs(seconds);
            format!(", {} left", humantime::format_duration(left))
        }
        None => String::new(),
    };
    format!("{percent:.0} % of {}, {}/s{left}", Size(total), Size(rate))
}

/// A bar of `width` characters.
pub(super) fn bar(done: u64, total: u64, width: usize) -> String {
    let share = if total == 0 { 0.0 } else { (done as f64 / total as f64).clamp(0.0, 1.0) };
    let full = (share * width as f64) as usize;
    format!("[{}{}]", "#".repeat(full), ".".repeat(width.saturating_sub(full)))
}

pub(super) fn recovery_line(recovery: &RecoveryStatus) -> String {
    let kind = if recovery.test { "test failover" } else { "recovered server" };
    let phase = match recovery.phase {
        Phase::Served => "has its disks served",
        Phase::Starting => "starts",
        Phase::Running => "runs",
        Phase::Answered => "has answered",
        Phase::Ended => "has ended",
        Phase::Failed => "could not be started",
    };
    let mut text = format!("{kind} {} of group {} {phase}", recovery.id, recovery.group);
    text.push_str(&format!(", from {}", recovery.point));
    if let Some(problem) = &recovery.problem {
        text.push_str(&format!("; {problem}"));
    }
    text
}

pub(super) fn peers(peers: &[PeerStatus]) -> String {
    if peers.is_empty() {
        return "no peers; pair one with: srn pair HOST".into();
    }
    let rows: Vec<Vec<String>> = peers
        .iter()
        .map(|peer| {
            vec![
                peer.name.clone(),
                peer.id.chars().take(16).collect(),
                peer.address.clone().unwrap_or_else(|| "(dials us)".into()),
                peer_state(peer),
            ]
        })
        .collect();
    let mut text = table(&["NAME", "KEY", "ADDRESS", "STATE"], &rows);
    for peer in peers {
        if let Some(hint) = &peer.hint {
            text.push_str(&format!("\n{}: {hint}", peer.name));
        }
    }
    text
}

pub(super) fn groups(groups: &[GroupStatus]) -> String {
    if groups.is_empty() {
        return "no groups; make one with: srn group create".into();
    }
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|group| {
            vec![
                group.name.clone(),
                group.role.clone(),
                group.keep.clone(),
                group.peer.clone().unwrap_or_else(|| "-".into()),
                group.state.clone(),
                at_risk(group),
                group.disks.len().to_string(),
            ]
        })
        .collect();
    table(&["NAME", "ROLE", "KEEPS", "PEER", "STATE", "RISK", "DISKS"], &rows)
}

/// A policy as it is typed.
fn word<T: Serialize>(policy: &T) -> String {
    let value = serde_json::to_value(policy).ok();
    value.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

pub(super) fn group(group: &GroupStatus) -> String {
    let mut out = vec![group_line(group)];
    out.extend(group.disks.iter().map(|disk| {
        let export = disk.export.as_ref().map(|export| format!(", export {export}"));
        format!("  {}{}", disk_line(disk), export.unwrap_or_default())
    }));
    let duration = |seconds: u64| {
        humantime::format_duration(std::time::Duration::from_secs(seconds)).to_string()
    };
    out.extend(
        group
            .damaged
            .iter()
            .map(|damage| format!("  DAMAGED since {}: {}", damage.since, damage.what)),
    );
    out.push(if group.scrub_every_s == 0 {
        "  no scrubs".to_owned()
    } else {
        let last = group.scrubbed_at.as_ref().map(|at| format!(", counted from {at}"));
        format!("  a scrub every {}{}", duration(group.scrub_every_s), last.unwrap_or_default())
    });
    out.push(format!("  id {}, epoch {}", group.id, group.epoch));
    out.extend(group.epochs.iter().skip(1).map(|epoch| {
        let id: String = epoch.id.chars().take(8).collect();
        format!("  epoch {id} forked behind frame {}", epoch.forked_from)
    }));
    out.extend((group.branches > 0).then(|| {
        format!("  branches kept here: {} (srn group branches {})", group.branches, group.name)
    }));
    out.push(format!(
        "  {}, history of {}",
        if group.checkpoint_every_s == 0 {
            "no periodic checkpoints".into()
        } else {
            format!("checkpoints every {}", duration(group.checkpoint_every_s))
        },
        duration(group.history_s),
    ));
    out.push(format!(
        "  on a full log: {}; on a start without the peer: {}",
        word(&group.full_policy),
        word(&group.isolated_start)
    ));
    out.extend(group.said_by_primary.as_ref().map(|said| format!("  production node: {said}")));
    out.extend(group.synchronous.as_ref().map(|sync| {
        let now = if sync.waits { "writes wait for the peer" } else { "writes do not wait now" };
        format!("  synchronous ({}): {now}, since {}", word(&sync.declared), sync.since)
    }));
    if group.upkeep.debt_bytes > 0 {
        out.push(format!("  history to be given up: {}", Size(group.upkeep.debt_bytes)));
    }
    out.extend(group.upkeep.trouble.as_ref().map(|why| format!("  it does not go: {why}")));
    if group.priority != Priority::Normal {
        out.push(format!("  priority on the link: {}", word(&group.priority)));
    }
    out.extend(group.log.cap.map(|cap| format!("  its log may take {}", Size(cap))));
    out.extend(group.fence_hook.as_ref().map(|hook| format!("  fence hook {}", hook.display())));
    out.extend(group.quiesce.iter().flat_map(quiesce));
    if group.schedules > 0 {
        out.push(format!(
            "  schedules of checkpoints: {} (srn checkpoint schedule list {})",
            group.schedules, group.name
        ));
    }
    out.push(format!(
        "  written {}, sent {} as {}, received {}; {} frames sent again after cuts",
        Size(group.link.content_written),
        Size(group.link.content_sent),
        Size(group.link.wire_sent),
        Size(group.link.wire_received),
        group.link.frames_sent_again
    ));
    out.join("\n")
}

fn quiesce(quiesce: &QuiesceStatus) -> Vec<String> {
    let limit = crate::hook::span(std::time::Duration::from_millis(quiesce.limit_ms));
    let hook = quiesce
        .hook
        .as_ref()
        .map(|hook| format!("  quiesce hook {}, {limit} at most", hook.display()));
    let frozen = quiesce
        .frozen_since
        .as_ref()
        .map(|since| format!("  applications are frozen since {since}"));
    hook.into_iter().chain(frozen).collect()
}

pub(super) fn events(events: &[EventRecord]) -> String {
    let lines: Vec<String> = events
        .iter()
        .rev()
        .map(|event| {
            let level = match event.level {
                Level::Info => "info   ",
                Level::Warning => "warning",
                Level::Alert => "ALERT  ",
            };
            let group = event.group.as_ref().map(|group| format!("group {group}: "));
            let time = clock::rfc3339(srn_core::time::WallTime(event.at));
            format!("{time} {level} {}{}", group.unwrap_or_default(), event.text)
        })
        .collect();
    if lines.is_empty() { "nothing has happened yet".into() } else { lines.join("\n") }
}

pub(super) fn recovery(recovery: &RecoveryStatus) -> String {
    let mut out = vec![recovery_line(recovery)];
    if let Some(firmware) = &recovery.firmware {
        out.push(format!("  firmware {firmware}"));
    }
    if let Some(seconds) = recovery.started_after_s {
        out.push(format!("  started {seconds:.1} s after the command"));
    }
    if let (Some(seconds), Some(answer)) = (recovery.answered_after_s, &recovery.answer) {
        out.push(format!("  answered {seconds:.1} s after the command: {}", answer.trim()));
    }
    if recovery.phase == Phase::Served {
        out.extend(recovery.exports.iter().map(|export| format!("  export {export}")));
    }
    if let Some(log) = &recovery.serial_log {
        out.push(format!("  serial console: {}", log.display()));
    }
    out.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = vec![vec!["a".into(), "long cell".into()], vec!["bbb".into(), "x".into()]];
        assert_eq!(table(&["N", "V"], &rows), "N    V\na    long cell\nbbb  x");
    }

    #[test]
    fn progress_is_told_in_words() {
        assert_eq!(progress(1 << 30, 4 << 30, 1 << 20), "25 % of 4 GiB, 1 MiB/s, 51m 12s left");
        assert_eq!(progress(0, 0, 0), "0 % of 0 B, 0 B/s");
        assert_eq!(bar(1, 2, 4), "[##..]");
        assert_eq!(bar(9, 2, 4), "[####]");
    }
}
