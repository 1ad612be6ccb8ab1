//! What can be typed about points in time.

use clap::{Args, Subcommand};

use crate::config::{parse_duration, parse_size};

/// What every `--at` says.
pub(in crate::cli) const AT_HELP: &str = "What point: latest; a time as \"2026-11-20 14:03:07.25\" \
    or 14:03 (of this node's zone, or with Z or +01:00 behind it), or a span before now as -90s: the \
    newest write at or before it; frame:123; or a checkpoint's label, or the beginning of its id";

#[derive(Debug, Args)]
pub(in crate::cli) struct HistoryArgs {
    /// The group.
    pub(in crate::cli) group: String,
    #[arg(long, value_name = "POINT", allow_hyphen_values = true, help = AT_HELP)]
    pub(in crate::cli) at: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum CheckpointCommand {
    /// Make a checkpoint now.
    Create {
        /// The group.
        group: String,
        /// A label to find it by.
        #[arg(long)]
        label: Option<String>,
        /// Make the applications quiet for it: application-consistent. When that fails it is
        /// crash-consistent, and the exit code is 6.
        #[arg(long)]
        app: bool,
        /// Never retire it.
        #[arg(long)]
        pin: bool,
        /// Wait until it can be recovered at the recovery node.
        #[arg(long)]
        wait: bool,
        /// How long to wait for that.
        #[arg(long, default_value = "1min", value_parser = parse_duration, value_name = "DURATION")]
        wait_timeout: std::time::Duration,
    },
    /// Checkpoints by the calendar, made at the production node.
    #[command(subcommand)]
    Schedule(ScheduleCommand),
    /// List checkpoints, oldest first.
    List {
        /// The group.
        group: String,
    },
    /// Never retire a checkpoint. At the production node: ask the recovery node not to.
    Pin {
        /// The group.
        group: String,
        /// Its label, or the beginning of its id.
        checkpoint: String,
    },
    /// Retire a checkpoint as the policy says. Each node decides for what it keeps.
    Unpin {
        /// The group.
        group: String,
        /// Its label, or the beginning of its id.
        checkpoint: String,
    },
    /// Give a checkpoint a label.
    Label {
        /// The group.
        group: String,
        /// Its label as it is, or the beginning of its id.
        checkpoint: String,
        /// The new label; empty for none.
        label: String,
    },
    /// Forget a checkpoint at this node. Within the full history its position stays recoverable.
    Delete {
        /// The group.
        group: String,
        /// Its label, or the beginning of its id.
        checkpoint: String,
    },
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum ScheduleCommand {
    /// Make checkpoints at the times of a calendar expression. One that is missed, while the daemon is
    /// down or a disk is in a resync, is made once as soon as it can be.
    Add {
        /// The group.
        group: String,
        /// When, as systemd writes it (systemd.time(7)): "Mon..Fri 02:00", "*:0/15", "*-*~01 23:30 UTC"
        /// (the last day of each month), daily. Without a zone behind it: by the clock of this node;
        /// what is not there as clocks are put forward is made at that moment, an hour that is there
        /// twice counts once.
        calendar: String,
        /// Make the applications quiet for each (see srn group set --quiesce-hook); crash-consistent
        /// when that fails.
        #[arg(long)]
        app: bool,
        /// What its checkpoints are called; the time comes behind it.
        #[arg(long)]
        label: Option<String>,
    },
    /// List schedules, and when they come next.
    List {
        /// The group.
        group: String,
    },
    /// Make no more checkpoints by a schedule.
    Remove {
        /// The group.
        group: String,
        /// The schedule's number, as listed.
        number: u32,
    },
}

#[derive(Debug, Args, Default)]
pub(in crate::cli) struct PolicyArgs {
    /// How long every write stays recoverable.
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub(in crate::cli) window: Option<std::time::Duration>,
    /// Keep the newest checkpoint of so many spans of ten minutes.
    #[arg(long, value_name = "COUNT")]
    pub(in crate::cli) ten_minutes: Option<u32>,
    /// Of so many hours.
    #[arg(long, value_name = "COUNT")]
    pub(in crate::cli) hours: Option<u32>,
    /// Of so many days (UTC).
    #[arg(long, value_name = "COUNT")]
    pub(in crate::cli) days: Option<u32>,
    /// Of so many weeks, from Monday.
    #[arg(long, value_name = "COUNT")]
    pub(in crate::cli) weeks: Option<u32>,
    /// Of so many months.
    #[arg(long, value_name = "COUNT")]
    pub(in crate::cli) months: Option<u32>,
    /// Keep so many of the newest checkpoints at any age.
    #[arg(long, value_name = "COUNT")]
    pub(in crate::cli) min_points: Option<u32>,
    /// The most that history may take here, for example 500G; 0 for no cap. The oldest checkpoints
    /// go first, then the full history is shortened; the newest clean and the newest proven
    /// checkpoint and those that are pinned stay.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(in crate::cli) replica_cap: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum RetentionCommand {
    /// Show what is kept of a group's history at this node.
    Show {
        /// The group.
        group: String,
    },
    /// Show what becomes of each checkpoint, and why; nothing is changed.
    Preview {
        /// The group.
        group: String,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Change what is kept. Spans count only where there is a checkpoint in them.
    Set {
        /// The group.
        group: String,
        #[command(flatten)]
        policy: PolicyArgs,
        /// Do not ask when checkpoints are dropped.
        #[arg(long)]
        yes: bool,
    },
    /// Go on after a step of the clock: it is right as it is now.
    Resume {
        /// The group.
        group: String,
    },
}
