//! The vocabulary of these tests: guests, served disks, machines that do not outlive their test.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use srn_targets::qemu::firmware::Firmware;
use srn_targets::qemu::host::Host;
use srn_targets::qemu::machine::{Accelerator, Chipset, Disk, GuestClock, MachineSpec};
use srn_targets::qemu::probe::{self, Answer, ProbeError, SerialTail, Sign};
use srn_targets::qemu::run::{Machine, RunError};
use tempfile::TempDir;
use tokio::time::Instant;

/// No step of these tests takes longer; most take a tenth of a second.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the guests say.
pub(crate) const READY: &str = "SRN-GUEST ready";
pub(crate) const FROM_UEFI: &str = "SRN-GUEST from uefi";

pub(crate) fn host() -> Host {
    Host::find().unwrap_or_else(|missing| panic!("{missing}"))
}

/// Runs a program to its end; fails with the Debian package that has it.
#[track_caller]
pub(crate) fn run(package: &str, program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output
        .unwrap_or_else(|error| panic!("{program}: {error}; install the Debian package {package}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {words}");
    output.stdout
}

/// A folder of the test's own, with all its machines and disks below.
pub(crate) struct Lab {
    folder: TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(name)
    }

    /// One of the sources beside this file, as machine code.
    pub(crate) fn assemble(&self, source: &str, bits: &str) -> Vec<u8> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qemu").join(source);
        let (object, binary) = (self.path("object"), self.path("binary"));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        run("binutils", "as", &[bits, "-o", &text(&object), &text(&source)]);
        let copy = ["-O", "binary", "-j", ".text", &text(&object), &text(&binary)];
        run("binutils", "objcopy", &copy);
        fs::read(binary).unwrap()
    }

    /// A raw disk of 4 MiB that boots the guest of `guest.S`.
    pub(crate) fn guest_disk(&self, name: &str, writes: bool) -> PathBuf {
        let mut sector = self.assemble("guest.S", "--32");
        assert_eq!(sector.len(), 512);
        sector[509] = u8::from(writes);
        sector.resize(4 << 20, 0);
        let path = self.path(name);
        fs::write(&path, sector).unwrap();
        path
    }

    /// A served disk with that guest, and the machine's spec for it.
    pub(crate) fn guest(&self, writes: bool) -> (NbdServer, MachineSpec) {
        let disk = self.guest_disk("disk.raw", writes);
        let server = NbdServer::start(&disk, self.path("disk.sock"), "disk");
        let spec = spec(Firmware::Bios, vec![server.disk()]);
        (server, spec)
    }

    pub(crate) async fn start(&self, spec: &MachineSpec) -> Guarded {
        let started = Machine::start(&host(), spec, &self.path("machine")).await;
        Guarded(started.unwrap())
    }

    pub(crate) async fn start_fails(&self, host: &Host, spec: &MachineSpec) -> RunError {
        let folder = self.path("machine");
        match Machine::start(host, spec, &folder).await {
            Ok(machine) => {
                drop(Guarded(machine));
                panic!("it started")
            }
            Err(error) => {
                let left = fs::read_dir(&folder).map(Iterator::count).unwrap_or(0);
                assert_eq!(left, 0, "nothing is left of it");
                error
            }
        }
    }

    /// The machine of this lab as a daemon that was restarted gets it.
    pub(crate) fn adopt(&self) -> Guarded {
        Guarded(Machine::adopt(&self.path("machine")).unwrap())
    }
}

pub(crate) fn spec(firmware: Firmware, disks: Vec<Disk>) -> MachineSpec {
    MachineSpec {
        name: "test".to_owned(),
        vcpus: 1,
        memory_mib: 64,
        firmware,
        accelerator: Accelerator::Tcg,
        chipset: Chipset::Q35,
        cpu: None,
        disks,
        nics: Vec::new(),
        clock: GuestClock::Utc,
        uuid: Some("5ad00d5a-0000-4000-8000-00000000cafe".to_owned()),
        smbios_strings: vec!["io.systemd.credential:srn.test=1".to_owned()],
        video: true,
        sandbox: true,
    }
}

/// A machine that is killed with its test, whatever happens.
pub(crate) struct Guarded(pub(crate) Machine);

impl std::ops::Deref for Guarded {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Only while it still is what we started: an ended machine's id may be somebody else's.
        let record = self.0.record();
        if let Some(identity) = record.process.filter(|_| record.ended.is_none())
            && let Ok(Some(process)) = srn_targets::qemu::process::Process::find(&identity)
        {
            process.kill().unwrap();
        }
    }
}

impl Guarded {
    pub(crate) async fn says(&self, text: &str) -> Answer {
        let sign = Sign::Serial(text.to_owned());
        probe::wait(&self.0, &[sign], PATIENCE).await.unwrap_or_else(|error| {
            let log = fs::read(self.0.serial_log()).unwrap_or_default();
            panic!("{error}; console: {:?}", String::from_utf8_lossy(&log))
        })
    }

    pub(crate) async fn probe(
        &self,
        signs: &[Sign],
        deadline: Duration,
    ) -> Result<Answer, ProbeError> {
        probe::wait(&self.0, signs, deadline).await
    }

    /// Waits until the writing guest has written on for some rounds from now.
    pub(crate) async fn writes_on(&self) {
        let said = || fs::metadata(self.0.serial_log()).unwrap().len();
        let enough = said() + 5;
        let wrote = until(async || said() >= enough).await;
        assert!(wrote, "the guest does not write");
        let mut tail = SerialTail::new(self.0.serial_log());
        assert_eq!(tail.find(&[(0, "error")]).unwrap(), None);
    }
}

/// Waits for a condition; false at the deadline.
pub(crate) async fn until(mut condition: impl AsyncFnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

/// A disk image served by `qemu-nbd` until dropped.
pub(crate) struct NbdServer {
    child: Child,
    socket: PathBuf,
    export: String,
}

impl NbdServer {
    pub(crate) fn start(image: &Path, socket: PathBuf, export: &str) -> Self {
        drop(fs::remove_file(&socket));
        let words = socket.with_extension("log");
        let log = fs::File::create(&words).unwrap();
        let child = Command::new("qemu-nbd")
            .args(["--format=raw", "--persistent", "--shared=4", "--discard=unmap"])
            .args(["--export-name", export, "--socket"])
            .args([&socket, image])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("qemu-nbd: {e}; install the Debian package qemu-utils"));
        let server = Self { child, socket, export: export.to_owned() };
        let deadline = std::time::Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            let late = std::time::Instant::now() > deadline;
            assert!(!late, "qemu-nbd does not listen: {:?}", fs::read_to_string(&words));
            std::thread::yield_now();
        }
        server
    }

    pub(crate) fn disk(&self) -> Disk {
        Disk::new(&self.socket, self.export.as_str())
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
