//! The device of a machine in QEMU that has no NBD server: one is there for each pass, and no longer.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use srn_e2e::{Lab, PATIENCE, wait_for};
use srn_targets::qemu::qmp::Qmp;
use tokio::process::Command;

use crate::server::{GROUP, passed, protect, pull, recovered, same};

const SIZE: usize = 4 << 20;

#[tokio::test]
async fn a_machine_s_device_is_pulled_through_a_server_of_its_own() {
    let lab = Lab::new();
    let (disk, scratch) = (lab.path("disk.raw"), lab.path("scratch"));
    let (qmp, own, socket) = (lab.path("qmp"), lab.path("own"), lab.path("nbd"));
    std::fs::write(&disk, vec![1; SIZE]).expect("room");
    std::fs::create_dir(&scratch).expect("a directory");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-S"]);
    for monitor in [&qmp, &own] {
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
    }
    command.args(["-object", "iothread,id=thread", "-blockdev"]);
    command.arg(format!(
        "driver=raw,node-name=disk0,file.driver=file,file.filename={}",
        disk.display()
    ));
    let device = "virtio-blk-pci,id=root,drive=disk0,iothread=thread,share-rw=on";
    command.args(["-device", device]).stdin(Stdio::null()).stdout(Stdio::null());
    let _server = command.kill_on_drop(true).spawn().expect("QEMU");
    let monitor = wait_for("QEMU answers", PATIENCE, async || {
        Qmp::connect(&own, Duration::from_secs(5)).await.ok()
    });
    let monitor = monitor.await;
    let write = async |what: &str| {
        let line = format!("qemu-io -d /machine/peripheral/root/virtio-backend \"{what}\"");
        let ran = monitor.execute("human-monitor-command", json!({"command-line": line})).await;
        assert_eq!(ran.expect("it runs"), "", "{what}");
    };

    let (mut production, recovery) = lab.pair().await;
    protect(&production, "cache", &[]).await;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let (qmp, scratch) = (qmp.display().to_string(), scratch.display().to_string());
    let add = ["disk", "add", GROUP, "root", "--pull", &uri, "--qmp", &qmp, "--node", "root"];
    let rest = ["--scratch", &scratch, "--every", "1s", "--wait"];
    let _ = production.srn(&[&add[..], &rest[..]].concat()).await.done();
    same(&recovered(&lab, &recovery).await, &std::fs::read(&disk).expect("it"));
    // A machine that stands still is written by its monitor all the same.
    write("write -P 2 64k 64k").await;
    write("write -z 2M 1M").await;
    write("flush").await;
    let last = passed(&production).await;
    assert_eq!(last["kind"], "changes", "{last}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &std::fs::read(&disk).expect("it"));
    // Between two passes nobody listens.
    wait_for("its server has ended", PATIENCE, async || {
        tokio::net::UnixStream::connect(&socket).await.is_err().then_some(())
    })
    .await;
    assert!(std::fs::read_dir(&scratch).expect("it").next().is_none(), "a file is left");
    let group = production.group(GROUP).await;
    assert!(pull(&group)["failed"].is_null() && group["safe"] == true, "{group}");
    production.expect_in_log("the group was deleted here");
    let _ = production.srn(&["group", "delete", GROUP, "--yes"]).await.done();
    let bitmaps = monitor.bitmaps("disk0").await.expect("an answer");
    assert_eq!(bitmaps, [], "something is left");
}
