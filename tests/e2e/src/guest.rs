//! A server in QEMU as an administrator runs one, from the disk that `tests/server/build.sh` makes.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::{Child, Command};

/// A running server. It is ended when dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    dir: PathBuf,
}

/// A record that a server has written and synced, and when it did, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Synced {
    /// Its number; they count from 1.
    pub record: u64,
    /// When.
    pub at: f64,
}

/// What a server has found at its start.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The last record, and when it was written.
    pub last: Synced,
    /// Whether every record up to it is whole.
    pub intact: bool,
}

/// What a disk boots by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// The old way.
    Bios,
    /// The new way.
    Uefi,
}

impl Firmware {
    /// As `tests/server/build.sh` calls it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        }
    }
}

/// Where Debian puts UEFI for QEMU.
const OVMF: &str = "/usr/share/OVMF";

/// The name of the disk in the server's QEMU.
pub const DISK_NODE: &str = "disk0";

impl Guest {
    /// Starts a server from a raw disk that boots by this firmware; sockets and console go to `dir`.
    ///
    /// # Panics
    /// When QEMU cannot be started.
    #[must_use]
    pub fn start(disk: &Path, firmware: Firmware, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "512"])
            .args(["-machine", "q35", "-no-user-config", "-nodefaults", "-display", "none"])
            .args([
                "-blockdev",
                &format!("driver=file,node-name=file0,filename={}", disk.display()),
            ])
            .args(["-blockdev", &format!("driver=raw,node-name={DISK_NODE},file=file0")])
            .args(["-device", &format!("virtio-blk-pci,id=root,drive={DISK_NODE}")])
            .args(["-serial", &format!("file:{}", dir.join("console").display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", dir.join("qmp").display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        if firmware == Firmware::Uefi {
            let variables = dir.join("variables");
            let fresh = Path::new(OVMF).join("OVMF_VARS_4M.fd");
            std::fs::copy(&fresh, &variables).unwrap_or_else(|error| {
                panic!("{}: {error}; install ovmf", fresh.display());
            });
            let flash = "if=pflash,format=raw";
            command
                .args(["-drive", &format!("{flash},readonly=on,file={OVMF}/OVMF_CODE_4M.fd")])
                .args(["-drive", &format!("{flash},file={}", variables.display())]);
        }
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("qemu-system-x86_64: {error}; install it with tests/setup/packages.sh qemu")
        });
        Self { child, dir: dir.to_owned() }
    }

    /// Its QMP socket.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// What it has written on its console.
    #[must_use]
    pub fn console(&self) -> String {
        read_console(&self.dir.join("console"))
    }

    /// The last record that it has announced as synced.
    #[must_use]
    pub fn last_synced(&self) -> Option<Synced> {
        synced(&self.console()).last().copied()
    }

    /// Cuts its power.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("QEMU ends");
    }
}

/// A console's text, without the lines' odd ends.
#[must_use]
pub fn read_console(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).replace('\r', "")
}

/// All records that a console announces as synced. The last line may be half written.
#[must_use]
pub fn synced(console: &str) -> Vec<Synced> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    whole
        .lines()
        .filter_map(|line| line.split_once("SRN-SERVER synced "))
        .filter_map(|(_, words)| {
            let (record, at) = words.trim().split_once(' ')?;
            Some(Synced { record: record.parse().ok()?, at: at.parse().ok()? })
        })
        .collect()
}

/// What a server said at its start that it has found.
#[must_use]
pub fn found(line: &str) -> Option<Found> {
    let words = line.split_once("SRN-SERVER found ")?.1;
    let value = |key: &str| {
        words.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    Some(Found {
        last: Synced {
            record: value("last")?.parse().ok()?,
            at: value("last_time")?.parse().ok()?,
        },
        intact: value("intact")? == "yes",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_are_read_up_to_the_last_whole_line() {
        let console =
            "boot\nSRN-SERVER synced 1 5.5\nxx SRN-SERVER synced 2 6.25\nSRN-SERVER synced 3 7.";
        assert_eq!(
            synced(console),
            [Synced { record: 1, at: 5.5 }, Synced { record: 2, at: 6.25 }]
        );
    }

    #[test]
    fn what_was_found_is_read() {
        let line = "SRN-SERVER found records=7 last=7 last_time=12.5 intact=yes";
        let expected = Found { last: Synced { record: 7, at: 12.5 }, intact: true };
        assert_eq!(found(line), Some(expected));
        assert!(!found(&line.replace("yes", "no:gap")).unwrap().intact);
        assert_eq!(found("SRN-SERVER found"), None);
    }
}
