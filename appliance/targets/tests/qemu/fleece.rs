//! Moments of a disk that is written on, in a real `qemu-storage-daemon`: what reads as frozen, what
//! is marked as changed, and what is left behind.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use srn_targets::qemu::qmp::fleece::{BitmapState, FleeceNames, Moment};
use srn_targets::qemu::qmp::{Qmp, QmpError};

use crate::support::{Lab, PATIENCE, run};

const SIZE: u64 = 8 << 20;

struct Server {
    child: Child,
    qmp: Qmp,
    socket: PathBuf,
    scratch: PathBuf,
}

impl Server {
    async fn start(lab: &Lab) -> Self {
        let (disk, qmp, socket) = (lab.path("disk.raw"), lab.path("qmp"), lab.path("nbd"));
        run("qemu-utils", "qemu-img", &["create", "-q", &text(&disk), &SIZE.to_string()]);
        let child = Command::new("qemu-storage-daemon")
            .arg("--chardev")
            .arg(format!("socket,id=q,path={},server=on,wait=off", qmp.display()))
            .args(["--monitor", "chardev=q", "--blockdev"])
            .arg(format!(
                "driver=raw,node-name=drive0,file.driver=file,file.filename={}",
                disk.display()
            ))
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", "type=nbd,id=live,node-name=drive0,name=live,writable=on"])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon: install the Debian package qemu-system-common");
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let qmp = loop {
            match Qmp::connect(&qmp, Duration::from_secs(5)).await {
                Ok(qmp) => break qmp,
                Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
            }
            tokio::task::yield_now().await;
        };
        Self { child, qmp, socket, scratch: lab.path("scratch") }
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    fn io(&self, export: &str, command: &str) {
        let uri = self.uri(export);
        let mut arguments = vec!["-f", "raw", "-c", command, &uri];
        if command.starts_with("read") {
            arguments.insert(0, "-r");
        }
        let said = run("qemu-utils", "qemu-io", &arguments);
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(!said.contains("fail"), "{command}: {said}");
    }

    /// Opens a moment, as one who protects the disk does.
    async fn open(&self, names: &FleeceNames, token: &str, since: Option<&str>) {
        let moment = Moment { node: "drive0", token, since };
        self.qmp.add_scratch(names, "drive0", SIZE, &self.scratch).await.unwrap();
        std::fs::remove_file(&self.scratch).unwrap();
        self.qmp.freeze(names, &moment).await.unwrap();
        let started = self.qmp.export_moment(names, &moment, Some(&self.socket)).await.unwrap();
        assert!(!started, "there is a server already");
    }

    /// What an export tells by a context: the ranges in which it has this word.
    fn map(&self, export: &str, bitmap: &str) -> Vec<(u64, u64)> {
        let map = format!("--map=qemu:dirty-bitmap:{bitmap}");
        let told = run("libnbd-bin", "nbdinfo", &[&map, &self.uri(export)]);
        let told = String::from_utf8_lossy(&told).into_owned();
        let number = |word: Option<&str>| word.unwrap().parse::<u64>().unwrap();
        told.lines()
            .filter(|line| line.ends_with("dirty"))
            .map(|line| {
                let mut words = line.split_whitespace();
                (number(words.next()), number(words.next()))
            })
            .collect()
    }

    async fn settle(&self, names: &FleeceNames, keep: Option<&str>) -> BitmapState {
        self.qmp.end_fleece(names, true).await.unwrap();
        self.qmp.settle_bitmaps(names, "drive0", keep).await.unwrap()
    }

    async fn names(&self) -> Vec<String> {
        let bitmaps = self.qmp.bitmaps("drive0").await.unwrap();
        bitmaps.into_iter().map(|bitmap| bitmap.name).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_moment_stays_as_it_was_and_the_next_one_tells_what_changed() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let names = FleeceNames::new("1a2b3c4d");
    server.io("live", "write -P 1 0 2M");
    server.open(&names, "one", None).await;
    server.io("live", "write -P 2 64k 64k");
    server.io("live", "write -z 1M 64k");
    let first = names.export("one");
    server.io(&first, "read -P 1 0 2M");
    let none = names.told(&Moment { node: "drive0", token: "one", since: None });
    assert_eq!(server.map(&first, &none), []);
    assert!(server.qmp.is_frozen(&names, "one").await.unwrap());

    // The first moment counts.
    assert_eq!(server.settle(&names, Some("one")).await, BitmapState::Usable);
    assert_eq!(server.names().await, [names.bitmap("one")]);
    assert!(!server.qmp.is_frozen(&names, "one").await.unwrap());
    let nodes = server.qmp.block_nodes().await.unwrap();
    let ours = nodes.into_iter().filter(|node| node.node_name.starts_with("srn-")).count();
    assert_eq!(ours, 0, "nodes are left behind");

    // The second one comes to nothing: what it would have told is told by the third.
    server.open(&names, "two", Some("one")).await;
    let changed = [(64 << 10, 64 << 10), (1 << 20, 64 << 10)];
    assert_eq!(server.map(&names.export("two"), &names.bitmap("one")), changed);
    server.io("live", "write -P 3 4M 4k");
    assert_eq!(server.settle(&names, Some("one")).await, BitmapState::Usable);
    server.io("live", "write -P 4 6M 4k");
    server.open(&names, "three", Some("one")).await;
    let changed: Vec<_> =
        [64 << 10, 1 << 20, 4 << 20, 6 << 20].map(|at| (at, 64 << 10)).into_iter().collect();
    assert_eq!(server.map(&names.export("three"), &names.bitmap("one")), changed);
    server.io("live", "write -P 5 7M 4k");

    // It counts; and of what is read in a fourth, only what came behind it has changed.
    assert_eq!(server.settle(&names, Some("three")).await, BitmapState::Usable);
    server.open(&names, "four", Some("three")).await;
    assert_eq!(server.map(&names.export("four"), &names.bitmap("three")), [(7 << 20, 64 << 10)]);

    // Nothing is kept: nothing is left.
    assert_eq!(server.settle(&names, None).await, BitmapState::Gone);
    assert_eq!(server.names().await, [] as [String; 0]);
    server.io("live", "write -P 6 0 64k");
}

#[tokio::test]
async fn a_bitmap_that_cannot_be_trusted_is_never_called_usable() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let names = FleeceNames::new("1a2b3c4d");
    assert_eq!(server.settle(&names, Some("one")).await, BitmapState::Gone);

    // Stopped by somebody, and nobody has recorded since.
    server.open(&names, "one", None).await;
    assert_eq!(server.settle(&names, Some("one")).await, BitmapState::Usable);
    let bitmap = serde_json::json!({"node": "drive0", "name": names.bitmap("one")});
    server.qmp.execute("block-dirty-bitmap-disable", bitmap).await.unwrap();
    assert_eq!(server.settle(&names, Some("one")).await, BitmapState::Inconsistent);
    assert_eq!(server.names().await, [] as [String; 0]);

    // Broken off between any two steps: what is left is cleared away, and what is kept is whole.
    server.open(&names, "two", None).await;
    assert_eq!(server.settle(&names, Some("two")).await, BitmapState::Usable);
    server.qmp.add_scratch(&names, "drive0", SIZE, &server.scratch).await.unwrap();
    let made = std::fs::metadata(&server.scratch).unwrap();
    assert!(made.is_file() && made.size() > 0);
    assert_eq!(server.settle(&names, Some("two")).await, BitmapState::Usable);
    let again = server.qmp.add_scratch(&names, "drive0", SIZE, Path::new("/nosuch/file")).await;
    assert!(matches!(again, Err(QmpError::Refused { .. })), "{again:?}");
    assert_eq!(server.settle(&names, Some("two")).await, BitmapState::Usable);
    // A job that somebody ended: the moment is frozen no more, and it is known.
    std::fs::remove_file(&server.scratch).unwrap();
    server.open(&names, "three", Some("two")).await;
    server.qmp.block_job_cancel(&names.export("three"), true).await.unwrap();
    assert!(!server.qmp.is_frozen(&names, "three").await.unwrap());
    assert_eq!(server.settle(&names, Some("two")).await, BitmapState::Usable);
}
