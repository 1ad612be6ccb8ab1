//! The emulated guest: how it is made, started and killed.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tokio::process::Child;

use crate::console::{Console, Source};

/// Memory of the guest in MiB; its initramfs takes some 60.
const MEMORY_MIB: u32 = 384;

/// The port of the node's NBD listener in the guest.
const NBD_PORT: u16 = 10809;

/// Kernel and initramfs.
pub(crate) struct Images {
    folder: PathBuf,
}

impl Images {
    /// Makes them, with the srn binary of this build.
    pub(crate) fn make(folder: &Path) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest.sh");
        let output = Command::new(&script).arg(srn()).arg(folder).output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{} failed: {said}", script.display());
        Self { folder: folder.to_owned() }
    }
}

/// The binary under test: `$SRN`, or the one of the profile that this test was built with.
fn srn() -> PathBuf {
    if let Some(path) = std::env::var_os("SRN") {
        return path.into();
    }
    let own = std::env::current_exe().unwrap();
    // target/PROFILE/deps/power-HASH
    let path = own.ancestors().nth(2).unwrap().join("srn");
    assert!(
        path.is_file(),
        "there is no {}: build it with cargo build -p srn, or name one in SRN",
        path.display()
    );
    path
}

/// A running guest. Killed when dropped, and when the test's process ends.
pub(crate) struct Guest {
    child: Child,
    pub(crate) console: Console,
    /// The port of this machine that leads to the node's NBD listener.
    pub(crate) port: u16,
}

impl Guest {
    /// Starts one whose state disk is served on `disk`. Must be called within a tokio runtime.
    pub(crate) fn start(images: &Images, disk: &Path, settings: &str) -> Self {
        let port = free_port();
        let mut command = tokio::process::Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m"]);
        command.arg(MEMORY_MIB.to_string());
        command.arg("-kernel").arg(images.folder.join("vmlinuz"));
        command.arg("-initrd").arg(images.folder.join("initrd"));
        // Warnings are heard, a panic ends the guest.
        command.args(["-append", &format!("console=ttyS0 loglevel=5 panic=-1 {settings}")]);
        command.args(["-serial", "stdio"]);
        command.arg("-netdev");
        command.arg(format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{NBD_PORT}"));
        command.args(["-device", "virtio-net-pci,netdev=net"]);
        command.arg("-blockdev").arg(format!(
            "driver=nbd,node-name=state,server.type=unix,server.path={},cache.direct=on,\
             cache.no-flush=off,discard=unmap",
            disk.display()
        ));
        command.args(["-device", "virtio-blk-pci,drive=state"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("setpriv: {error}: install the package util-linux"));
        let sources: [Source; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        Self { child, console: Console::listen(sources), port }
    }

    /// Kills it, and hears what it said until then.
    pub(crate) async fn kill(mut self) -> Console {
        self.child.kill().await.unwrap();
        self.console.end().await;
        self.console
    }
}

/// A port that nobody listens on; QEMU says so if somebody is faster.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|socket| socket.local_addr()).unwrap().port()
}
