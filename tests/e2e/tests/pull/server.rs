//! A disk that somebody writes on: `qemu-storage-daemon`, whose writes are made by an NBD client.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use srn_e2e::{Lab, Node, PATIENCE, wait_for};
use srn_nbd::client::{Client, ConnectOptions, Uri};
use srn_targets::qemu::qmp::Qmp;
use tokio::process::{Child, Command};

pub(crate) const GROUP: &str = "web";

/// Bytes of the disk.
pub(crate) const SIZE: u64 = 24 << 20;

/// A running server.
pub(crate) struct Server {
    pub(crate) disk: PathBuf,
    pub(crate) qmp: PathBuf,
    pub(crate) scratch: PathBuf,
    socket: PathBuf,
    /// Its second monitor.
    pub(crate) monitor: Qmp,
    pub(crate) child: Child,
}

impl Server {
    /// A new disk, half of it with content.
    pub(crate) async fn new(lab: &Lab) -> Self {
        let disk = lab.path("server.raw");
        let content: Vec<u8> =
            (0..SIZE / 16).flat_map(|at| (at * 2_654_435_761 + 1).to_le_bytes()).collect();
        std::fs::write(&disk, content).expect("room");
        std::fs::File::options().write(true).open(&disk).expect("it").set_len(SIZE).expect("room");
        std::fs::create_dir(lab.path("scratch")).expect("a directory");
        Self::on(lab).await
    }

    /// The same disk, in a new process.
    pub(crate) async fn on(lab: &Lab) -> Self {
        let (disk, qmp, own) = (lab.path("server.raw"), lab.path("qmp"), lab.path("own"));
        let socket = lab.path("server.nbd");
        let monitor = |id: &str, path: &Path| {
            let socket = format!("socket,id={id},path={},server=on,wait=off", path.display());
            ["--chardev".to_owned(), socket, "--monitor".to_owned(), format!("chardev={id}")]
        };
        for old in [&qmp, &own, &socket] {
            let _ = std::fs::remove_file(old);
        }
        let child = Command::new("qemu-storage-daemon")
            .args(monitor("theirs", &qmp))
            .args(monitor("ours", &own))
            .args(["--object", "throttle-group,id=limit"])
            .arg("--blockdev")
            .arg(format!(
                "driver=raw,node-name=drive0,file.driver=throttle,file.throttle-group=limit,\
                 file.file.driver=file,file.file.filename={}",
                disk.display()
            ))
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", "type=nbd,id=live,node-name=drive0,name=live,writable=on"])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("qemu-storage-daemon: install it with tests/setup/packages.sh qemu");
        let monitor = wait_for("the server answers", PATIENCE, async || {
            Qmp::connect(&own, Duration::from_secs(5)).await.ok()
        });
        let monitor = monitor.await;
        wait_for("its disk is there", PATIENCE, async || socket.exists().then_some(())).await;
        Self { disk, qmp, scratch: lab.path("scratch"), socket, monitor, child }
    }

    /// Its process ends, now.
    pub(crate) async fn kill(mut self) {
        self.child.start_kill().expect("it runs");
        self.child.wait().await.expect("it ends");
    }

    /// Where it is pulled from.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Whoever writes on the disk.
    pub(crate) async fn writer(&self) -> Client {
        let uri: Uri =
            format!("nbd+unix:///live?socket={}", self.socket.display()).parse().expect("a URI");
        Client::connect(&uri, &ConnectOptions::default()).await.expect("it can be written")
    }

    /// Writes a pattern.
    pub(crate) async fn write(&self, pattern: u8, offset: u64, length: usize) {
        let writer = self.writer().await;
        writer.write(offset, Bytes::from(vec![pattern; length]), false).await.expect("a write");
        writer.disconnect().await.expect("in order");
    }

    /// Limits how fast its disk is read, in bytes a second; 0 for no limit.
    pub(crate) async fn limit_reads(&self, bytes: u64) {
        let limits = json!({"bps-read": bytes});
        let set = json!({"path": "/objects/limit", "property": "limits", "value": limits});
        self.monitor.execute("qom-set", set).await.expect("a limit");
    }

    /// What is on its disk now.
    pub(crate) async fn content(&self) -> Vec<u8> {
        let writer = self.writer().await;
        writer.flush().await.expect("a flush");
        writer.disconnect().await.expect("in order");
        std::fs::read(&self.disk).expect("its disk")
    }

    /// The names of what is ours in it: exports, jobs, nodes, bitmaps.
    pub(crate) async fn ours(&self) -> (Vec<String>, Vec<String>) {
        let ask = async |command: &str, arguments: Value| -> Value {
            self.monitor.execute(command, arguments).await.expect("an answer")
        };
        let nodes = ask("query-named-block-nodes", json!({"flat": true})).await;
        let lists = [
            (ask("query-block-exports", Value::Null).await, "id"),
            (ask("query-jobs", Value::Null).await, "id"),
            (nodes.clone(), "node-name"),
        ];
        let named = |list: &Value, key: &str| -> Vec<String> {
            let names = list.as_array().into_iter().flatten().filter_map(|it| it[key].as_str());
            names.filter(|name| name.starts_with("srn-")).map(str::to_owned).collect()
        };
        let things = lists.iter().flat_map(|(list, key)| named(list, key)).collect();
        let bitmaps = nodes.as_array().into_iter().flatten();
        let bitmaps = bitmaps.flat_map(|node| named(&node["dirty-bitmaps"], "name")).collect();
        (things, bitmaps)
    }

    /// Adds the disk to a group that is there.
    pub(crate) async fn add(&self, production: &Node, every: &str) {
        let (qmp, scratch) = (self.qmp.display().to_string(), self.scratch.display().to_string());
        let uri = self.uri();
        let add = ["disk", "add", GROUP, "root", "--pull", &uri, "--qmp", &qmp, "--node", "drive0"];
        let rest = ["--scratch", &scratch, "--every", every, "--wait"];
        let _ = production.srn(&[&add[..], &rest[..]].concat()).await.done();
    }
}

/// Makes a group.
pub(crate) async fn protect(production: &Node, keep: &str, settings: &[&str]) {
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", keep];
    // Only passes make points.
    let rest = ["--checkpoint-every", "0s"];
    let _ = production.srn(&[&create[..], &rest[..], settings].concat()).await.done();
}

/// What is to be said of the passes.
pub(crate) fn pull(group: &Value) -> &Value {
    &group["disks"][0]["pull"]
}

/// Waits until a pass has come to its end that has read a moment from now on. Returns what is said of
/// it.
pub(crate) async fn passed(production: &Node) -> Value {
    let now = jiff::Timestamp::now();
    let moment = |pull: &Value| pull["last"]["time"].as_str()?.parse::<jiff::Timestamp>().ok();
    let passed = |group: &Value| moment(pull(group)).is_some_and(|moment| moment > now);
    let group = production.group_until(GROUP, "a pass has ended", passed).await;
    pull(&group)["last"].clone()
}

/// What can be recovered now.
pub(crate) async fn recovered(lab: &Lab, node: &Node) -> Vec<u8> {
    let file = lab.path("recovered.raw");
    let path = file.display().to_string();
    let _ = node.srn(&["export", GROUP, "root", "--raw", &path, "--force"]).await.done();
    std::fs::read(&file).expect("an export")
}

#[track_caller]
pub(crate) fn same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(at, None, "the disks differ");
}
