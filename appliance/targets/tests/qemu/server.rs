//! A real Debian server: the demo server of `tests/server`, whose console tells what it has kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use srn_targets::qemu::machine::MachineSpec;
use srn_targets::qemu::probe::Sign;
use srn_targets::qemu::process::Process;
use srn_targets::qemu::run::{Status, Stopped};

use crate::firmware::decide;
use crate::support::{Guarded, Lab, NbdServer, run, spec};

/// A server boots in a quarter of a minute under emulation; this one may share the machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Tells the server, through SMBIOS, to report and power off.
const READ_ONLY: &str = "io.systemd.credential:srn.readonly=1";

#[tokio::test]
#[ignore = "needs a disk made by tests/server/build.sh, named in SRN_DEMO_DISK"]
async fn a_server_that_lost_power_has_all_it_announced() {
    let lab = Lab::new();
    let (_server, spec) = demo_server(&lab);
    let machine = lab.start(&spec).await;
    says(&machine, "SRN-SERVER ready").await;
    let announced = number_after("last=", &line_with(&machine, "SRN-SERVER found")) + 30;
    says(&machine, &format!("SRN-SERVER synced {announced} ")).await;
    Process::find(&machine.record().process.unwrap()).unwrap().unwrap().kill().unwrap();
    machine.ended().await.unwrap();
    srn_targets::qemu::run::remove(&lab.path("machine")).unwrap();

    let spec = MachineSpec { smbios_strings: vec![READ_ONLY.to_owned()], ..spec };
    let machine = lab.start(&spec).await;
    let ended = tokio::time::timeout(PATIENCE, machine.ended()).await.unwrap().unwrap();
    assert!(matches!(ended, Status::Exited { .. }), "it powers itself off: {ended:?}");
    let found = line_with(&machine, "SRN-SERVER found");
    assert!(found.contains("intact=yes"), "{found}");
    assert!(number_after("last=", &found) >= announced, "{found}");
}

#[tokio::test]
#[ignore = "needs a disk made by tests/server/build.sh, named in SRN_DEMO_DISK"]
async fn a_server_shuts_down_in_order_when_asked() {
    let lab = Lab::new();
    let (_server, spec) = demo_server(&lab);
    let machine = lab.start(&spec).await;
    says(&machine, "SRN-SERVER synced").await;
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::PoweredDown);
    says(&machine, "SRN-SERVER stopped").await;
}

/// A copy of the demo disk, served, and a machine with the firmware it wants.
fn demo_server(lab: &Lab) -> (NbdServer, MachineSpec) {
    let disk = std::env::var_os("SRN_DEMO_DISK").map(PathBuf::from);
    let disk = disk.expect("SRN_DEMO_DISK names a disk made by tests/server/build.sh");
    let copy = lab.path("demo.raw");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    run("coreutils", "cp", &["--sparse=always", &text(&disk), &text(&copy)]);
    let server = NbdServer::start(&copy, lab.path("demo.sock"), "demo");
    let spec = spec(decide(&copy).firmware, vec![server.disk()]);
    (server, MachineSpec { vcpus: 2, memory_mib: 512, ..spec })
}

fn number_after(words: &str, line: &str) -> u32 {
    line.split_once(words).unwrap().1.split(' ').next().unwrap().parse().unwrap()
}

async fn says(machine: &Guarded, text: &str) {
    let sign = Sign::Serial(text.to_owned());
    machine.probe(&[sign], PATIENCE).await.unwrap();
}

/// The first line of the console with this text, which something later has shown to be whole.
fn line_with(machine: &Guarded, text: &str) -> String {
    let log = std::fs::read(machine.serial_log()).unwrap();
    let log = String::from_utf8_lossy(&log);
    log.lines().find(|line| line.contains(text)).unwrap().to_owned()
}
