//! Disks of impossible sizes, sources that are none, and requests outside a disk.

use std::path::Path;

use srn_e2e::{Lab, Node, PATIENCE, tool, wait_for};
use srn_nbd::client::{Client, ConnectOptions, Uri};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::common::{
    INVALID, MIB, NOT_FOUND, REFUSED, UNREACHABLE, content, facts, protect, refused, refuses,
    running, verdict, write_blocks,
};

#[tokio::test]
async fn sizes_that_no_disk_has_are_refused() {
    let lab = Lab::new();
    let node = running(&lab, "production").await;
    protect(&node, "web", None, "1M").await;
    let sizes: [(&str, &[&str]); 6] = [
        ("0", &["size 0"]),
        ("1", &["multiple of 512", "1 is not"]),
        ("513", &["multiple of 512", "513 is not"]),
        ("1048575", &["multiple of 512", "1048575 is not"]),
        ("1125899906843136", &["largest disk", "1 PiB"]),
        ("16383T", &["largest disk", "1 PiB"]),
    ];
    for (size, words) in sizes {
        let arguments = ["disk", "add", "web", "data", "--size", size];
        refuses(&node, &arguments, INVALID, words).await;
    }
    // The smallest there is.
    let _ = node.srn(&["disk", "add", "web", "data", "--size", "512"]).await.done();
    let client = node.open("web/data").await;
    assert_eq!(client.export().size, 512);
}

#[tokio::test]
async fn a_served_disk_needs_a_copy_to_be_served_from() {
    let lab = Lab::new();
    let (production, _recovery) = lab.pair().await;
    let create = ["group", "create", "web", "--keep", "cache", "--peer", "recovery"];
    let _ = production.srn(&create).await.done();
    let arguments = ["disk", "add", "web", "root", "--size", "1M"];
    refuses(&production, &arguments, INVALID, &["web", "local cache", "keeps a replica"]).await;
}

/// An NBD server of others, on a unix socket.
async fn nbdkit(lab: &Lab, name: &str, arguments: &[&str]) -> (Child, String) {
    let socket = lab.path(name);
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket).args(arguments);
    let server = command.kill_on_drop(true).spawn().expect("nbdkit");
    wait_for("nbdkit listens", PATIENCE, async || socket.exists().then_some(())).await;
    (server, format!("nbd+unix:///?socket={}", socket.display()))
}

#[tokio::test]
async fn sources_that_cannot_be_copied_are_refused() {
    let lab = Lab::new();
    let node = running(&lab, "production").await;
    protect(&node, "web", None, "1M").await;
    let (_empty, empty) = nbdkit(&lab, "empty", &["memory", "0"]).await;
    let (_odd, odd) = nbdkit(&lab, "odd", &["memory", "1025"]).await;
    let (_huge, huge) = nbdkit(&lab, "huge", &["null", "2P"]).await;
    let nobody = format!("nbd://{}/x", lab.node("nobody").address());
    let nosuch = node.nbd_uri("web/nosuch");
    let sources: [(&str, i32, &[&str]); 7] = [
        (&empty, INVALID, &["size 0"]),
        (&odd, INVALID, &["multiple of 512", "1025"]),
        (&huge, INVALID, &["largest disk"]),
        ("http://example.org/", INVALID, &["http://example.org/", "NBD"]),
        ("/dev/sda", INVALID, &["/dev/sda", "NBD"]),
        (&nobody, UNREACHABLE, &[&nobody]),
        (&nosuch, UNREACHABLE, &[&nosuch, "web/nosuch"]),
    ];
    for (uri, code, words) in sources {
        let arguments = ["disk", "add", "web", "data", "--copy-from", uri];
        refuses(&node, &arguments, code, words).await;
    }
    // The disk of a server whose QEMU is not there, or is something else.
    let file = lab.path("file");
    std::fs::write(&file, "no socket").expect("it is written");
    for (socket, node_name) in [(lab.path("nosuch"), "drive0"), (file, "drive0")] {
        let socket = socket.to_str().expect("a path in UTF-8");
        let arguments = ["disk", "add", "web", "data", "--qmp", socket, "--node", node_name];
        refuses(&node, &arguments, UNREACHABLE, &[socket]).await;
    }
}

#[tokio::test]
async fn a_disk_that_a_server_does_not_have_is_refused() {
    let lab = Lab::new();
    let (production, _recovery) = lab.pair().await;
    let create = ["group", "create", "web", "--keep", "cache", "--peer", "recovery"];
    let _ = production.srn(&create).await.done();
    let image = lab.path("odd.raw");
    std::fs::write(&image, vec![1; 1025]).expect("it is written");
    let (qmp, empty) = (lab.path("qmp"), lab.path("empty.raw"));
    std::fs::write(&empty, []).expect("it is written");
    let drive = |name: &str, path: &Path| {
        format!("driver=file,node-name={name},filename={}", path.display())
    };
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp"]);
    qemu.arg(format!("unix:{},server=on,wait=off", qmp.display()));
    qemu.args(["-blockdev", &drive("empty", &empty), "-blockdev", &drive("odd", &image)]);
    let _qemu = qemu.kill_on_drop(true).spawn().expect("QEMU");
    wait_for("QEMU listens", PATIENCE, async || qmp.exists().then_some(())).await;
    let socket = qmp.to_str().expect("a path in UTF-8");
    let add = |name| ["disk", "add", "web", "data", "--qmp", socket, "--node", name];
    let words = [socket, "\"nosuch\"", "empty", "odd"];
    refuses(&production, &add("nosuch"), NOT_FOUND, &words).await;
    refuses(&production, &add("empty"), INVALID, &["size 0"]).await;
}

#[tokio::test]
async fn a_copy_that_fails_is_told_and_can_be_made_again() {
    let lab = Lab::new();
    let node = running(&lab, "production").await;
    protect(&node, "web", None, "1M").await;
    let bad = ["--filter=error", "pattern", "1M", "error-pread=EIO", "error-pread-rate=100%"];
    let (_bad, bad) = nbdkit(&lab, "bad", &bad).await;
    let _ = node.srn(&["disk", "add", "web", "data", "--copy-from", &bad]).await.done();
    let words = "remove the disk and add it again";
    let shown = node
        .group_until("web", "the failure is shown", |group| {
            let disks = group["disks"].as_array().into_iter().flatten();
            disks.into_iter().any(|disk| {
                disk["name"] == "data"
                    && disk["state"] == "failed"
                    && disk["detail"].as_str().is_some_and(|text| text.contains(words))
            })
        })
        .await;
    assert_eq!(shown["safe"], false);
    assert!(verdict(&node).await.contains(&bad), "the source is named");
    // A mixture is given to nobody.
    let file = lab.path("never");
    let path = file.to_str().expect("a path in UTF-8");
    let at = format!("--at={}", shown["head"]);
    let ran = node.srn(&["export", "web", "data", "--raw", path, &at]).await;
    refused("srn export", &ran, REFUSED, &["web", &at[5..], "nearest point"]);
    let ran = node.srn(&["export", "web", "data", "--raw", path]).await;
    refused("srn export", &ran, NOT_FOUND, &["web", "no disk \"data\""]);
    assert!(!file.exists());
    let mut node = node;
    node.expect_in_log("failed");
    let _ = node.srn(&["disk", "remove", "web", "data"]).await.done();
    let (_good, good) = nbdkit(&lab, "good", &["pattern", "1M"]).await;
    let _ = node.srn(&["disk", "add", "web", "data", "--copy-from", &good]).await.done();
    node.group_until("web", "the copy is whole", |group| {
        group["disks"].as_array().is_some_and(|disks| {
            disks.iter().all(|disk| disk["copy"].is_null() && disk["state"] == "disconnected")
        })
    })
    .await;
    let copied = content(&lab, &node, "web", "data").await;
    assert_eq!(copied[8192..8200], 8192_u64.to_be_bytes());
}

#[tokio::test]
async fn a_disk_that_is_being_filled_is_given_to_nobody() {
    let lab = Lab::new();
    let mut node = running(&lab, "production").await;
    protect(&node, "web", None, "1M").await;
    let slow = ["--filter=delay", "pattern", "1G", "rdelay=1"];
    let (_slow, slow) = nbdkit(&lab, "slow", &slow).await;
    let _ = node.srn(&["disk", "add", "web", "data", "--copy-from", &slow]).await.done();
    let uri: Uri = node.nbd_uri("web/data").parse().expect("a URI");
    let refused = async || {
        let opened = Client::connect(&uri, &ConnectOptions::default()).await;
        let error = opened.map(|_| ()).expect_err("it would lose what is written").to_string();
        assert!(error.contains("still being filled"), "{error}");
    };
    refused().await;
    // What was cut off is told, and still not given away.
    node.kill().await;
    node.expect_in_log("failed: the source");
    node.start().await;
    node.group_until("web", "the way out is shown", |group| {
        let disks = group["disks"].as_array().into_iter().flatten();
        disks.into_iter().any(|disk| {
            disk["name"] == "data"
                && disk["detail"].as_str().is_some_and(|text| text.contains("remove the disk"))
        })
    })
    .await;
    refused().await;
    let _ = node.srn(&["disk", "remove", "web", "data"]).await.done();
}

/// A connection that sends what no client sends: no structured replies, no checks.
struct Raw(TcpStream);

/// Commands of the transmission phase.
const READ: u16 = 0;
const WRITE: u16 = 1;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

impl Raw {
    async fn open(node: &Node, export: &str) -> Self {
        let mut stream = TcpStream::connect((node.address(), 10809)).await.expect("NBD");
        let mut greeting = [0; 18];
        let _ = stream.read_exact(&mut greeting).await.expect("a greeting");
        // Fixed newstyle without zeroes; then the option that just names an export.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1_u32.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello).await.expect("it listens");
        let mut info = [0; 10];
        let _ = stream.read_exact(&mut info).await.expect("the export");
        Self(stream)
    }

    /// Sends a request, and gives the error of the answer; 0 is success.
    async fn ask(&mut self, command: u16, offset: u64, length: u32) -> u32 {
        let cookie = offset ^ u64::from(length);
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        if command == WRITE {
            request.resize(request.len() + length as usize, 0xee);
        }
        self.0.write_all(&request).await.expect("it listens");
        let mut answer = [0; 16];
        let _ = self.0.read_exact(&mut answer).await.expect("an answer, not a hang-up");
        assert_eq!(answer[..4], 0x6744_6698_u32.to_be_bytes());
        assert_eq!(answer[8..], cookie.to_be_bytes());
        let error = u32::from_be_bytes([answer[4], answer[5], answer[6], answer[7]]);
        if command == READ && error == 0 {
            let mut data = vec![0; length as usize];
            let _ = self.0.read_exact(&mut data).await.expect("data");
        }
        error
    }
}

#[tokio::test]
async fn nothing_outside_a_disk_is_read_or_written() {
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), "1M").await;
    // A neighbour, so that there is something beyond.
    let _ = production.srn(&["disk", "add", "web", "next", "--size", "1M"]).await.done();
    write_blocks(&production, "web/root", 0, 256, 1).await;
    write_blocks(&production, "web/next", 0, 256, 2).await;
    production.in_step("web").await;
    let before = facts(&production).await;
    let written = production.group("web").await["link"]["content_written"].clone();
    let mut raw = Raw::open(&production, "web/root").await;
    for (offset, length) in [
        (MIB, 512),
        (MIB - 512, 1024),
        (MIB - 4096, 8192),
        (0, (MIB + 512) as u32),
        (MIB + 512, 512),
        (1 << 40, 4096),
        (1 << 63, 4096),
        (u64::MAX - 511, 512),
        (u64::MAX - 4095, 8192),
    ] {
        let at = format!("{length} bytes at {offset}");
        assert_eq!(raw.ask(READ, offset, length).await, EINVAL, "reading {at}");
        assert_eq!(raw.ask(WRITE, offset, length).await, ENOSPC, "writing {at}");
        assert_eq!(raw.ask(WRITE_ZEROES, offset, length).await, ENOSPC, "zeroing {at}");
        let error = raw.ask(TRIM, offset, length).await;
        assert!(error == EINVAL || error == ENOSPC, "trimming {at}: {error}");
    }
    // The connection is as good as before: the last sector can be read.
    assert_eq!(raw.ask(READ, MIB - 512, 512).await, 0);
    assert_eq!(production.group("web").await["link"]["content_written"], written);
    assert_eq!(raw.ask(WRITE, MIB - 512, 512).await, 0);
    production.in_step("web").await;
    for node in [&production, &recovery] {
        let root = content(&lab, node, "web", "root").await;
        let (all, last) = root.split_at(MIB as usize - 512);
        assert!(all.iter().all(|byte| *byte == 1) && last.iter().all(|byte| *byte == 0xee));
        let next = content(&lab, node, "web", "next").await;
        assert!(next.iter().all(|byte| *byte == 2));
    }
    assert_eq!(facts(&production).await, before);
    // What is served read-only takes nothing at all.
    let mut command = production.srn_command(&["export", "web", "root", "--nbd", "--json"]);
    let served = command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn();
    let mut served = served.expect("srn starts");
    let mut out = served.stdout.take().expect("its output");
    let mut said = Vec::new();
    let name = wait_for("the export is there", PATIENCE, async || {
        let _ = out.read_buf(&mut said).await.expect("its output");
        let open: serde_json::Value = serde_json::from_slice(&said).ok()?;
        open["name"].as_str().map(str::to_owned)
    })
    .await;
    const EPERM: u32 = 1;
    let mut raw = Raw::open(&production, &name).await;
    assert_eq!(raw.ask(WRITE, 0, 512).await, EPERM);
    assert_eq!(raw.ask(TRIM, 0, 512).await, EPERM);
    assert_eq!(raw.ask(READ, MIB, 512).await, EINVAL);
    assert_eq!(raw.ask(READ, 0, 512).await, 0);
    let listed = tool::run("nbdinfo", &["--is", "read-only", &production.nbd_uri(&name)]).await;
    assert_eq!(listed.code, 0, "{listed:#?}");
}
