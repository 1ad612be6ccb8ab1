//! A machine as data, and QEMU's arguments for it.
//!
//! [`MachineSpec::arguments`] is pure: the same spec gives the same arguments, nothing is read or
//! written. Files of the machine's own are named relative to its run directory, where QEMU is
//! started, so no path of ours needs QEMU's comma quoting or can outgrow a socket address.
//! Nothing secret is ever among the arguments, which every user of the host can read.
//!
//! It refuses to guess: a combination that QEMU or the firmware would not start is a
//! [`SpecError`] beforehand, in the operator's words.

mod disk;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::disk::{Bus, Disk, RECONNECT_DELAY_SECONDS, SOCKET_PATH_BYTES_MAX};
use super::firmware::Firmware;
use super::network::Nic;

/// QEMU's control socket, in the run directory.
pub const QMP_SOCKET: &str = "qmp.sock";
/// What the guest writes on its first serial port, in the run directory.
pub const SERIAL_LOG: &str = "serial.log";
/// The machine's own copy of the UEFI variables, in the run directory.
pub const UEFI_VARIABLES: &str = "uefi-variables.fd";

/// The most disks of one machine: with its other devices they fit the 32 slots of one PCI bus.
pub const DISKS_MAX: usize = 24;
/// The most network cards of one machine, for the same reason.
pub const NICS_MAX: usize = 4;
/// The most SMBIOS strings of one machine, and the most bytes of one of them.
pub const SMBIOS_STRINGS_MAX: usize = 16;
/// See [`SMBIOS_STRINGS_MAX`].
pub const SMBIOS_STRING_BYTES_MAX: usize = 4096;

/// Everything that makes a machine, apart from where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Its name: 1 to 64 letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Virtual processors, 1 to 255.
    pub vcpus: u16,
    /// Memory in MiB, at least 16.
    pub memory_mib: u32,
    /// BIOS or UEFI.
    pub firmware: Firmware,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// The chipset.
    #[serde(default)]
    pub chipset: Chipset,
    /// QEMU's name of the processor model; by default the host's own with KVM, all that QEMU can
    /// emulate with TCG.
    #[serde(default)]
    pub cpu: Option<String>,
    /// Disks in boot order.
    pub disks: Vec<Disk>,
    /// Network cards; none by default.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// How the guest reads the hardware clock.
    #[serde(default)]
    pub clock: GuestClock,
    /// The machine's identity in the firmware tables, as 8-4-4-4-12 hex digits. Give a recovered
    /// server the one it had.
    #[serde(default)]
    pub uuid: Option<String>,
    /// Strings the guest finds in SMBIOS type 11 (systemd reads credentials there). They reach
    /// QEMU in files, not as arguments.
    #[serde(default)]
    pub smbios_strings: Vec<String>,
    /// Whether there is a (plain VGA) video card, though nobody sees its picture. Some boot
    /// loaders and Windows want one.
    #[serde(default = "yes")]
    pub video: bool,
    /// Whether QEMU's system-call filter is on. Turn off only for a QEMU built without it.
    #[serde(default = "yes")]
    pub sandbox: bool,
}

fn yes() -> bool {
    true
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor itself. Only after [`super::accel::probe`] has proven it.
    Kvm,
    /// QEMU's emulation: slow, works everywhere.
    Tcg,
}

/// The chipset of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chipset {
    /// Intel Q35 with PCI Express.
    #[default]
    Q35,
    /// Intel 440FX: for IDE disks and very old systems.
    Pc,
}

/// How the guest reads the hardware clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestClock {
    /// As UTC: Linux and the BSDs.
    #[default]
    Utc,
    /// As this host's local time: Windows.
    Local,
}

/// The operator: a spec that no machine can be made from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not a usable name.
    #[error("machine name {0:?} is not 1 to 64 letters, digits, '.', '_' or '-'")]
    Name(String),
    /// A count or size out of range.
    #[error("{what} is {value}, not within {least} to {most}")]
    Range {
        /// What was counted.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
    /// A processor model that is more than a model.
    #[error("processor model {0:?} has characters no model has")]
    Cpu(String),
    /// Not a UUID.
    #[error("uuid {0:?} is not 8-4-4-4-12 hex digits")]
    Uuid(String),
    /// An SMBIOS string that is empty or has a zero byte or is too long.
    #[error("smbios string {0} is empty, too long or has a zero byte")]
    SmbiosString(usize),
    /// A path that cannot be told to QEMU.
    #[error("path {0:?} is not text")]
    PathNotText(PathBuf),
    /// A socket path that the kernel would cut.
    #[error("socket path {0:?} is longer than 107 bytes")]
    SocketPathTooLong(PathBuf),
    /// A disk serial number that not every bus could show.
    #[error("disk serial {0:?} is not 1 to 20 printable ascii characters")]
    DiskSerial(String),
    /// A sector size that no disk has, or that the bus cannot show.
    #[error("disk {disk} cannot have sectors of {sector_bytes} bytes on its bus")]
    SectorBytes {
        /// The disk, counted from 0.
        disk: usize,
        /// The size asked for.
        sector_bytes: u32,
    },
    /// More disks than the bus has places.
    #[error("a {bus:?} bus has places for {places} disks, not {disks}")]
    BusFull {
        /// The bus.
        bus: Bus,
        /// How many it takes.
        places: usize,
        /// How many were asked for.
        disks: usize,
    },
    /// IDE on a chipset without it.
    #[error("an ide disk needs the chipset pc")]
    IdeNeedsPc,
    /// A read-only disk where the bus has no such thing.
    #[error("disk {0} cannot be read-only on its bus")]
    ReadOnly(usize),
    /// Debian's OVMF has no driver for the bus of the first disk.
    #[error("uefi cannot boot from pvscsi (the firmware has no driver); use scsi or virtio")]
    UefiOnPvscsi,
    /// UEFI without its files.
    #[error("a uefi machine needs the firmware's code")]
    NoFirmwareCode,
}

impl MachineSpec {
    /// The arguments for QEMU (without the program itself), to be started in the run directory.
    ///
    /// `uefi_code` is the firmware's code; a BIOS machine does not look at it.
    ///
    /// # Errors
    /// [`SpecError`] when no machine can be made from the spec.
    pub fn arguments(&self, uefi_code: Option<&Path>) -> Result<Vec<OsString>, SpecError> {
        self.check()?;
        let mut line = Line::default();
        line.option("-name", format!("guest={}", self.name));
        line.flag("-no-user-config");
        line.flag("-nodefaults");
        line.option("-display", "none");
        line.option("-msg", "timestamp=on");
        if self.sandbox {
            line.option("-sandbox", self.sandbox_argument());
        }
        self.processor_and_memory(&mut line);
        self.firmware_arguments(&mut line, uefi_code)?;
        line.option("-boot", "strict=on,menu=off");
        line.option("-rtc", self.clock_argument());
        line.option("-chardev", format!("socket,id=qmp,path={QMP_SOCKET},server=on,wait=off"));
        line.option("-mon", "chardev=qmp,mode=control");
        line.option("-chardev", format!("file,id=serial,path={SERIAL_LOG},append=on"));
        line.option("-serial", "chardev:serial");
        line.object("-object", &json!({"qom-type": "rng-builtin", "id": "entropy"}));
        line.object("-device", &json!({"driver": "virtio-rng-pci", "rng": "entropy"}));
        if self.video {
            line.object("-device", &json!({"driver": "VGA"}));
        }
        self.disk_arguments(&mut line)?;
        for (index, nic) in self.nics.iter().enumerate() {
            let (netdev, device) = nic.arguments(index);
            line.option("-netdev", netdev);
            line.object("-device", &device);
        }
        Ok(line.0)
    }

    /// The name, in the run directory, of the file that holds the SMBIOS string at `index`.
    #[must_use]
    pub fn smbios_file(index: usize) -> String {
        format!("smbios-{index}")
    }

    /// Refuses what cannot be started, before anything is.
    fn check(&self) -> Result<(), SpecError> {
        if !(1..=64).contains(&self.name.len()) || !self.name.chars().all(word) {
            return Err(SpecError::Name(self.name.clone()));
        }
        range("the number of processors", u64::from(self.vcpus), 1, 255)?;
        range("memory in MiB", u64::from(self.memory_mib), 16, 16 << 20)?;
        range("the number of disks", self.disks.len() as u64, 0, DISKS_MAX as u64)?;
        range("the number of network cards", self.nics.len() as u64, 0, NICS_MAX as u64)?;
        let strings = self.smbios_strings.len() as u64;
        range("the number of smbios strings", strings, 0, SMBIOS_STRINGS_MAX as u64)?;
        for (index, text) in self.smbios_strings.iter().enumerate() {
            if !(1..=SMBIOS_STRING_BYTES_MAX).contains(&text.len()) || text.contains('\0') {
                return Err(SpecError::SmbiosString(index));
            }
        }
        if let Some(cpu) = &self.cpu {
            // Features ("max,la57=off") are welcome, other options and spaces are not.
            let known = |c: char| word(c) || matches!(c, ',' | '=' | '+');
            if cpu.is_empty() || !cpu.chars().all(known) {
                return Err(SpecError::Cpu(cpu.clone()));
            }
        }
        if let Some(uuid) = &self.uuid
            && !is_uuid(uuid)
        {
            return Err(SpecError::Uuid(uuid.clone()));
        }
        self.check_disks()
    }

    fn check_disks(&self) -> Result<(), SpecError> {
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check(index, self.chipset)?;
        }
        for bus in [Bus::Sata, Bus::Ide] {
            let disks = self.disks.iter().filter(|disk| disk.bus == bus).count();
            let places = if bus == Bus::Ide { 4 } else { 6 };
            if disks > places {
                return Err(SpecError::BusFull { bus, places, disks });
            }
        }
        let first_bus = self.disks.first().map(|disk| disk.bus);
        if self.firmware == Firmware::Uefi && first_bus == Some(Bus::Pvscsi) {
            return Err(SpecError::UefiOnPvscsi);
        }
        Ok(())
    }

    /// The bridge helper is a program that QEMU starts and that gains privileges; only a machine
    /// with such a card may.
    fn sandbox_argument(&self) -> String {
        let helper = if self.nics.iter().any(Nic::needs_helper) { "allow" } else { "deny" };
        format!("on,obsolete=deny,elevateprivileges={helper},spawn={helper},resourcecontrol=deny")
    }

    fn processor_and_memory(&self, line: &mut Line) {
        let (accel, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg => ("tcg,thread=multi", "max"),
        };
        line.option("-accel", accel);
        line.option("-cpu", self.cpu.as_deref().unwrap_or(cpu));
        line.option("-smp", format!("cpus={}", self.vcpus));
        line.option("-m", format!("size={}M", self.memory_mib));
        if let Some(uuid) = &self.uuid {
            line.option("-uuid", uuid);
        }
        for index in 0..self.smbios_strings.len() {
            line.option("-smbios", format!("type=11,path={}", Self::smbios_file(index)));
        }
    }

    fn firmware_arguments(
        &self,
        line: &mut Line,
        uefi_code: Option<&Path>,
    ) -> Result<(), SpecError> {
        let chipset = match self.chipset {
            Chipset::Q35 => "q35",
            Chipset::Pc => "pc",
        };
        // A core dump of QEMU must not hold the guest's memory.
        let machine = format!("{chipset},dump-guest-core=off");
        match self.firmware {
            Firmware::Bios => line.option("-machine", machine),
            Firmware::Uefi => {
                let code = text(uefi_code.ok_or(SpecError::NoFirmwareCode)?)?;
                for (node, file, read_only) in
                    [("uefi-code", code, true), ("uefi-variables", UEFI_VARIABLES, false)]
                {
                    line.object(
                        "-blockdev",
                        &json!({
                            "driver": "file", "node-name": node, "filename": file,
                            "read-only": read_only,
                        }),
                    );
                }
                line.option(
                    "-machine",
                    format!("{machine},pflash0=uefi-code,pflash1=uefi-variables"),
                );
            }
        }
        Ok(())
    }

    fn clock_argument(&self) -> &'static str {
        match self.clock {
            GuestClock::Utc => "base=utc,clock=host,driftfix=slew",
            GuestClock::Local => "base=localtime,clock=host,driftfix=slew",
        }
    }

    fn disk_arguments(&self, line: &mut Line) -> Result<(), SpecError> {
        for (bus, controller) in
            [(Bus::Scsi, "virtio-scsi-pci"), (Bus::Pvscsi, "pvscsi"), (Bus::Sata, "ich9-ahci")]
        {
            let built_in = bus == Bus::Sata && self.chipset == Chipset::Q35;
            if !built_in && self.disks.iter().any(|disk| disk.bus == bus) {
                line.object("-device", &json!({"driver": controller, "id": controller}));
            }
        }
        let mut taken = [0_usize; 6];
        for (index, disk) in self.disks.iter().enumerate() {
            line.object("-blockdev", &disk.node(index)?);
            let place = taken.get_mut(disk.bus as usize).map_or(0, |next| {
                *next += 1;
                *next - 1
            });
            line.object("-device", &disk.device(index, place, self.chipset));
        }
        Ok(())
    }
}

/// The arguments as they grow.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn object(&mut self, name: &str, value: &Value) {
        self.option(name, value.to_string());
    }
}

fn word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn is_uuid(text: &str) -> bool {
    let lengths = text.split('-').map(str::len);
    lengths.eq([8, 4, 4, 4, 12]) && text.chars().all(|c| c == '-' || c.is_ascii_hexdigit())
}

fn range(what: &'static str, value: u64, least: u64, most: u64) -> Result<(), SpecError> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(SpecError::Range { what, value, least, most })
    }
}

fn text(path: &Path) -> Result<&str, SpecError> {
    path.to_str().ok_or_else(|| SpecError::PathNotText(path.to_owned()))
}

#[cfg(test)]
mod tests;
