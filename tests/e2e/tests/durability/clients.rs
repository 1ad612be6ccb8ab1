//! NBD programs that others have written, against the real daemon. After each of them the newest
//! point at the recovery node is, byte by byte, what they have written.

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::{Value, json};
use srn_e2e::{Chance, Lab, Node, PATIENCE, tool};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::common::{
    GROUP, add_disk, expect_lost_link, expect_replica, expect_same, export_of, filled, protect,
    read_all, read_file, small_segments,
};

/// The disk of these tests. Its last sector is not part of a whole page.
const DISK: &str = "root";
const SIZE: usize = (32 << 20) + 512;

/// What each of these tests begins with.
struct Stage {
    // In this order: the nodes end before their directory goes.
    production: Node,
    recovery: Node,
    lab: Lab,
}

impl Stage {
    async fn new() -> Self {
        let lab = Lab::new();
        let (mut production, mut recovery) =
            (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
        recovery.start().await;
        production.start().await;
        production.pair_with(&recovery).await;
        protect(&production, DISK, SIZE as u64, &[]).await;
        Self { production, recovery, lab }
    }

    fn tcp(&self) -> String {
        self.production.nbd_uri(&export_of(DISK))
    }

    fn unix(&self) -> String {
        let socket = self.production.nbd_socket();
        format!("nbd+unix:///{}?socket={}", export_of(DISK), socket.display())
    }

    /// A path in the laboratory, as text.
    fn file(&self, name: &str) -> (PathBuf, String) {
        let path = self.lab.path(name);
        let text = path.display().to_string();
        (path, text)
    }

    async fn expect_replica(&self, expected: &[u8], after: &str) {
        expect_replica(&self.production, &self.recovery, DISK, expected, after).await;
    }

    async fn run(&self, program: &str, arguments: &[&str]) -> String {
        tool::run(program, arguments).await.done().out
    }
}

/// A disk as servers have them: some of it was never written, some is zeros, some repeats, some
/// cannot be compressed.
fn image(seed: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut image = vec![0; SIZE];
    let mut at = 0;
    while at < SIZE {
        let length = ((1 + chance.below(64)) as usize * 4096).min(SIZE - at);
        let part = &mut image[at..at + length];
        match chance.below(4) {
            0 => {}
            1 => part.fill(chance.below(256) as u8),
            2 => {
                let line = format!("line {} of a log that nobody reads\n", chance.next());
                part.iter_mut().zip(line.bytes().cycle()).for_each(|(to, from)| *to = from);
            }
            _ => chance.fill(part),
        }
        at += length;
    }
    // The last sector says something.
    chance.fill(&mut image[SIZE - 512..]);
    image
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_is_told_what_is_there() {
    let stage = Stage::new().await;
    add_disk(&stage.production, "data", 1 << 20).await;
    let client = stage.production.open(&export_of(DISK)).await;
    let mib = 1u64 << 20;
    client.write(mib, filled(7, 2 << 20), false).await.expect("written");
    client.write(4 * mib, filled(0, 1 << 20), false).await.expect("written");
    client.write(6 * mib, filled(7, 1 << 20), false).await.expect("written");
    client.trim(6 * mib, 1 << 20, false).await.expect("trimmed");
    let expected = read_all(&client).await.expect("read");
    drop(client);

    for uri in [stage.tcp(), stage.unix()] {
        let told: Value =
            serde_json::from_str(&stage.run("nbdinfo", &["--json", &uri]).await).expect("JSON");
        assert_eq!(told["structured"], true, "{told:#}");
        let export = &told["exports"][0];
        for (key, value) in [
            ("export-name", json!(export_of(DISK))),
            ("export-size", json!(SIZE)),
            ("is_read_only", json!(false)),
            ("can_multi_conn", json!(true)),
            ("can_flush", json!(true)),
            ("can_fua", json!(true)),
            ("can_trim", json!(true)),
            ("can_zero", json!(true)),
            ("can_fast_zero", json!(true)),
            ("block_size_minimum", json!(512)),
            ("contexts", json!(["base:allocation"])),
        ] {
            assert_eq!(export[key], value, "{key}: {told:#}");
        }
        let map: Value =
            serde_json::from_str(&stage.run("nbdinfo", &["--map", "--json", &uri]).await)
                .expect("JSON");
        let extents: Vec<(u64, u64, u64)> = map
            .as_array()
            .expect("extents")
            .iter()
            .map(|extent| {
                let number = |key: &str| extent[key].as_u64().expect("a number");
                (number("offset"), number("length"), number("type"))
            })
            .collect();
        // 0 is content, 1 a hole, 2 zeros.
        let rest = SIZE as u64 - 5 * mib;
        assert_eq!(
            extents,
            [
                (0, mib, 3),
                (mib, 2 * mib, 0),
                (3 * mib, mib, 3),
                (4 * mib, mib, 2),
                (5 * mib, rest, 3)
            ]
        );
    }
    let root = format!("nbd://{}/", stage.production.address());
    let list: Value =
        serde_json::from_str(&stage.run("nbdinfo", &["--list", "--json", &root]).await)
            .expect("JSON");
    let mut names: Vec<&str> = list["exports"]
        .as_array()
        .expect("exports")
        .iter()
        .filter_map(|export| export["export-name"].as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["web/data", "web/root"]);
    stage.expect_replica(&expected, "nbdinfo").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_copies_in_and_out() {
    let stage = Stage::new().await;
    let ((source, from), (target, to)) = (stage.file("source"), stage.file("target"));
    let over_tcp = ["--flush", "--connections=4", "--requests=64"];
    let one_by_one = ["--flush", "--synchronous"];
    for (round, options, uri) in
        [(1, &over_tcp[..], stage.tcp()), (2, &one_by_one[..], stage.unix())]
    {
        let content = image(round);
        std::fs::write(&source, &content).expect("the source is written");
        stage.run("nbdcopy", &[options, &[&from, &uri]].concat()).await;
        let _ = std::fs::remove_file(&target);
        stage.run("nbdcopy", &[&options[1..], &[&uri, &to]].concat()).await;
        expect_same(&read_file(&target), &content, "what nbdcopy got back");
        stage.expect_replica(&content, "nbdcopy").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_converts_and_compares() {
    let stage = Stage::new().await;
    let ((source, from), (_, to)) = (stage.file("source"), stage.file("target.qcow2"));
    let content = image(3);
    std::fs::write(&source, &content).expect("the source is written");
    for (cache, uri) in [("none", stage.tcp()), ("writeback", stage.unix())] {
        let raw = ["-f", "raw", "-O", "raw"];
        let convert = [&["convert", "-n", "-t", cache, "-m", "8", "-W"], &raw[..], &[&from, &uri]];
        stage.run("qemu-img", &convert.concat()).await;
        stage.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]).await;
    }
    let uri = stage.tcp();
    stage.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &to]).await;
    stage.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &from, &to]).await;
    let info: Value = serde_json::from_str(
        &stage.run("qemu-img", &["info", "-f", "raw", "--output=json", &uri]).await,
    )
    .expect("JSON");
    assert_eq!(info["virtual-size"], SIZE, "{info:#}");
    stage.expect_replica(&content, "qemu-img").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_reads_what_it_wrote() {
    let stage = Stage::new().await;
    let mut expected = vec![0; SIZE];
    let tail = SIZE - 512;
    // How qemu-io calls it, where, how much, and what is there afterwards.
    let steps: &[(&str, usize, usize, u8)] = &[
        ("write -P 0xab", 0, 1 << 20, 0xab),
        ("write -P 0xcd", 1024, 512, 0xcd),
        ("write -f -P 0xce", 4096 - 512, 1024, 0xce),
        ("write -z", 8192, 8192, 0),
        ("write -z -u", 65536, 4096 + 512, 0),
        ("aio_write -P 0x11", 2 << 20, 3 << 20, 0x11),
        ("discard", 3 << 20, 1 << 20, 0),
        ("write -P 0x12", (3 << 20) + 512, 512, 0x12),
        ("write -P 0xef", tail, 512, 0xef),
        ("write -P 0xee", tail - 4096, 4096, 0xee),
        ("write -z -f", tail - 1024, 512, 0),
        ("write -z -n", 10 << 20, 4 << 20, 0),
    ];
    let mut commands = Vec::new();
    for (command, at, length, value) in steps {
        commands.push(format!("{command} {at} {length}"));
        expected[*at..*at + *length].fill(*value);
    }
    commands.push("aio_flush".into());
    commands.push("flush".into());
    // Read it back by runs of one value.
    let mut at = 0;
    while at < SIZE {
        let run = expected[at..].iter().take_while(|byte| **byte == expected[at]).count();
        let length = run.min(8 << 20);
        commands.push(format!("read -P {} {at} {length}", expected[at]));
        at += length;
    }
    for uri in [stage.tcp(), stage.unix()] {
        let mut arguments = vec!["-f".to_owned(), "raw".into(), "-t".into(), "none".into()];
        arguments.extend(commands.iter().flat_map(|command| ["-c".into(), command.clone()]));
        arguments.push(uri);
        let ran = tool::run("qemu-io", &arguments).await.done();
        assert!(!ran.out.contains("failed") && ran.err.is_empty(), "{ran:#?}");
        stage.expect_replica(&expected, "qemu-io").await;
    }
    // What does not fit is refused, and changes nothing.
    let beyond = format!("write -P 1 {tail} 1024");
    let ran = tool::run("qemu-io", &["-f", "raw", "-c", &beyond, &stage.tcp()]).await;
    assert!(ran.code != 0, "{ran:#?}");
    stage.expect_replica(&expected, "a refused write").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_what_it_wrote() {
    let stage = Stage::new().await;
    let uri = format!("--uri={}", stage.tcp());
    let aux = format!("--aux-path={}", stage.lab.dir().display());
    let job = [
        "--name=durability",
        "--ioengine=nbd",
        &uri,
        &aux,
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=16",
        "--size=24M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=17",
        "--fsync=32",
        "--output-format=json",
    ];
    // Written and verified in one connection, then verified again in another.
    for more in [&["--do_verify=1"][..], &["--verify_only"]] {
        let out = stage.run("fio", &[&job[..], more].concat()).await;
        let start = out.find('{').expect("JSON");
        let told: Value = serde_json::from_str(&out[start..]).expect("JSON");
        let job = &told["jobs"][0];
        assert_eq!(job["error"], 0, "{told:#}");
        let read = job["read"]["io_bytes"].as_u64().expect("a number");
        assert_eq!(read, 24 << 20, "not everything was verified: {told:#}");
    }
    let client = stage.production.open(&export_of(DISK)).await;
    let expected = read_all(&client).await.expect("read");
    stage.expect_replica(&expected, "fio").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_compares_every_read_with_a_file() {
    let stage = Stage::new().await;
    let mut chance = Chance::from_env("SRN_SEED");
    let (path, file) = stage.file("mirror");
    std::fs::write(&path, vec![0; SIZE]).expect("the file is written");
    let options = format!(
        "driver=blkverify,raw.driver=file,raw.filename={file},test.driver=raw,\
         test.file.driver=nbd,test.file.server.type=inet,test.file.server.host={},\
         test.file.server.port=10809,test.file.export={}",
        stage.production.address(),
        export_of(DISK)
    );
    let mut arguments = vec!["--image-opts".to_owned(), options.clone()];
    for _ in 0..400 {
        let length = 512 * (1 + chance.below(256)) as usize;
        let at = 512 * chance.below(((SIZE - length) / 512) as u64 + 1) as usize;
        let value = 1 + chance.below(255);
        let command = match chance.below(8) {
            0..=3 => format!("write -P {value} {at} {length}"),
            // QEMU's driver has no write -z: it ends by an assertion of its own.
            4 => format!("write -P 0 {at} {length}"),
            5 => format!("aio_write -P {value} {at} {length}"),
            _ => format!("read {at} {length}"),
        };
        arguments.extend(["-c".to_owned(), command, "-c".to_owned(), "aio_flush".to_owned()]);
    }
    for at in (0..SIZE).step_by(4 << 20) {
        let length = (SIZE - at).min(4 << 20);
        arguments.extend(["-c".to_owned(), format!("read {at} {length}")]);
    }
    let ran = tool::run("qemu-io", &arguments).await.done();
    assert!(!ran.out.contains("failed") && !ran.err.contains("blkverify"), "{ran:#?}");
    let mut expected = read_file(&path);
    stage.expect_replica(&expected, "blkverify").await;
    // It does compare.
    expected[5000] ^= 1;
    std::fs::write(&path, &expected).expect("the file is written");
    let ran = tool::run("qemu-io", &["--image-opts", &options, "-c", "read 4096 4096"]).await;
    assert!(ran.code != 0 && ran.err.contains("blkverify"), "{ran:#?}");
}

/// Writes in many requests at once over one connection, flushes over another, says so, and waits.
const PYTHON: &str = r#"
import nbd, sys
uri, size = sys.argv[1], int(sys.argv[2])
one, other = nbd.NBD(), nbd.NBD()
one.connect_uri(uri)
other.connect_uri(uri)
assert one.can_multi_conn() and other.can_multi_conn()
assert one.get_size() == size, one.get_size()
cookies = []
for at in range(0, 8 << 20, 32768):
    value = bytes([1 + (at >> 15) % 255])
    cookies.append(one.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(value * 32768)), at))
while cookies:
    one.poll(-1)
    cookies = [cookie for cookie in cookies if not one.aio_command_completed(cookie)]
assert other.pread(512, 32768) == b"\x02" * 512, "the other connection sees it"
other.flush()
print("flushed", flush=True)
sys.stdin.readline()
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_flushes_for_all_connections() {
    let mut stage = Stage::new().await;
    expect_lost_link(&mut [&mut stage.recovery, &mut stage.production]);
    // Debian's own, which Debian's module is for.
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", PYTHON, &stage.tcp(), &SIZE.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("python3 starts");
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("it says so in time");
    assert_eq!(
        line.expect("a line").as_deref(),
        Some("flushed"),
        "see above; install python3-libnbd with tests/setup/packages.sh nbd"
    );
    stage.production.kill().await;
    stage.production.start().await;
    let _ = child.stdin.take().expect("its input").write_all(b"\n").await;
    let _ = child.wait().await;

    let mut expected = vec![0; SIZE];
    for (number, part) in expected[..8 << 20].chunks_mut(32768).enumerate() {
        part.fill(1 + (number % 255) as u8);
    }
    let client = stage.production.open(&export_of(DISK)).await;
    let found = read_all(&client).await.expect("read");
    expect_same(&found, &expected, "what was flushed before the node's death");
    stage.expect_replica(&expected, "libnbd").await;
    assert_eq!(stage.production.group(GROUP).await["state"], "streaming");
}
