//! Our server against the C clients.

use std::path::Path;

use serde_json::Value;

use crate::support::backend::pattern;
use crate::support::{Fixture, Random, SIZE, blocking, python_nbd, tool, tool_fails};

const NBDINFO: (&str, &str) = ("nbdinfo", "libnbd-bin");
const NBDCOPY: (&str, &str) = ("nbdcopy", "libnbd-bin");
const QEMU_IO: (&str, &str) = ("qemu-io", "qemu-utils");
const QEMU_IMG: (&str, &str) = ("qemu-img", "qemu-utils");

/// Runs a tool while the server goes on.
async fn run((name, package): (&'static str, &'static str), arguments: &[&str]) -> String {
    let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    blocking(move || {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        tool(name, package, &arguments)
    })
    .await
}

async fn run_fails((name, package): (&'static str, &'static str), arguments: &[&str]) -> String {
    let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    blocking(move || {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        tool_fails(name, package, &arguments)
    })
    .await
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_sees_what_is_offered() {
    let fixture = Fixture::start().await;
    for (export, writes, extras) in
        [("disk", true, true), ("reader", false, true), ("plain", true, false)]
    {
        let told = json(&run(NBDINFO, &["--json", &fixture.tcp_uri(export)]).await);
        assert_eq!(told["protocol"], "newstyle-fixed");
        assert_eq!(told["structured"], true);
        let told = &told["exports"][0];
        assert_eq!(told["export-size"], SIZE);
        assert_eq!(told["description"], "memory to test with");
        assert_eq!(told["is_read_only"], !writes);
        assert_eq!(told["can_df"], true);
        assert_eq!(told["can_flush"], extras);
        assert_eq!(told["can_fua"], extras);
        assert_eq!(told["can_multi_conn"], extras);
        assert_eq!(told["can_cache"], extras);
        assert_eq!(told["can_trim"], extras && writes);
        assert_eq!(told["can_zero"], extras && writes);
        assert_eq!(told["can_fast_zero"], extras && writes);
        assert_eq!(told["block_size_minimum"], 512);
        assert_eq!(told["block_size_preferred"], 4096);
        assert_eq!(told["block_size_maximum"], 32 << 20);
        let contexts = told["contexts"].as_array().unwrap();
        assert_eq!(contexts.contains(&"base:allocation".into()), extras, "{contexts:?}");
    }
    let uri = fixture.unix_uri("disk");
    for ability in ["df", "flush", "fua", "multi-conn", "trim", "zero", "fast-zero", "cache"] {
        run(NBDINFO, &["--can", ability, &uri]).await;
    }
    run_fails(NBDINFO, &["--is", "read-only", &uri]).await;
    run(NBDINFO, &["--is", "read-only", &fixture.unix_uri("reader")]).await;
    assert_eq!(run(NBDINFO, &["--size", &uri]).await.trim(), SIZE.to_string());
    let refused = run_fails(NBDINFO, &[&fixture.tcp_uri("none")]).await;
    assert!(refused.contains("for export: none"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_and_qemu_nbd_list_exports() {
    let fixture = Fixture::start().await;
    let listed = blocking({
        let socket = fixture.socket().display().to_string();
        move || tool("qemu-nbd", "qemu-utils", &["--list", "--socket", &socket])
    })
    .await;
    for name in ["'disk'", "'threaded'", "'reader'", "'plain'", "'held'", "'huge'", "''"] {
        assert!(listed.contains(name), "{listed}");
    }
    assert!(listed.contains("exports available: 7"), "{listed}");
    assert!(listed.contains("base:allocation"), "{listed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maps_tell_holes() {
    let fixture = Fixture::start().await;
    let uri = fixture.tcp_uri("disk");
    let cell = 64 << 10;
    fixture.memory.fill(2 * cell, &pattern(1, 0, 3 * cell as usize));
    fixture.memory.fill(SIZE - cell, &pattern(1, 0, cell as usize));
    let expected = [
        (0, 2 * cell, 3),
        (2 * cell, 3 * cell, 0),
        (5 * cell, SIZE - 6 * cell, 3),
        (SIZE - cell, cell, 0),
    ];
    let told = json(&run(NBDINFO, &["--map", "--json", &uri]).await);
    let told: Vec<_> = told.as_array().unwrap().iter().collect();
    assert_eq!(told.len(), expected.len());
    for (told, (offset, length, kind)) in told.iter().zip(expected) {
        assert_eq!(
            (&told["offset"], &told["length"], &told["type"]),
            (&offset.into(), &length.into(), &kind.into())
        );
    }
    let told = json(&run(QEMU_IMG, &["map", "-f", "raw", "--output=json", &uri]).await);
    for (told, (offset, length, kind)) in told.as_array().unwrap().iter().zip(expected) {
        assert_eq!((&told["start"], &told["length"]), (&offset.into(), &length.into()));
        assert_eq!((&told["data"], &told["zero"]), (&(kind == 0).into(), &(kind == 3).into()));
    }
}

fn image(directory: &Path, seed: u64) -> String {
    let mut content = vec![0; SIZE as usize];
    // Data, zeroes and data again, with borders that are no multiples of any request.
    for (start, end) in [(0, 5 << 20), ((9 << 20) + 512, 30 << 20), (40 << 20, SIZE as usize)] {
        content[start..end].copy_from_slice(&pattern(seed, start as u64, end - start));
    }
    let path = directory.join("image");
    std::fs::write(&path, content).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_in_and_out() {
    let fixture = Fixture::start().await;
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out").display().to_string();
    let mut seed = 0;
    for (export, extra) in [
        ("disk", &["--connections=1", "--requests=1", "--request-size=32768"][..]),
        ("disk", &["--connections=4", "--requests=64", "--request-size=4096"]),
        ("threaded", &["--connections=4", "--requests=16"]),
        ("threaded", &["--connections=8", "--requests=64", "--request-size=65536"]),
        ("threaded", &["--connections=2", "--request-size=33554432", "--requests=2"]),
        ("disk", &["--no-extents", "--allocated", "--request-size=1048576"]),
        ("plain", &["--synchronous", "--flush"]),
        ("disk", &["--synchronous", "--destination-is-zero", "--flush"]),
    ] {
        seed += 1;
        fixture.memory.fill(
            0,
            &vec![if extra.contains(&"--destination-is-zero") { 0 } else { 9 }; SIZE as usize],
        );
        let image = image(directory.path(), seed);
        for uri in [fixture.tcp_uri(export), fixture.unix_uri(export)] {
            let mut extra = extra.to_vec();
            if export == "plain" {
                // It cannot flush, which nbdcopy takes for a mistake.
                extra.retain(|argument| *argument != "--flush");
            }
            let arguments = [&extra[..], &[&image, &uri]].concat();
            run(NBDCOPY, &arguments).await;
            let content = std::fs::read(&image).unwrap();
            assert!(fixture.memory.contents(0, SIZE as usize) == content, "{arguments:?}");
            let back: Vec<_> = extra
                .iter()
                .copied()
                .filter(|argument| !matches!(*argument, "--destination-is-zero"))
                .chain([uri.as_str(), out.as_str()])
                .collect();
            run(NBDCOPY, &back).await;
            assert!(std::fs::read(&out).unwrap() == content, "{back:?}");
        }
    }
    assert!(fixture.memory.flushes() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_writes_zeroes_discards_and_reads() {
    let fixture = Fixture::start().await;
    for uri in [fixture.tcp_uri("disk"), fixture.unix_uri("threaded")] {
        run(
            QEMU_IO,
            &[
                "-f",
                "raw",
                "-t",
                "none",
                "-c",
                "write -P 5 0 32M",
                "-c",
                "write -P 6 33M 30M",
                "-c",
                "write -P 7 512 512",
                "-c",
                "write -z 1M 1M",
                "-c",
                "write -z -u 2M 1M",
                "-c",
                "write -f -P 8 4M 64k",
                "-c",
                "discard 5M 1M",
                "-c",
                "writev -P 9 6M 4k 8k 512",
                "-c",
                "aio_write -P 10 8M 1M",
                "-c",
                "aio_write -P 11 9M 1M",
                "-c",
                "aio_flush",
                "-c",
                "flush",
                "-c",
                "read -P 5 0 512",
                "-c",
                "read -P 7 512 512",
                "-c",
                "read -P 5 1k 1023k",
                "-c",
                "read -P 0 1M 2M",
                "-c",
                "read -P 8 4M 64k",
                "-c",
                "readv -P 9 6M 4k 8k 512",
                "-c",
                "read -P 10 8M 1M",
                "-c",
                "read -P 11 9M 1M",
                "-c",
                "read -P 6 33M 30M",
                &uri,
            ],
        )
        .await;
        let content = fixture.memory.contents(0, 16 << 20);
        assert!(content[8 << 20..9 << 20].iter().all(|byte| *byte == 10));
        assert!(content[1 << 20..3 << 20].iter().all(|byte| *byte == 0));
        let wrong = run_fails(QEMU_IO, &["-f", "raw", "-c", "read -P 4 0 512", &uri]).await;
        assert!(wrong.contains("Pattern verification failed"), "{wrong}");
    }
    let reader = fixture.tcp_uri("reader");
    let refused = run_fails(QEMU_IO, &["-f", "raw", "-c", "write 0 512", &reader]).await;
    assert!(refused.contains("Permission denied"), "{refused}");
    let secret =
        run_fails(QEMU_IO, &["-f", "raw", "-c", "read 0 512", &fixture.tcp_uri("secret")]).await;
    assert!(secret.contains("not yours"), "{secret}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_converts_and_compares() {
    let fixture = Fixture::start().await;
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), 77);
    let uri = fixture.tcp_uri("threaded");
    run(QEMU_IMG, &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16", &image, &uri])
        .await;
    assert!(fixture.memory.contents(0, SIZE as usize) == std::fs::read(&image).unwrap());
    run(QEMU_IMG, &["compare", "-f", "raw", "-F", "raw", &image, &uri]).await;
    let qcow = directory.path().join("q").display().to_string();
    run(QEMU_IMG, &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow]).await;
    run(QEMU_IMG, &["compare", "-f", "qcow2", "-F", "raw", &qcow, &fixture.unix_uri("disk")]).await;
    fixture.memory.fill(SIZE - 1, &[fixture.memory.contents(SIZE - 1, 1)[0] ^ 1]);
    let differs = run_fails(QEMU_IMG, &["compare", "-f", "raw", "-F", "raw", &image, &uri]).await;
    assert!(differs.contains("Content mismatch"), "{differs}");
    let bench = ["bench", "-f", "raw", "-w", "-d", "32", "-c", "20000", "-s", "4096", &uri];
    run(QEMU_IMG, &bench).await;
}

/// QEMU writes to a file and to our export and compares every read: an oracle of its own. (It
/// cannot zero: its blkverify driver fails an assertion of QEMU's own.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blkverify_finds_no_difference() {
    let mut random = Random::new("blkverify");
    let fixture = Fixture::start().await;
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    std::fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let options = format!(
        "driver=blkverify,raw.driver=raw,raw.file.driver=file,raw.file.filename={},\
         test.driver=raw,test.file.driver=nbd,test.file.server.type=inet,\
         test.file.server.host={},test.file.server.port={},test.file.export=disk",
        raw.display(),
        fixture.tcp.ip(),
        fixture.tcp.port()
    );
    let mut arguments = vec!["--image-opts".to_owned(), options];
    for _ in 0..400 {
        let length = (1 + random.below(400)) * 512;
        let offset = random.below((SIZE - length) / 512) * 512;
        let byte = 1 + random.below(255);
        arguments.push("-c".to_owned());
        arguments.push(match random.below(5) {
            0 => format!("read {offset} {length}"),
            1 => format!("write -f -P {byte} {offset} {length}"),
            2 => format!("aio_write -P {byte} {offset} {length}"),
            3 => "aio_flush".to_owned(),
            _ => format!("write -P {byte} {offset} {length}"),
        });
    }
    arguments.extend(["-c", "aio_flush", "-c", "flush", "-c", "read 0 64M"].map(str::to_owned));
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    run(QEMU_IO, &arguments).await;
    assert!(fixture.memory.contents(0, SIZE as usize) == std::fs::read(&raw).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_what_it_wrote() {
    let fixture = Fixture::start().await;
    let directory = tempfile::tempdir().unwrap();
    for (export, sizes, depth) in
        [("disk", "512-128k", "32"), ("threaded", "4k-4k", "64"), ("threaded", "64k-1m", "8")]
    {
        let uri = format!("--uri={}", fixture.unix_uri(export));
        let sizes = format!("--bsrange={sizes}");
        let depth = format!("--iodepth={depth}");
        // What fio has to tell of itself is put where nobody else looks.
        let aux = format!("--aux-path={}", directory.path().display());
        let arguments = [
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--size=64m",
            &uri,
            &sizes,
            &depth,
            "--verify=crc32c",
            "--verify_state_save=0",
            "--do_verify=1",
            "--verify_fatal=1",
            "--fsync=64",
            &aux,
        ];
        let said = run(("fio", "fio"), &arguments).await;
        assert!(said.contains("err= 0"), "{said}");
        assert!(said.contains("read:") || said.contains("READ:"), "nothing was verified: {said}");
    }
    assert!(fixture.memory.flushes() > 0);
    // And it does find what is wrong.
    let uri = format!("--uri={}", fixture.unix_uri("threaded"));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        "--rw=read",
        "--size=64m",
        &uri,
        "--bs=4k",
        "--iodepth=8",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
    ];
    let wrong = run_fails(("fio", "fio"), &arguments).await;
    assert!(wrong.contains("verify"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_with_all_its_checks_off() {
    let mut random = Random::new("libnbd");
    let fixture = Fixture::start().await;
    let seed = random.next().to_string();
    for uri in [fixture.tcp_uri("disk"), fixture.unix_uri("threaded")] {
        let seed = seed.clone();
        let said = blocking(move || python_nbd(include_str!("abuse.py"), &[&uri, &seed])).await;
        assert_eq!(said.matches("passed").count(), 4, "{said}");
    }
    fixture.assert_healthy().await;
}
