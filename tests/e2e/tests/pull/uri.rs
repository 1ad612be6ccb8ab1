//! Passes over an export of which nothing is known but its content.

use std::path::Path;

use serde_json::Value;
use srn_e2e::{Lab, PATIENCE, wait_for};
use tokio::process::{Child, Command};

use crate::server::{GROUP, passed, protect, pull, recovered, same};

const SIZE: usize = 4 << 20;

/// nbdkit over a file; reads fail while `fails` is there.
async fn nbdkit(lab: &Lab, file: &Path, fails: &Path) -> (Child, String) {
    let socket = lab.path("nbdkit");
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
    command.args(["--readonly", "--filter=error", "file"]).arg(file);
    command.args(["error-pread=EIO", "error-pread-rate=100%"]);
    command.arg(format!("error-file={}", fails.display()));
    let server = command.kill_on_drop(true).spawn().expect("nbdkit");
    wait_for("nbdkit listens", PATIENCE, async || socket.exists().then_some(())).await;
    (server, format!("nbd+unix:///?socket={}", socket.display()))
}

#[tokio::test]
async fn everything_is_compared_and_what_cannot_be_read_is_tried_again() {
    let lab = Lab::new();
    let (file, fails) = (lab.path("disk"), lab.path("fails"));
    let mut content: Vec<u8> = (0..SIZE as u32 / 4).flat_map(|at| (at | 1).to_le_bytes()).collect();
    std::fs::write(&file, &content).expect("room");
    let (_server, uri) = nbdkit(&lab, &file, &fails).await;
    let (mut production, mut recovery) = lab.pair().await;
    protect(&production, "replica", &[]).await;
    let add = ["disk", "add", GROUP, "root", "--pull", &uri, "--every", "1s", "--wait"];
    let _ = production.srn(&add).await.done();
    same(&recovered(&lab, &recovery).await, &content);

    // Changed where nothing is read: by the promise, between two passes. One that met it in the middle
    // is followed by another.
    content[1 << 20..][..4096].fill(7);
    content[2 << 20..][..65536].fill(0);
    std::fs::write(&file, &content).expect("room");
    passed(&production).await;
    let last = passed(&production).await;
    assert_eq!((&last["kind"], &last["new"]), (&"everything".into(), &0.into()), "{last}");
    production.in_step(GROUP).await;
    same(&recovered(&lab, &recovery).await, &content);
    let written = production.group(GROUP).await["link"]["content_written"].as_u64().expect("it");
    assert!(written <= SIZE as u64 + (68 << 10), "{written} bytes for 68 KiB");

    production.expect_in_log("pulling disk root");
    production.expect_in_log("failed: ");
    recovery.expect_in_log("failed: ");
    std::fs::write(&fails, "").expect("room");
    let failed = |group: &Value| group["state"] == "failed";
    let group = production.group_until(GROUP, "it is told", failed).await;
    let why = pull(&group)["failed"].as_str().expect("words").to_owned();
    assert!(why.contains("reading the server") && why.contains("read 1048576 bytes at"), "{why}");
    let said = production.srn(&["status"]).await.done().out;
    assert!(said.starts_with("NOT SAFE because") && said.contains("the last one failed"), "{said}");
    same(&recovered(&lab, &recovery).await, &content);
    std::fs::remove_file(&fails).expect("it was there");
    passed(&production).await;
    production.in_step(GROUP).await;
    let said = production.srn(&["status"]).await.done().out;
    assert!(said.starts_with("SAFE") && said.contains("read every 1s from nbd+unix"), "{said}");
}

#[tokio::test]
async fn what_cannot_be_pulled_is_refused() {
    let lab = Lab::new();
    let (file, fails) = (lab.path("disk"), lab.path("fails"));
    std::fs::write(&file, vec![1; SIZE]).expect("room");
    let (_server, uri) = nbdkit(&lab, &file, &fails).await;
    let (production, _recovery) = lab.pair().await;
    protect(&production, "cache", &[]).await;
    let add = ["disk", "add", GROUP, "root", "--pull"];
    let qmp = ["--qmp", "/nosuch/qmp", "--node", "drive0"];
    let named = uri.replace("///", "///disk");
    let cases: [(&[&str], i32, &str); 6] = [
        (&[&uri], 3, "nothing to compare with"),
        (&["/dev/sda"], 3, "NBD"),
        (&[&uri, "--every", "0s"], 3, "one second"),
        (&[&uri, qmp[0], qmp[1], qmp[2], qmp[3]], 3, "--scratch"),
        (&[&named, qmp[0], qmp[1], qmp[2], qmp[3]], 3, "leave the name out"),
        (&[&uri, qmp[0], qmp[1], qmp[2], qmp[3], "--scratch", "/"], 7, "/nosuch/qmp"),
    ];
    for (rest, code, words) in cases {
        production.srn(&[&add[..], rest].concat()).await.refused(code, &[words]);
    }
}
