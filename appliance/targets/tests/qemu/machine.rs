//! A machine from its start to its removal, and everything that can come between.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use srn_targets::qemu::firmware::Firmware;
use srn_targets::qemu::host::Host;
use srn_targets::qemu::machine::{Disk, MachineSpec};
use srn_targets::qemu::network::{Forward, Network, Nic, NicModel};
use srn_targets::qemu::probe::{ProbeError, SerialTail, Sign};
use srn_targets::qemu::process::{Exit, Process};
use srn_targets::qemu::qmp::event::Kind;
use srn_targets::qemu::qmp::{Qmp, QmpError};
use srn_targets::qemu::run::{self, Machine, RunError, Status, Stopped};
use tokio::net::TcpListener;

use crate::support::{Lab, NbdServer, PATIENCE, READY, host, spec, until};

#[tokio::test]
async fn a_machine_runs_pauses_and_powers_down() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    assert_eq!(machine.says(READY).await.sign, 0);
    assert_eq!(machine.status().await.unwrap(), Status::Running);

    machine.monitor().await.unwrap().execute("stop", Value::Null).await.unwrap();
    let paused = Status::Paused { reason: "paused".to_owned() };
    assert_eq!(machine.status().await.unwrap(), paused);
    machine.resume().await.unwrap();
    assert_eq!(machine.status().await.unwrap(), Status::Running);

    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::PoweredDown);
    machine.says("SRN-GUEST power button").await;
    let ended = machine.status().await.unwrap();
    assert!(matches!(ended, Status::Exited { exit: Exit::Code(0), .. }), "{ended:?}");
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::Already);

    // What was seen stays known to whoever comes later.
    assert_eq!(lab.adopt().status().await.unwrap(), ended);
    run::remove(&lab.path("machine")).unwrap();
    assert!(!lab.path("machine").exists());
    run::remove(&lab.path("machine")).unwrap();
    assert!(matches!(Machine::adopt(&lab.path("machine")), Err(RunError::NoMachine(_))));
}

#[tokio::test]
async fn its_folder_is_private_and_taken() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    fs::create_dir(lab.path("machine")).unwrap();
    fs::write(lab.path("machine/daemon.sock"), "").unwrap();
    let machine = lab.start(&spec).await;
    let mode = |name: &str| fs::metadata(lab.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("machine"), 0o700);
    assert_eq!(mode("machine/smbios-0"), 0o600);
    assert_eq!(fs::read(lab.path("machine/smbios-0")).unwrap(), spec.smbios_strings[0].as_bytes());

    let again = Machine::start(&host(), &spec, &lab.path("machine")).await;
    assert!(matches!(again, Err(RunError::Taken(_))), "{again:?}");
    assert_eq!(machine.status().await.unwrap(), Status::Running, "the first is left alone");
    let removed = run::remove(&lab.path("machine"));
    assert!(matches!(removed, Err(RunError::StillRuns { .. })), "{removed:?}");
    assert!(matches!(run::remove(&lab.path("")), Err(RunError::NoMachine(_))));
}

#[tokio::test]
async fn a_killed_machine_is_noticed_at_once() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    let waiting = machine.ended();
    let killed = async {
        Process::find(&machine.record().process.unwrap()).unwrap().unwrap().kill().unwrap();
    };
    let (ended, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(waiting, killed) })
        .await
        .expect("the end is noticed");
    assert!(matches!(ended.unwrap(), Status::Exited { exit: Exit::Signal(9), .. }));
    let asked = async { machine.monitor().await?.query_status().await };
    let asked = asked.await;
    let lost = matches!(asked, Err(QmpError::Connect { .. } | QmpError::Lost { .. }));
    assert!(lost, "{asked:?}");
}

#[tokio::test]
async fn a_paused_machine_is_not_asked_to_power_down() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    machine.says(READY).await;
    machine.monitor().await.unwrap().execute("stop", Value::Null).await.unwrap();
    let hours = Duration::from_secs(7200);
    let stopped = tokio::time::timeout(PATIENCE, machine.stop(hours)).await;
    assert_eq!(stopped.expect("nobody waits for it").unwrap(), Stopped::Quit);
}

#[tokio::test]
async fn a_machine_that_hangs_is_silent_and_then_killed() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    let pid = machine.pid().unwrap();
    crate::support::run("procps", "kill", &["-STOP", &pid.to_string()]);
    let status = machine.status().await.unwrap();
    assert!(matches!(status, Status::Silent { .. }), "{status:?}");
    assert_eq!(machine.stop(Duration::ZERO).await.unwrap(), Stopped::Killed);
    let ended = machine.status().await.unwrap();
    assert!(matches!(ended, Status::Exited { exit: Exit::Signal(9), .. }), "{ended:?}");
}

#[tokio::test]
async fn a_start_that_fails_says_why_and_leaves_nothing() {
    let lab = Lab::new();
    let nowhere = spec(Firmware::Bios, vec![Disk::new(lab.path("nowhere.sock"), "disk")]);
    let error = lab.start_fails(&host(), &nowhere).await;
    let RunError::DidNotStart { exit: Exit::Code(1), last_words } = &error else {
        panic!("{error}")
    };
    assert!(last_words.join("\n").contains("Failed to connect"), "{error}");

    let (_server, spec) = lab.guest(false);
    let with = |program: &str| Host { qemu: PathBuf::from(program), ovmf: None };
    let error = lab.start_fails(&with("/nonexistent/qemu"), &spec).await;
    let said = "/nonexistent/qemu is missing: install the Debian package qemu-system-x86";
    assert_eq!(error.to_string(), said);
    let error = lab.start_fails(&with("/bin/false"), &spec).await;
    assert!(matches!(error, RunError::DidNotStart { exit: Exit::Code(1), .. }), "{error}");
    let error = lab.start_fails(&with("/etc/passwd"), &spec).await;
    assert!(matches!(error, RunError::Process { doing: "start", .. }), "{error}");

    let uefi = MachineSpec { firmware: Firmware::Uefi, ..spec };
    let error = lab.start_fails(&with("/bin/false"), &uefi).await;
    assert!(error.to_string().ends_with("install the Debian package ovmf"), "{error}");
}

#[tokio::test]
async fn the_daemon_may_die_before_it_knows_the_process() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    machine.says(READY).await;
    edit_record(&lab, |record| record["process"] = Value::Null);
    let adopted = lab.adopt();
    assert_eq!(adopted.pid(), machine.pid());
    assert_eq!(adopted.record().process, machine.record().process, "and written down now");
    // The first one holds the monitor; after a restart there is no first one any more.
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::PoweredDown);
    assert!(matches!(adopted.status().await.unwrap(), Status::Gone { .. }));
}

#[tokio::test]
async fn a_number_that_passed_to_another_process_is_not_touched() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    edit_record(&lab, |record| record["process"]["start_ticks"] = json!(1));
    let stale = lab.adopt();
    assert!(matches!(stale.status().await.unwrap(), Status::Gone { .. }));
    assert_eq!(stale.stop(PATIENCE).await.unwrap(), Stopped::Already);
    assert_eq!(machine.status().await.unwrap(), Status::Running, "left alone");
}

#[tokio::test]
async fn a_record_that_cannot_be_understood_is_refused() {
    let lab = Lab::new();
    fs::create_dir(lab.path("machine")).unwrap();
    let huge = " ".repeat(2 << 20);
    for text in ["", "{", "[]", r#"{"version":2}"#, huge.as_str()] {
        fs::write(lab.path("machine/machine.json"), text).unwrap();
        let adopted = Machine::adopt(&lab.path("machine"));
        assert!(matches!(adopted, Err(RunError::Record { .. })), "{adopted:?}");
        assert!(run::remove(&lab.path("machine")).is_err(), "nothing is removed on a guess");
    }
}

fn edit_record(lab: &Lab, edit: impl FnOnce(&mut Value)) {
    let path = lab.path("machine/machine.json");
    let mut record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut record);
    fs::write(path, record.to_string()).unwrap();
}

#[tokio::test]
async fn a_machine_without_room_pauses_and_goes_on() {
    let lab = Lab::new();
    let (server, mut spec) = lab.guest(true);
    spec.disks[0].reconnect_delay_seconds = 1;
    let machine = lab.start(&spec).await;
    machine.writes_on().await;
    let mut events = machine.monitor().await.unwrap().events();
    drop(server);
    let event = events.wait_for(PATIENCE, |kind| matches!(kind, Kind::IoError { .. })).await;
    let Kind::IoError { node, operation, action, .. } = event.unwrap().kind() else { panic!() };
    assert_eq!(node.as_deref(), Some("disk0"));
    assert_eq!((operation.as_str(), action.as_str()), ("write", "stop"));
    let paused = Status::Paused { reason: "io-error".to_owned() };
    assert!(until(async || machine.status().await.unwrap() == paused).await);
    let _server = NbdServer::start(&lab.path("disk.raw"), lab.path("disk.sock"), "disk");
    // The node's connection comes back in its own time; until then the machine pauses again.
    let runs = until(async || {
        machine.resume().await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), machine.writes_on()).await.is_ok()
    });
    assert!(runs.await);
}

#[tokio::test]
async fn a_restarted_server_is_not_noticed_by_the_guest() {
    let lab = Lab::new();
    let (server, spec) = lab.guest(true);
    let machine = lab.start(&spec).await;
    machine.writes_on().await;
    drop(server);
    let _server = NbdServer::start(&lab.path("disk.raw"), lab.path("disk.sock"), "disk");
    machine.writes_on().await;
    assert_eq!(machine.status().await.unwrap(), Status::Running);
}

#[tokio::test]
async fn the_monitor_has_one_client_at_a_time() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    machine.monitor().await.unwrap();
    let socket = lab.path("machine/qmp.sock");
    let second = Qmp::connect(&socket, Duration::from_millis(300)).await;
    assert!(matches!(second, Err(QmpError::NoGreeting { .. })), "{second:?}");
}

#[tokio::test]
async fn probes_end_with_an_answer_a_deadline_or_the_machine() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(false);
    let machine = lab.start(&spec).await;
    machine.says(READY).await;

    let never = Sign::Serial("never said".to_owned());
    let late = machine.probe(std::slice::from_ref(&never), Duration::from_millis(300)).await;
    let Err(ProbeError::Deadline { last_line, .. }) = late else { panic!("{late:?}") };
    assert_eq!(last_line, READY);
    assert!(matches!(machine.probe(&[], PATIENCE).await, Err(ProbeError::NoSign)));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = Sign::Tcp { address, send: None, expect: None };
    let answer = machine.probe(&[never.clone(), service], PATIENCE).await.unwrap();
    assert_eq!(answer.sign, 1);

    let signs = [never];
    let (probed, stopped) = tokio::join!(machine.probe(&signs, PATIENCE), machine.stop(PATIENCE));
    assert_eq!(stopped.unwrap(), Stopped::PoweredDown);
    assert!(matches!(probed, Err(ProbeError::Ended(Status::Exited { .. }))), "{probed:?}");
    // What was said before the end is still an answer.
    machine.says(READY).await;
}

#[tokio::test]
async fn a_serial_log_gives_its_space_back() {
    let lab = Lab::new();
    let (_server, spec) = lab.guest(true);
    let machine = lab.start(&spec).await;
    machine.says(READY).await;
    let log = machine.serial_log();
    let mut file = fs::OpenOptions::new().append(true).open(&log).unwrap();
    std::io::Write::write_all(&mut file, &vec![b'x'; 1 << 20]).unwrap();
    file.sync_all().unwrap();
    let mut tail = SerialTail::new(log.clone());
    assert_eq!(tail.find(&[(0, "never")]).unwrap(), None);

    machine.trim_serial_log(64 << 10).unwrap();
    let kept = fs::metadata(&log).unwrap();
    assert!(kept.len() > 1 << 20, "offsets stay");
    assert!(kept.blocks() * 512 < 256 << 10, "{} blocks", kept.blocks());
    machine.writes_on().await;
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), Stopped::PoweredDown);
    assert!(tail.find(&[(0, "power button")]).unwrap().is_some(), "a reader goes on where it was");
}

#[tokio::test]
async fn a_forwarded_port_reaches_qemu() {
    let lab = Lab::new();
    let (_server, mut spec) = lab.guest(false);
    // A port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let host_address = "127.0.0.1".parse().unwrap();
    let forward = Forward { host_address, host_port: free.port(), guest_port: 22 };
    let network = Network::User { restrict: true, forwards: vec![forward] };
    let mac = Some("52:54:00:00:00:07".parse().unwrap());
    spec.nics = [NicModel::Virtio, NicModel::E1000, NicModel::E1000e, NicModel::Vmxnet3]
        .map(|model| Nic { network: "user,restrict".parse().unwrap(), model, mac: None })
        .to_vec();
    spec.nics[0] = Nic { network, model: NicModel::Virtio, mac };
    let machine = lab.start(&spec).await;
    let address = free.to_string();
    let open = Sign::Tcp { address: address.clone(), send: None, expect: None };
    machine.probe(&[open], PATIENCE).await.unwrap();
    // QEMU accepts before the guest does: only words prove a service.
    let ssh = Sign::Tcp { address, send: None, expect: Some("SSH-2.0".to_owned()) };
    let silent = machine.probe(&[ssh], Duration::from_millis(500)).await;
    assert!(matches!(silent, Err(ProbeError::Deadline { .. })), "{silent:?}");
}
