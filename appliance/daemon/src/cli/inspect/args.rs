//! What can be typed behind `srn inspect`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::parse_size;

/// Look at a state directory while no daemon runs. Nothing in it is changed.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum InspectCommand {
    /// List groups.
    Groups {
        /// A node's state directory, or one group's directory in it; copies of them will do.
        dir: PathBuf,
    },
    /// List what can be recovered: lines of history, their range, checkpoints, disks.
    Points {
        #[command(flatten)]
        at: Where,
    },
    /// List the files of the log, and what they hold.
    Segments {
        #[command(flatten)]
        at: Where,
    },
    /// Read every byte and name what is damaged; exit code 9 when something is.
    Verify {
        #[command(flatten)]
        at: Where,
    },
    /// Show one frame: header, records, blocks and their checksums.
    Frame(FrameArgs),
    /// Write a disk at any point in time to a raw image. For other formats: qemu-img convert.
    Export(ExportArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Where {
    /// A node's state directory, or one group's directory in it; copies of them will do.
    pub(super) dir: PathBuf,
    /// The group's name or id, or the beginning of it [default: all, or the only one].
    pub(super) group: Option<String>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct FrameArgs {
    #[command(flatten)]
    pub(super) at: Where,
    /// The frame's number.
    #[arg(long, required_unless_present = "segment", conflicts_with = "segment")]
    pub(super) seq: Option<u64>,
    /// The line it is in: the beginning of its epoch's id [default: the main line].
    #[arg(long, conflicts_with = "segment", value_name = "EPOCH")]
    pub(super) line: Option<String>,
    /// Instead: what lies in this log file (the number in its name, hexadecimal).
    #[arg(long, requires = "offset", value_name = "SLOT")]
    pub(super) segment: Option<String>,
    /// So many bytes from its start.
    #[arg(long, requires = "segment", value_name = "BYTES", value_parser = parse_size)]
    pub(super) offset: Option<u64>,
    /// Show the content too.
    #[arg(long)]
    pub(super) content: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("to").required(true))]
pub(in crate::cli) struct ExportArgs {
    #[command(flatten)]
    pub(super) at: Where,
    /// The disk's name.
    #[arg(long, value_name = "NAME")]
    pub(super) disk: String,
    /// What to export: latest, a checkpoint's id or label, a frame's number, or (in the main line)
    /// a time, as srn history takes it.
    #[arg(long = "at", default_value = "latest", value_name = "POINT")]
    pub(super) point: String,
    /// The line it is in: the beginning of its epoch's id [default: the main line].
    #[arg(long, value_name = "EPOCH")]
    pub(super) line: Option<String>,
    /// Write a raw disk image, sparse.
    #[arg(long, group = "to", value_name = "FILE")]
    pub(super) raw: Option<PathBuf>,
    /// Write the content to standard output.
    #[arg(long, group = "to")]
    pub(super) stdout: bool,
    /// Replace the file if it is there.
    #[arg(long, requires = "raw")]
    pub(super) force: bool,
    /// Fill sectors that are damaged with zeros, and list them.
    #[arg(long)]
    pub(super) accept_damage: bool,
}
