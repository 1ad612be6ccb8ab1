//! Our client against the C servers, in good order and with faults injected.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use srn_nbd::client::{
    Client, ClientError, ConnectOptions, Uri, ZeroOptions, dirty_bitmap, list_exports,
};
use srn_nbd::proto::constants::BASE_ALLOCATION;
use srn_nbd::proto::{ClientHandshakeError, ErrorCode};
use tempfile::TempDir;

use crate::support::backend::pattern;
use crate::support::{Deadline, Process, Random, blocking, tool, uri, within};

const MIB: u64 = 1 << 20;

/// A C server on a unix socket of its own.
struct Peer {
    _process: Process,
    directory: TempDir,
    _deadline: Deadline,
}

impl Peer {
    async fn nbdkit(arguments: &[&str]) -> Self {
        Self::start(|socket| {
            let mut all = vec!["--foreground".to_owned(), "--unix".to_owned(), socket];
            all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
            ("nbdkit", "nbdkit", all)
        })
        .await
    }

    async fn qemu_nbd(arguments: &[&str], image: &Path) -> Self {
        Self::start(|socket| {
            let mut all = vec!["--persistent".to_owned(), "--socket".to_owned(), socket];
            all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
            all.push(image.display().to_string());
            ("qemu-nbd", "qemu-utils", all)
        })
        .await
    }

    async fn start(
        command: impl FnOnce(String) -> (&'static str, &'static str, Vec<String>),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let (name, package, arguments) = command(socket.display().to_string());
        let process = blocking(move || {
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            Process::serving(name, package, &arguments, &socket)
        })
        .await;
        Self { _process: process, directory, _deadline: Deadline::start() }
    }

    fn uri(&self, export: &str) -> Uri {
        uri(&format!("nbd+unix:///{export}?socket={}", self.directory.path().join("s").display()))
    }

    async fn client(&self) -> Client {
        self.client_with(&ConnectOptions::default()).await
    }

    async fn client_with(&self, options: &ConnectOptions) -> Client {
        within("connecting", Client::connect(&self.uri(""), options)).await.unwrap()
    }
}

/// Writes, zeroes, reads back, at random, with many in flight.
pub(crate) async fn exercise(client: &Client, test: &str) {
    let mut random = Random::new(test);
    let size = client.export().size;
    let lanes = 16;
    let tasks: Vec<_> = (0..lanes)
        .map(|lane| {
            let (client, mut random) = (client.clone(), random.fork());
            let region = (size / lanes) & !4095;
            let start = lane * region;
            tokio::spawn(async move {
                let mut model = vec![0; region as usize];
                client.write(start, Bytes::from(model.clone()), false).await.unwrap();
                for _ in 0..30 {
                    let length = (1 + random.below(region / 4096 / 2)) * 4096;
                    let from = random.below((region - length) / 4096 + 1) * 4096;
                    let range = from as usize..(from + length) as usize;
                    match random.below(4) {
                        0 => {
                            let data = pattern(random.next(), 0, length as usize);
                            model[range].copy_from_slice(&data);
                            client.write(start + from, data, false).await.unwrap();
                        }
                        1 if client.export().can_write_zeroes => {
                            model[range].fill(0);
                            let options = ZeroOptions::default();
                            let zero = client.write_zeroes(start + from, length as u32, options);
                            zero.await.unwrap();
                        }
                        2 if client.export().can_flush => client.flush().await.unwrap(),
                        _ => {
                            let data = client.read(start + from, length as u32).await.unwrap();
                            assert!(data == model[range], "{length} bytes at {}", start + from);
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        within("exercise", task).await.unwrap();
    }
}

#[tokio::test]
async fn nbdkit_in_every_dialect() {
    for (arguments, structured, sizes) in [
        (&["memory", "16M"][..], true, 1),
        (&["--no-sr", "memory", "16M"], false, 1),
        (&["--mask-handshake=0", "memory", "16M"], false, 1),
        (&["--mask-handshake=1", "memory", "16M"], true, 1),
        (&["--filter=blocksize-policy", "memory", "16M", "blocksize-minimum=4096"], true, 4096),
        (&["--filter=noparallel", "memory", "16M"], true, 1),
    ] {
        let peer = Peer::nbdkit(arguments).await;
        let client = peer.client().await;
        assert_eq!(client.structured(), structured, "{arguments:?}");
        assert_eq!(client.export().size, 16 * MIB);
        assert_eq!(client.export().block_sizes.minimum, sizes);
        assert_eq!(client.export().allocation, structured);
        exercise(&client, &format!("nbdkit {arguments:?}")).await;
        within("goodbye", client.disconnect()).await.unwrap();
    }
}

#[tokio::test]
async fn nbdkit_oldstyle_is_refused_by_name() {
    let peer = Peer::nbdkit(&["--oldstyle", "memory", "16M"]).await;
    let (uri, options) = (peer.uri(""), ConnectOptions::default());
    let refused = within("connecting", Client::connect(&uri, &options)).await.unwrap_err();
    let oldstyle = ClientHandshakeError::Oldstyle;
    assert!(matches!(&refused, ClientError::Handshake(known) if *known == oldstyle), "{refused}");
}

#[tokio::test]
async fn nbdkit_abilities_are_seen() {
    let peer = Peer::nbdkit(&["--filter=nozero", "--readonly", "memory", "16M"]).await;
    let client = peer.client().await;
    assert!(client.export().read_only);
    let error = client.write_zeroes(0, 512, ZeroOptions::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::NotOffered(_)), "{error}");
    let refused = client.write(0, Bytes::from_static(&[1; 512]), false).await.unwrap_err();
    let code = ErrorCode::NotPermitted;
    assert!(matches!(refused, ClientError::Server { code: known, .. } if known == code));
    client.read(0, 512).await.unwrap();

    let peer = Peer::nbdkit(&["--filter=noextents", "memory", "16M"]).await;
    let told = peer.client().await.allocation(0, MIB as u32).await.unwrap();
    assert!(told.iter().all(|extent| !extent.hole && !extent.zero));
}

/// Errors injected into reads reach the caller, every one, and nothing else is affected.
#[tokio::test]
async fn errors_of_a_server_reach_the_caller() {
    for (structured, no_sr) in [(true, None), (false, Some("--no-sr"))] {
        let mut arguments: Vec<_> = no_sr.into_iter().collect();
        arguments.extend(["--filter=error", "pattern", "64M", "error-pread=EIO"]);
        arguments.push("error-pread-rate=0.3");
        let peer = Peer::nbdkit(&arguments).await;
        let client = peer.client().await;
        assert_eq!(client.structured(), structured);
        let reads: Vec<_> = (0..512u64)
            .map(|index| {
                let client = client.clone();
                tokio::spawn(async move { (index, client.read(index * 131_072, 131_072).await) })
            })
            .collect();
        let (mut good, mut bad) = (0, 0);
        for read in reads {
            let (index, result) = within("reading", read).await.unwrap();
            match result {
                Ok(data) => {
                    // The pattern is the offset of each eight bytes.
                    for (word, bytes) in data.chunks(8).enumerate() {
                        let expected = (index * 131_072 + word as u64 * 8).to_be_bytes();
                        assert_eq!(bytes, expected);
                    }
                    good += 1;
                }
                Err(ClientError::Server { code: ErrorCode::Io, .. }) => bad += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(good > 200 && bad > 50, "{good} good and {bad} bad");
    }
    for (filter, code) in [
        ("error-pwrite=ENOSPC", ErrorCode::NoSpace),
        ("error-pwrite=EPERM", ErrorCode::NotPermitted),
        ("error-pwrite=ESHUTDOWN", ErrorCode::ShuttingDown),
        ("error-pwrite=EINVAL", ErrorCode::Invalid),
    ] {
        let rate = "error-pwrite-rate=100%";
        let peer = Peer::nbdkit(&["--filter=error", "memory", "16M", filter, rate]).await;
        let error = peer.client().await.write(0, Bytes::from_static(&[1; 512]), false).await;
        match error {
            Err(ClientError::Server { code: known, .. }) => assert_eq!(known, code),
            other => panic!("{other:?}"),
        }
    }
}

/// Slow answers, in whatever order, find their requests.
#[tokio::test]
async fn slow_answers() {
    let arguments = ["--threads=64", "--filter=delay", "pattern", "16M", "rdelay=50ms"];
    let peer = Peer::nbdkit(&arguments).await;
    let client = peer.client().await;
    let reads: Vec<_> = (0..128u64)
        .map(|index| {
            let client = client.clone();
            tokio::spawn(async move { client.read(index * 4096, 4096).await.unwrap() })
        })
        .collect();
    for (index, read) in reads.into_iter().enumerate() {
        let data = within("reading", read).await.unwrap();
        assert_eq!(data[..8], (index as u64 * 4096).to_be_bytes());
    }
}

/// The server is killed with requests in flight.
#[tokio::test]
async fn a_server_that_dies() {
    let peer = Peer::nbdkit(&["--filter=delay", "memory", "16M", "rdelay=1000"]).await;
    let client = peer.client().await;
    let reads: Vec<_> = (0..10u64)
        .map(|index| {
            let client = client.clone();
            tokio::spawn(async move { client.read(index * 4096, 4096).await })
        })
        .collect();
    // A write goes ahead of nothing and is answered: now all the reads have been sent too.
    within("writing", client.write(0, Bytes::from_static(&[1; 512]), false)).await.unwrap();
    drop(peer);
    for read in reads {
        let error = within("reading", read).await.unwrap().unwrap_err();
        assert!(matches!(error, ClientError::ServerGone), "{error}");
    }
    let error = within("writing", client.flush()).await.unwrap_err();
    assert!(matches!(error, ClientError::ServerGone), "{error}");
}

#[tokio::test]
async fn a_sparse_source_is_read_by_its_map() {
    let peer = Peer::nbdkit(&["sparse-random", "1G", "seed=7", "percent=2"]).await;
    let client = peer.client().await;
    let size = client.export().size;
    let (mut offset, mut data, mut holes) = (0, 0, 0);
    while offset < size {
        let length = (size - offset).min(128 * MIB) as u32;
        let extents = within("asking", client.allocation(offset, length)).await.unwrap();
        for extent in extents {
            let length = extent.length.min(size - offset);
            if extent.zero {
                holes += length;
            } else {
                let sample = length.min(65_536) as u32;
                let read = client.read(offset, sample).await.unwrap();
                assert!(read.iter().any(|byte| *byte != 0), "told to be data at {offset}");
                data += length;
            }
            offset += length;
        }
    }
    assert_eq!(data + holes, size);
    assert!(holes > size / 2 && data > 0, "{data} bytes of data");
}

fn image(directory: &Path, format: &str) -> PathBuf {
    let path = directory.join(format);
    let name = path.display().to_string();
    tool("qemu-img", "qemu-utils", &["create", "-q", "-f", format, &name, "64M"]);
    path
}

#[tokio::test]
async fn qemu_nbd_in_raw_and_qcow2() {
    for format in ["raw", "qcow2"] {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), format);
        let peer = Peer::qemu_nbd(&["-f", format, "--shared=4", "--discard=unmap"], &image).await;
        let client = peer.client().await;
        assert!(client.structured() && client.export().allocation);
        exercise(&client, &format!("qemu-nbd {format}")).await;
        client.trim(0, 1 << 20, false).await.unwrap();
        client.flush().await.unwrap();
        let listed = list_exports(&peer.uri(""), &ConnectOptions::default()).await.unwrap();
        assert_eq!(listed.len(), 1);
        let simple = ConnectOptions { structured: false, ..ConnectOptions::default() };
        exercise(&peer.client_with(&simple).await, &format!("qemu-nbd {format}, simple")).await;
        let unknown = Client::connect(&peer.uri("none"), &ConnectOptions::default()).await;
        let unknown = unknown.unwrap_err();
        let handshake = matches!(
            &unknown,
            ClientError::Handshake(ClientHandshakeError::Unknown { name, .. }) if name == "none"
        );
        assert!(handshake, "{unknown}");
    }
}

/// A dirty bitmap tells what was written since it was made: the source of an incremental pull.
#[tokio::test]
async fn a_dirty_bitmap_of_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), "qcow2");
    let name = image.display().to_string();
    tool("qemu-img", "qemu-utils", &["bitmap", "-f", "qcow2", "--add", &name, "b0"]);
    let write = ["-f", "qcow2", "-c", "write -P 5 1M 128k", "-c", "write -P 6 9M 64k", &name];
    tool("qemu-io", "qemu-utils", &write);
    let peer = Peer::qemu_nbd(&["-f", "qcow2", "--read-only", "--bitmap=b0"], &image).await;
    let bitmap = "qemu:dirty-bitmap:b0";
    let contexts = vec![bitmap.to_owned(), BASE_ALLOCATION.to_owned(), "x-none:such".to_owned()];
    let options = ConnectOptions { contexts, ..ConnectOptions::default() };
    let client = peer.client_with(&options).await;
    let place =
        |name: &str| client.contexts().iter().position(|context| context.name == name).unwrap();
    assert_eq!(client.contexts().len(), 2);
    let (mut offset, mut dirty) = (0, Vec::new());
    while offset < 64 * MIB {
        let length = (64 * MIB - offset) as u32;
        let told = client.block_status(offset, length, false).await.unwrap();
        assert_eq!(told.len(), 2);
        for extent in &told[place(bitmap)] {
            if extent.flags & 1 != 0 {
                dirty.push((offset, u64::from(extent.length)));
            }
            offset += u64::from(extent.length);
        }
    }
    assert_eq!(dirty, [(MIB, 128 << 10), (9 * MIB, 64 << 10)]);
    assert_eq!(bitmap, dirty_bitmap("b0"));
    let told = client.dirty(bitmap, 0, 2 << 20).await.unwrap();
    assert_eq!(told[..2], [(MIB, false), (128 << 10, true)]);
    let missing = client.dirty(&dirty_bitmap("b1"), 0, 4096).await;
    assert!(matches!(missing, Err(ClientError::NotOffered(_))), "{missing:?}");
    let allocation = client.allocation(MIB, 128 << 10).await.unwrap();
    assert!(!allocation[0].zero);
    assert_eq!(client.read(9 * MIB, 65_536).await.unwrap(), vec![6; 65_536]);
}
