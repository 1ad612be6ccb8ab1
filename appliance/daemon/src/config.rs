//! The configuration file: TOML, unknown keys refused, every value with a default that works.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use srn_core::name::Name;

use crate::bandwidth::{Plan, Rule, parse_rate};

/// UDP port of the link unless configured otherwise.
pub const LINK_PORT: u16 = 7310;

/// Where the configuration is looked for.
pub const CONFIG_PATH: &str = "/etc/srn/config.toml";

/// Where the control socket is unless configured otherwise.
pub const CONTROL_SOCKET: &str = "/run/srn/control.sock";

/// What cannot be used, and where it stands. The operator's fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}; name the file to use with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{path}: {text}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        text: String,
    },
    /// A value that cannot be used.
    #[error("{path}: {key}: {text}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Why not, and what can be.
        text: String,
    },
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct File {
    node: NodeFile,
    link: LinkFile,
    nbd: NbdFile,
    control: ControlFile,
    recovery: RecoveryFile,
    store: StoreFile,
    log: LogFile,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct NodeFile {
    name: Option<String>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct LinkFile {
    listen: Option<String>,
    limit: Option<String>,
    schedule: Vec<ScheduleFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScheduleFile {
    from: String,
    to: String,
    days: Option<String>,
    limit: String,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct NbdFile {
    listen: Vec<String>,
    allow: Vec<String>,
    tls: Option<String>,
    names: Vec<String>,
    socket_group: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ControlFile {
    socket: Option<PathBuf>,
    group: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RecoveryFile {
    accelerator: Option<String>,
    cpus: Option<u32>,
    memory: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct StoreFile {
    segment_size: Option<String>,
    index_cache: Option<String>,
    recent_frames: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct LogFile {
    level: Option<String>,
}

/// Which accelerator recovered servers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// KVM when it proves itself, else emulation.
    Auto,
    /// Emulation.
    Tcg,
    /// KVM, without proof.
    Kvm,
}

/// The configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name, for people and peers.
    pub name: Name,
    /// Keys, fleet state, and the replicas and logs of all groups.
    pub state_dir: PathBuf,
    /// Sockets; made at start, gone at the next boot.
    pub run_dir: PathBuf,
    /// Address and UDP port of the link.
    pub link_listen: SocketAddr,
    /// What may be sent to each peer, by the time of the day.
    pub bandwidth: Plan,
    /// TCP addresses on which exports are served, besides the unix socket.
    pub nbd_listen: Vec<SocketAddr>,
    /// Networks from which TCP clients may come; empty: where TLS is required all, else this machine.
    pub nbd_allow: Vec<IpNet>,
    /// TCP clients off the loopback must show a certificate that this node has issued.
    pub nbd_tls: bool,
    /// Names and addresses by which clients reach this node, beside its own.
    pub nbd_names: Vec<String>,
    /// The system group whose members may use the NBD socket.
    pub nbd_socket_group: Option<String>,
    /// The control socket.
    pub control_socket: PathBuf,
    /// The system group whose members may use it, besides root.
    pub control_group: Option<String>,
    /// How recovered servers run.
    pub acceleration: Acceleration,
    /// Virtual CPUs of a recovered server unless said otherwise.
    pub recovery_cpus: u32,
    /// Memory of a recovered server unless said otherwise, in bytes.
    pub recovery_memory: u64,
    /// Size of a log segment file in bytes.
    pub segment_bytes: u64,
    /// Memory for index blocks of all groups, in bytes.
    pub index_cache_bytes: usize,
    /// Memory for frames that were just written, of all groups, in bytes.
    pub recent_bytes: usize,
    /// What is logged.
    pub log_level: log::LevelFilter,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`], which names file, place and reason.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(path, &text)
    }

    /// The configuration of a node without a file.
    ///
    /// # Errors
    /// As [`Config::load`], when the host's name cannot be used.
    pub fn defaults() -> Result<Self, ConfigError> {
        Self::parse(Path::new(CONFIG_PATH), "")
    }

    /// Checks a configuration; `path` is named in errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            text: match error.span() {
                Some(span) => format!("{}: {}", place(text, span.start), one_line(error.message())),
                None => one_line(error.message()),
            },
        })?;
        let value = |key, text: String| ConfigError::Value { path: path.into(), key, text };
        let size = |key, text: &Option<String>, default: u64, min: u64, max: u64| {
            let Some(text) = text else { return Ok(default) };
            let bytes = parse_size(text).map_err(|error| value(key, error))?;
            if (min..=max).contains(&bytes) {
                Ok(bytes)
            } else {
                Err(value(key, format!("{text} is not between {} and {}", Size(min), Size(max))))
            }
        };
        let name = match file.node.name {
            Some(name) => name,
            None => rustix::system::uname().nodename().to_string_lossy().to_lowercase(),
        };
        let run_dir = file.node.run_dir.unwrap_or_else(|| "/run/srn".into());
        let address = |key, text: &str, example: &str| {
            text.parse::<SocketAddr>().map_err(|_| {
                value(key, format!("{text:?} is no address and port, for example {example:?}"))
            })
        };
        let link_listen = match &file.link.listen {
            Some(text) => address("link.listen", text, "0.0.0.0:7310")?,
            None => ([0, 0, 0, 0], LINK_PORT).into(),
        };
        let bandwidth = bandwidth(&file.link).map_err(|(key, text)| value(key, text))?;
        let nbd_listen: Vec<SocketAddr> = file
            .nbd
            .listen
            .iter()
            .map(|text| address("nbd.listen", text, "127.0.0.1:10809"))
            .collect::<Result<_, _>>()?;
        let network = |text: &String| {
            text.parse::<IpNet>().map_err(|_| {
                let example = "192.0.2.10/32";
                value("nbd.allow", format!("{text:?} is no network, for example {example:?}"))
            })
        };
        let nbd_allow: Vec<IpNet> = file.nbd.allow.iter().map(network).collect::<Result<_, _>>()?;
        let nbd_tls = match file.nbd.tls.as_deref() {
            None | Some("off") => false,
            Some("required") => true,
            Some(other) => {
                let text = format!(
                    "{other:?} is none of \"off\", \"required\"; there is nothing between: a client \
                     that may choose can be talked out of it by whoever sits in the middle"
                );
                return Err(value("nbd.tls", text));
            }
        };
        for name in &file.nbd.names {
            crate::nbd_cert::check_name(name).map_err(|text| value("nbd.names", text))?;
        }
        if let Some(open) = nbd_listen.iter().find(|addr| !addr.ip().is_loopback())
            && nbd_allow.is_empty()
            && !nbd_tls
        {
            return Err(value(
                "nbd.allow",
                format!(
                    "{open} is no loopback address: set tls = \"required\" and make certificates \
                     for clients with srn nbd-cert, or list the networks that may connect, for \
                     example allow = [\"192.0.2.10/32\"]"
                ),
            ));
        }
        Ok(Self {
            name: name.parse().map_err(|error| value("node.name", format!("{error}")))?,
            state_dir: file.node.state_dir.unwrap_or_else(|| "/var/lib/srn".into()),
            link_listen,
            bandwidth,
            nbd_listen,
            nbd_allow,
            nbd_tls,
            nbd_names: file.nbd.names,
            nbd_socket_group: file.nbd.socket_group,
            control_socket: file.control.socket.unwrap_or_else(|| run_dir.join("control.sock")),
            control_group: file.control.group,
            run_dir,
            acceleration: match file.recovery.accelerator.as_deref() {
                None | Some("auto") => Acceleration::Auto,
                Some("tcg") => Acceleration::Tcg,
                Some("kvm") => Acceleration::Kvm,
                Some(other) => {
                    let text = format!("{other:?} is none of \"auto\", \"tcg\", \"kvm\"");
                    return Err(value("recovery.accelerator", text));
                }
            },
            recovery_cpus: match file.recovery.cpus.unwrap_or(2) {
                cpus @ 1..=255 => cpus,
                other => return Err(value("recovery.cpus", format!("{other} is not 1 to 255"))),
            },
            recovery_memory: size(
                "recovery.memory",
                &file.recovery.memory,
                1 << 30,
                64 << 20,
                1 << 42,
            )?,
            segment_bytes: size(
                "store.segment_size",
                &file.store.segment_size,
                64 << 20,
                1 << 20,
                1 << 30,
            )?
            .next_multiple_of(4096),
            index_cache_bytes: to_usize(size(
                "store.index_cache",
                &file.store.index_cache,
                32 << 20,
                1 << 20,
                1 << 36,
            )?),
            recent_bytes: to_usize(size(
                "store.recent_frames",
                &file.store.recent_frames,
                32 << 20,
                1 << 20,
                1 << 36,
            )?),
            log_level: match file.log.level.as_deref() {
                None => log::LevelFilter::Info,
                Some(text) => text.parse().map_err(|_| {
                    let all = "\"error\", \"warn\", \"info\", \"debug\", \"trace\"";
                    value("log.level", format!("{text:?} is none of {all}"))
                })?,
            },
        })
    }
}

fn bandwidth(link: &LinkFile) -> Result<Plan, (&'static str, String)> {
    let limit = link.limit.as_deref().map_or(Ok(None), parse_rate);
    let rule = |rule: &ScheduleFile| {
        let ScheduleFile { from, to, days, limit } = rule;
        Rule::parse(from, to, days.as_deref(), limit).map_err(|error| ("link.schedule", error))
    };
    Ok(Plan {
        limit: limit.map_err(|error| ("link.limit", error))?,
        rules: link.schedule.iter().map(rule).collect::<Result<_, _>>()?,
    })
}

/// Where byte `at` of `text` is, as editors count.
fn place(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |start| start.chars().count()) + 1;
    let shown = text.lines().nth(line - 1).unwrap_or_default().trim();
    format!("line {line}, column {column} ({shown})")
}

fn one_line(text: &str) -> String {
    text.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(": ")
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Reads a size: a number of bytes, or with K, M, G, T for powers of 1024.
///
/// # Errors
/// A text that says what is expected.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size; write bytes, or a number with K, M, G or T");
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = trimmed.get(digits.len()..).unwrap_or_default().to_ascii_uppercase();
    let shift = match unit.as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.trim().parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// Reads a duration such as "90s", "10min" or "1h 30m".
///
/// # Errors
/// A text that says what is expected.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("{text:?} is no duration ({error}); write for example 90s or 1h"))
}

/// A size as people read it, in powers of 1024.
#[derive(Debug, Clone, Copy)]
pub struct Size(pub u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        let unit_name = units.get(unit).unwrap_or(&"");
        let text = if unit == 0 || value >= 100.0 || value.fract() == 0.0 {
            format!("{value:.0} {unit_name}")
        } else {
            format!("{value:.1} {unit_name}")
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("c.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_has_a_default() {
        let config = parse("[node]\nname = \"a\"").unwrap();
        assert_eq!(config.link_listen.port(), LINK_PORT);
        assert_eq!(config.control_socket, Path::new(CONTROL_SOCKET));
        assert!(config.nbd_listen.is_empty());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, named) in [
            ("[node]\nnaem = \"a\"", "naem"),
            ("[node]\nname = \"A b\"", "node.name"),
            ("[lnk]", "lnk"),
            ("[link]\nlisten = \"x\"", "listen"),
            ("[link]\nlimit = \"100\"", "link.limit"),
            ("[[link.schedule]]\nfrom = \"8\"\nto = \"9:00\"\nlimit = \"none\"", "link.schedule"),
            ("[[link.schedule]]\nfrom = \"8:00\"\nto = \"9:00\"", "limit"),
            ("[nbd]\nlisten = [\"0.0.0.0:10809\"]", "nbd.allow"),
            ("[recovery]\nmemory = \"1Q\"", "recovery.memory"),
            ("[recovery]\nmemory = \"1K\"", "64 MiB"),
            ("[recovery]\naccelerator = \"magic\"", "magic"),
            ("[log]\nlevel = \"loud\"", "loud"),
            ("[node", "line 1"),
        ] {
            let text = if text.contains("[node") {
                text.to_owned()
            } else {
                format!("[node]\nname = \"a\"\n{text}")
            };
            let error = parse(&text).unwrap_err();
            assert!(error.contains(named) && error.starts_with("c.toml"), "{text:?}: {error}");
        }
    }

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("512", 512), ("4K", 4096), ("1 MiB", 1 << 20), ("2g", 2 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1.5G", "99999999999T", "1 X"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for (bytes, text) in
            [(0, "0 B"), (1536, "1.5 KiB"), (2 << 30, "2 GiB"), (150 << 20, "150 MiB")]
        {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
