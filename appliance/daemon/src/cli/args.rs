//! What can be typed.

mod points;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use srn_core::name::Name;

pub(super) use points::{
    AT_HELP, CheckpointCommand, HistoryArgs, PolicyArgs, RetentionCommand, ScheduleCommand,
};

use crate::config::{CONTROL_SOCKET, parse_duration, parse_size};

/// Protects servers by replicating their disks to another site, and recovers them there.
#[derive(Debug, Parser)]
#[command(
    name = "srn",
    version,
    max_term_width = 100,
    after_help = "The way from nothing to protected:\n  \
        recovery node:    srn token new\n  \
        production node:  srn pair RECOVERY-NODE\n  \
        production node:  srn group create web --peer NAME --keep cache\n  \
        production node:  srn disk add web root --qmp /run/vm.qmp --node drive0 --wait\n  \
        either node:      srn status --watch\n\n\
        And back, when production is lost:\n  \
        recovery node:    srn failover run web\n\n\
        Exit codes: 0 done, 1 internal error, 2 wrong usage, 3 invalid, 4 not found, 5 conflict,\n\
        6 refused, 7 unreachable, 8 untrusted, 9 storage, 10 something is not installed."
)]
pub(super) struct Line {
    /// The daemon's control socket. Where the daemon puts it: socket of [control] in its
    /// configuration.
    #[arg(long, global = true, env = "SRN_SOCKET", default_value = CONTROL_SOCKET)]
    pub(super) socket: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon in the foreground.
    Daemon {
        /// Its configuration file [default: /etc/srn/config.toml if it is there].
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Say whether everything is safe, and what everything is doing.
    Status {
        /// Again every second, until Ctrl-C.
        #[arg(long, short)]
        watch: bool,
    },
    /// Show what happened.
    Events,
    /// One-time tokens that pair two nodes.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Pair with a node; its token is asked for, or read from standard input.
    Pair {
        /// Host, or host and port.
        #[arg(value_name = "HOST[:PORT]")]
        host: String,
    },
    /// The nodes this one is paired with.
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Protection groups: disks that are replicated together, in one order.
    #[command(subcommand)]
    Group(GroupCommand),
    /// The disks of a group.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Show which points in time of a group can be recovered.
    History(HistoryArgs),
    /// Points in time that were asked for.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// What is kept of a group's history at this node.
    #[command(subcommand)]
    Retention(RetentionCommand),
    /// Run servers from a point in time on this node.
    #[command(subcommand)]
    Failover(FailoverCommand),
    /// Certificates for NBD clients that come over the network.
    #[command(subcommand)]
    NbdCert(NbdCertCommand),
    /// Turn a disk at a point in time into a file, or serve it read-only.
    Export(ExportArgs),
    /// Compare what the two nodes hold, block by block, while writes go on.
    Verify {
        /// The group.
        group: String,
        /// Only this disk.
        #[arg(long)]
        disk: Option<String>,
    },
    /// Read everything that this node holds of a group, and repair what is damaged from the peer.
    Scrub {
        /// The group.
        group: String,
    },
    /// Look at a state directory while no daemon runs: list, verify, export. Changes nothing there.
    #[command(subcommand)]
    Inspect(super::inspect::InspectCommand),
}

#[derive(Debug, Subcommand)]
pub(super) enum NbdCertCommand {
    /// Issue a certificate to a client. Its key is written to the directory and kept nowhere else.
    New {
        /// The client's name: of the certificate, and in the log.
        name: Name,
        /// The directory for ca-cert.pem, client-cert.pem and client-key.pem, as QEMU and libnbd
        /// want it; made if it is not there.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// How many days it is valid.
        #[arg(long, default_value_t = crate::nbd_cert::DAYS)]
        days: u32,
    },
    /// List the certificates that were issued.
    List,
    /// Let nobody in with a client's certificate any more, and drop who is in with it.
    Revoke {
        /// The client's name.
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make a token, to be typed at the other node. It is shown once and works once.
    New {
        /// How long it is valid.
        #[arg(long, default_value = "1h", value_parser = parse_duration, value_name = "DURATION")]
        ttl: std::time::Duration,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum PeerCommand {
    /// List peers.
    List,
    /// Remove the pairing with a peer.
    Remove {
        /// The peer's name or key.
        peer: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Keep {
    /// Only what the peer has not got yet: for disks that the server keeps itself.
    Cache,
    /// A full copy.
    Replica,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum OnFull {
    /// Nothing waits: the log gives way, and the peer gets what changed once it can; for replica
    /// only, and its default.
    Track,
    /// Writes wait until the peer has taken some.
    Throttle,
    /// Protection ends and the server goes on; for cache only.
    Stop,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum OnIsolatedStart {
    /// Serve: production comes first.
    Serve,
    /// Wait until the peer says that it has not taken over.
    Wait,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Sync {
    /// A write is answered when it is durable at this node.
    Off,
    /// It is answered when it is durable at the peer too, and waits while the peer is away.
    Wait,
    /// The same; but without the peer writes go on as if this were off, with an alert.
    Degrade,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum LinkPriority {
    /// Twice what a normal group gets.
    High,
    /// The usual.
    Normal,
    /// Half of what a normal group gets.
    Low,
}

#[derive(Debug, Args, Default)]
pub(super) struct Settings {
    /// A full log: track, throttle or stop.
    #[arg(long, value_name = "POLICY")]
    pub(super) on_full: Option<OnFull>,
    /// At start without the peer: serve or wait.
    #[arg(long, value_name = "POLICY")]
    pub(super) on_isolated_start: Option<OnIsolatedStart>,
    /// Whether a write is answered only when the peer holds it too, so that none is ever lost: off,
    /// wait or degrade.
    #[arg(long, value_name = "MODE")]
    pub(super) sync: Option<Sync>,
    /// Time between periodic checkpoints, from 1s; 0s for none.
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub(super) checkpoint_every: Option<std::time::Duration>,
    /// How far back every write stays recoverable, where a replica is kept.
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub(super) history: Option<std::time::Duration>,
    /// How long branches are kept, which failovers leave behind [default: 30days].
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub(super) keep_branches: Option<std::time::Duration>,
    /// Time between scrubs, which read everything to find damage early; 0s for none.
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub(super) scrub_every: Option<std::time::Duration>,
    /// The most that the log may take, for example 10G.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(super) log_size: Option<u64>,
    /// Its part of a link that it shares with other groups: high is twice normal, low half of it.
    #[arg(long, value_name = "PRIORITY")]
    pub(super) priority: Option<LinkPriority>,
}

/// A path that may be empty, which by itself clap refuses.
#[expect(clippy::unnecessary_wraps, reason = "the form that clap wants")]
fn path_or_none(text: &str) -> Result<PathBuf, String> {
    Ok(text.into())
}

#[derive(Debug, Subcommand)]
pub(super) enum GroupCommand {
    /// Make a group of which this node is primary.
    Create {
        /// Its name.
        name: String,
        /// The peer that it is replicated to.
        #[arg(long)]
        peer: Option<String>,
        /// What this node keeps of it.
        #[arg(long)]
        keep: Keep,
        #[command(flatten)]
        settings: Settings,
    },
    /// List groups.
    List,
    /// Show everything about a group.
    Show {
        /// The group.
        name: String,
    },
    /// Change settings of a group.
    Set {
        /// The group.
        name: String,
        #[command(flatten)]
        settings: Settings,
        /// The peer to replicate with from now on, when the one before is lost or was made anew.
        #[arg(long)]
        peer: Option<String>,
        /// A program that is run before a forced failover and makes sure that production is off;
        /// empty for none.
        #[arg(long, value_name = "PROGRAM", value_parser = path_or_none)]
        fence_hook: Option<PathBuf>,
        /// A program that makes the applications of the group's servers quiet for a checkpoint: it is
        /// called as PROGRAM freeze GROUP, and then always as PROGRAM thaw GROUP, also when freeze has
        /// failed, and perhaps more than once. Its whole path; it and the directories above it belong
        /// to root and are not written by others. Empty for none.
        #[arg(long, value_name = "PROGRAM", value_parser = path_or_none)]
        quiesce_hook: Option<PathBuf>,
        /// The longest from freeze to thaw [default: 10s].
        #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
        quiesce_limit: Option<std::time::Duration>,
    },
    /// Stop replicating for a while; writes are kept here.
    Pause {
        /// The group.
        name: String,
    },
    /// Replicate again.
    Resume {
        /// The group.
        name: String,
        /// This node goes on although it is fenced: I have made sure that the peer has not taken
        /// over, and will not, or that it is lost.
        #[arg(long)]
        yes_not_taken_over: bool,
    },
    /// Turn the direction after a failover: at the node that was primary before, let it follow its
    /// peer. What only this node has is kept as a branch.
    Reverse {
        /// The group.
        name: String,
        /// This node gives way although nothing says that the peer took over from it: both are
        /// primary.
        #[arg(long)]
        give_way: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Have the replica compared with the production node's copy, at the recovery node: only what
    /// differs is sent, and every checkpoint stays.
    Resync {
        /// The group.
        name: String,
        /// What is there already, a backup or the old disk: what it holds of the disk is not sent.
        /// Only the difference is. Once for each disk; nothing is written to it.
        #[arg(long, value_name = "[DISK=]FILE|NBD-URI")]
        seed_from: Vec<String>,
        /// Not after all.
        #[arg(long, conflicts_with = "seed_from")]
        cancel: bool,
    },
    /// List branches: what failovers have left behind on this node.
    Branches {
        /// The group.
        name: String,
    },
    /// Branches of a group, one by one.
    #[command(subcommand)]
    Branch(BranchCommand),
    /// Delete what this node keeps of a group. What the peer keeps stays.
    Delete {
        /// The group.
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum BranchCommand {
    /// Delete a branch. No other node has it.
    Delete {
        /// The group.
        group: String,
        /// The branch, as listed.
        id: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Add a disk to a group.
    #[command(group = clap::ArgGroup::new("source").required(true).multiple(true))]
    Add {
        /// The group.
        group: String,
        /// The disk's name.
        name: String,
        /// An empty disk of this size, served from here.
        #[arg(long, group = "source", value_parser = parse_size)]
        size: Option<u64>,
        /// The disk of a running server: the QMP socket of its QEMU.
        #[arg(long, group = "source", requires = "node", value_name = "SOCKET")]
        #[arg(conflicts_with_all = ["size", "copy_from"])]
        qmp: Option<PathBuf>,
        /// The block node or device there.
        #[arg(long, requires = "qmp")]
        node: Option<String>,
        /// A disk served from here that begins with the content of this NBD export.
        #[arg(long, group = "source", value_name = "NBD-URI", conflicts_with = "size")]
        copy_from: Option<String>,
        /// A disk that is read in passes, each of which ends with a point, from this NBD export, which
        /// must not change while it is read; or, with --qmp, from the NBD server of that QEMU (without
        /// a name: each pass has an export of its own), and then only what has changed.
        #[arg(long, group = "source", value_name = "NBD-URI")]
        #[arg(conflicts_with_all = ["size", "copy_from"])]
        pull: Option<String>,
        /// From the beginning of a pass to that of the next [default: 1min].
        #[arg(long, requires = "pull", value_parser = parse_duration, value_name = "DURATION")]
        every: Option<std::time::Duration>,
        /// A directory on the server's host, with room for what the server overwrites during a pass.
        #[arg(long, requires = "pull", requires = "qmp", value_name = "DIR")]
        scratch: Option<PathBuf>,
        /// Wait for the end of initial replication, and show how far it is.
        #[arg(long)]
        wait: bool,
    },
    /// List the disks of a group.
    List {
        /// The group.
        group: String,
    },
    /// Take a disk out of a group. Points from before keep it.
    Remove {
        /// The group.
        group: String,
        /// The disk.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct MachineArgs {
    #[arg(long, default_value = "latest", value_name = "POINT", allow_hyphen_values = true, help = AT_HELP)]
    pub(super) at: String,
    /// Virtual CPUs [default: cpus of [recovery] in the configuration, 2 if not there].
    #[arg(long)]
    pub(super) cpus: Option<u32>,
    /// Memory, for example 8G [default: memory of [recovery] in the configuration, 1G if not
    /// there].
    #[arg(long, value_parser = parse_size)]
    pub(super) memory: Option<u64>,
    /// bios or uefi [default: what the disk needs].
    #[arg(long)]
    pub(super) firmware: Option<String>,
    /// How the server sees its disks: virtio, nvme, scsi, pvscsi, sata or ide [default: virtio].
    #[arg(long)]
    pub(super) bus: Option<String>,
    /// What the server is joined to: user, user,restrict, bridge:NAME (allowed in
    /// /etc/qemu/bridge.conf) or tap:NAME [default: nothing].
    #[arg(long)]
    pub(super) network: Option<String>,
    /// A string that the server finds in its SMBIOS tables (type 11).
    #[arg(long, value_name = "TEXT")]
    pub(super) smbios: Vec<String>,
    /// Wait until this text appears on the serial console.
    #[arg(long, value_name = "TEXT", conflicts_with = "wait_tcp")]
    pub(super) wait_serial: Option<String>,
    /// Wait until this service accepts connections.
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) wait_tcp: Option<String>,
    /// How long to wait for that.
    #[arg(long, default_value = "10min", value_parser = parse_duration, value_name = "DURATION")]
    pub(super) wait_timeout: std::time::Duration,
    /// Go on although something in the point is known to be damaged: reads of it fail in the server.
    #[arg(long)]
    pub(super) accept_damage: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum FailoverCommand {
    /// Recover a group for real: production stops being primary.
    Run {
        /// The group.
        group: String,
        #[command(flatten)]
        machine: MachineArgs,
        /// Do not ask the production node to stop in good order.
        #[arg(long)]
        force: bool,
        /// Do not ask before production is stopped in good order (for scripts).
        #[arg(long)]
        yes: bool,
        /// I have made sure that the production server is off (for scripts; else it is asked).
        #[arg(long)]
        yes_production_is_off: bool,
        /// Only take over; start no server.
        #[arg(long)]
        no_start: bool,
    },
    /// Try a recovery on a clone, isolated, while replication goes on.
    Test {
        /// The group.
        group: String,
        #[command(flatten)]
        machine: MachineArgs,
    },
    /// Stop a recovered server; a test's clone is thrown away.
    Stop {
        /// The recovered server, as listed.
        id: String,
        /// How long it may take to shut down by itself before it is cut off.
        #[arg(long, default_value = "60s", value_parser = parse_duration, value_name = "DURATION")]
        graceful: std::time::Duration,
    },
    /// List recovered servers.
    List,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("to").required(true))]
pub(super) struct ExportArgs {
    /// The group.
    pub(super) group: String,
    /// The disk.
    pub(super) disk: String,
    #[arg(long, default_value = "latest", value_name = "POINT", allow_hyphen_values = true, help = AT_HELP)]
    pub(super) at: String,
    /// Of a branch: what to export is its end, one of its checkpoints, or one of its frames.
    #[arg(long, value_name = "ID")]
    pub(super) branch: Option<String>,
    /// Write a raw disk image.
    #[arg(long, group = "to", value_name = "FILE")]
    pub(super) raw: Option<PathBuf>,
    /// Replace the file if it is there.
    #[arg(long, requires = "raw")]
    pub(super) force: bool,
    /// What is damaged reads as zero; an event names the sectors.
    #[arg(long)]
    pub(super) accept_damage: bool,
    /// Serve it read-only over NBD until Ctrl-C.
    #[arg(long, group = "to")]
    pub(super) nbd: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound() {
        Line::command().debug_assert();
    }

    #[test]
    fn secrets_have_no_place_on_the_command_line() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let name = argument.get_id().as_str();
                assert!(!name.contains("token") && !name.contains("secret"), "{name}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&Line::command());
    }
}
