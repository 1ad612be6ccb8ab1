//! A machine that was started by a daemon which is gone.

use std::process::Command;

use srn_targets::qemu::process::Exit;
use srn_targets::qemu::run::{self, Machine, Status, Stopped};

use crate::support::{Guarded, Lab, PATIENCE, READY, host};

/// Set for the process that plays the first daemon: where the machine's spec and folder are.
const FIRST_DAEMON: &str = "SRN_TEST_FIRST_DAEMON";

/// Not a test by itself: the part of the first daemon, run by the tests below in a process of its
/// own that then ends. Does nothing when run otherwise.
#[tokio::test]
#[ignore = "run by the tests of this file"]
async fn the_first_daemon() {
    let Some(folder) = std::env::var_os(FIRST_DAEMON) else { return };
    let folder = std::path::Path::new(&folder);
    let spec = std::fs::read(folder.join("spec.json")).unwrap();
    let spec = serde_json::from_slice(&spec).unwrap();
    Machine::start(&host(), &spec, &folder.join("machine")).await.unwrap();
}

/// Starts a machine in another process, and takes it over when that has ended.
fn taken_over(lab: &Lab, spec: &srn_targets::qemu::machine::MachineSpec) -> Guarded {
    std::fs::write(lab.path("spec.json"), serde_json::to_vec(spec).unwrap()).unwrap();
    let mut first = Command::new(std::env::current_exe().unwrap());
    first.args(["--exact", "stranger::the_first_daemon", "--ignored", "--nocapture"]);
    let output = first.env(FIRST_DAEMON, lab.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    lab.adopt()
}

#[tokio::test]
async fn it_is_adopted_and_powered_down() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = taken_over(&lab, &spec);
    assert_eq!(machine.record().spec, spec);
    machine.says(READY).await;
    assert_eq!(machine.status().await.unwrap(), Status::Running);
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::PoweredDown);
    // Nobody tells how a process ended that is not one's child.
    let gone = machine.status().await.unwrap();
    assert!(matches!(gone, Status::Gone { .. }), "{gone:?}");
    assert_eq!(machine.record().ended.unwrap().exit, Exit::Unknown);
    run::remove(&lab.path("machine")).unwrap();
}

#[tokio::test]
async fn its_death_is_noticed() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = taken_over(&lab, &spec);
    let pid = machine.pid().unwrap();
    let (ended, _) = tokio::join!(machine.ended(), async {
        crate::support::run("procps", "kill", &["-9", &pid.to_string()])
    });
    assert!(matches!(ended.unwrap(), Status::Gone { .. }));
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::Already);
    let again = lab.adopt();
    assert!(matches!(again.status().await.unwrap(), Status::Gone { .. }));
}
