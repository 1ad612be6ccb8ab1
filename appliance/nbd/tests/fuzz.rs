//! Mutations of good conversations, thrown at everything that hears a stranger: the handshakes, the
//! requests, the replies, URIs; first at the machines alone, then at a real server and a real client.
//!
//! No panic, no hang, and no memory because a number says so: the process's address space is looked at
//! when it is over. The seed is printed; `NBD_TEST_SEED` brings a run back, `NBD_FUZZ_SECONDS` makes
//! it longer (for each of the tests).
//!
//! What is known to have broken NBD servers and clients before is in the corpus, or has a test of its
//! own: names of 4096 bytes and more (`it::hostile_clients::a_name_of_any_length_is_survived`), options
//! with payload before STARTTLS and state kept across it (CVE-2021-3716, nbdkit 282c3b03; `proto`'s
//! tests, `it::tls`), unknown options, slow loris (`a_handshake_that_dawdles_is_ended`), stopping while
//! a client idles (`a_shutdown_has_an_end`), requests past 32 MiB, offset + length past 2^64, block status
//! of 4 GiB (CVE-2023-5871), negative sizes (CVE-2023-5215), an unaligned tail, clients that vanish
//! (`it::lifecycle`), read errors (CVE-2022-0485; `it::hostile_servers`).

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests, also where they say it once")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::{BufMut, BytesMut};
use srn_nbd::client::{Client, ConnectOptions, Uri};
use srn_nbd::proto::constants::{
    BASE_ALLOCATION, CHUNK_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, chunk, command, option,
    option_reply,
};
use srn_nbd::proto::{
    Answer, ClientEvent, ClientHandshake, Event, ExportInfo, ExportSummary, Handshake,
    HandshakeLimits, OpenError, ReplyHeader, RequestHeader, Session, Wish, decode_error,
    decode_hole, decode_status,
};
use srn_nbd::server::{Backend, ClientInfo, Export, Limits, PayloadBudget, Reply, Request, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// What one conversation may take. Far more than it needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// How much the address space may grow in bytes: stacks and arenas of threads, and the buffers that
/// one conversation may fill. A length from outside, believed, is more.
const GROWTH: u64 = 1536 << 20;

const SIZE: u64 = 4 << 20;

/// A small generator (SplitMix64).
struct Random(u64);

impl Random {
    fn new(test: &str) -> Self {
        let given = std::env::var("NBD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = given.unwrap_or_else(clock);
        println!("{test}: NBD_TEST_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// One of the corpus, or several behind each other, with a few bytes changed.
    fn mutant(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        if self.below(8) == 0 {
            let other = &corpus[self.below(corpus.len())];
            let cut = self.below(bytes.len() + 1);
            bytes.truncate(cut);
            bytes.extend_from_slice(&other[self.below(other.len())..]);
        }
        for _ in 0..self.below(6) {
            self.mutate(&mut bytes);
        }
        bytes
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let at = self.below(bytes.len());
        let wide = bytes.len().saturating_sub(at).min([1, 2, 4, 8][self.below(4)]);
        match self.below(7) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.next() as u8,
            // Numbers at the edges, where lengths and counts are.
            2 => {
                let edges =
                    [0, 1, 0x7f, 0xff, 1 << 16, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX];
                let number = edges[self.below(edges.len())].to_be_bytes();
                bytes[at..at + wide].copy_from_slice(&number[8 - wide..]);
            }
            3 => bytes.truncate(at),
            4 => {
                bytes.drain(at..at + wide);
            }
            5 => {
                let some = bytes[at..at + wide].to_vec();
                let to = self.below(bytes.len());
                bytes.splice(to..to, some);
            }
            _ => {
                let noise: Vec<u8> = (0..self.below(64)).map(|_| self.next() as u8).collect();
                bytes.splice(at..at, noise);
            }
        }
    }
}

/// How long a test goes on.
fn budget() -> Duration {
    let asked = std::env::var("NBD_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs_f64(asked.unwrap_or(1.5))
}

/// Runs `act` until the time is over; then looks at the address space.
fn laps(test: &str, mut act: impl FnMut(&mut Random)) {
    let mut random = Random::new(test);
    let (before, began) = (address_space(), Instant::now());
    let mut count = 0u64;
    while began.elapsed() < budget() {
        act(&mut random);
        count += 1;
    }
    let grown = address_space().saturating_sub(before);
    println!("{test}: {count} mutants, {} MiB", grown >> 20);
    assert!(count > 0 && grown < GROWTH, "the address space has grown by {grown} bytes");
}

/// The largest address space this process ever had: it tells of memory too that was not touched.
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn put_option(out: &mut Vec<u8>, option: u32, payload: &[u8]) {
    out.put_slice(b"IHAVEOPT");
    out.put_u32(option);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
}

fn named(name: &[u8], rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name, rest].concat()
}

fn contexts() -> Vec<u8> {
    let query = named(BASE_ALLOCATION.as_bytes(), &[]);
    named(b"disk", &[&1u32.to_be_bytes()[..], &query].concat())
}

fn put_request(out: &mut Vec<u8>, command: u16, flags: u16, offset: u64, length: u32) {
    let cookie = out.len() as u64;
    RequestHeader { flags, command, cookie, offset, length }.encode(out);
    if command == command::WRITE {
        out.extend((0..length.min(1 << 16)).map(|byte| byte as u8));
    }
}

/// Handshakes of clients, good and strange.
fn handshakes() -> Vec<Vec<u8>> {
    let go = named(b"disk", &[0, 0]);
    let options: &[&[(u32, Vec<u8>)]] = &[
        &[(option::GO, go.clone())],
        &[(option::EXPORT_NAME, b"disk".to_vec())],
        &[(option::LIST, Vec::new()), (option::INFO, go.clone()), (option::ABORT, Vec::new())],
        &[
            (option::STRUCTURED_REPLY, Vec::new()),
            (option::SET_META_CONTEXT, contexts()),
            (option::GO, named(b"disk", &[0, 2, 0, 3, 0, 1])),
        ],
        &[(option::STARTTLS, Vec::new()), (option::GO, go.clone())],
        &[(option::STARTTLS, vec![7; 100]), (option::STRUCTURED_REPLY, Vec::new())],
        &[(99, vec![1; 5000]), (option::EXTENDED_HEADERS, Vec::new()), (option::GO, go)],
        &[(option::GO, named(&[b'a'; 4096], &[0, 0])), (option::INFO, named(&[b'a'; 4097], &[]))],
        &[(option::LIST_META_CONTEXT, contexts()), (option::GO, vec![0; 70_000])],
    ];
    let handshake = |options: &&[(u32, Vec<u8>)]| {
        let mut bytes = vec![0, 0, 0, 3];
        options.iter().for_each(|(option, payload)| put_option(&mut bytes, *option, payload));
        bytes
    };
    options.iter().map(handshake).collect()
}

/// Requests, good and strange.
fn requests() -> Vec<Vec<u8>> {
    let all: &[(u16, u16, u64, u32)] = &[
        (command::READ, 0, 0, 4096),
        (command::WRITE, 1, 8192, 4096),
        (command::WRITE, 0, 0, 65_536),
        (command::FLUSH, 0, 0, 0),
        (command::TRIM, 0, 4096, 1 << 20),
        (command::WRITE_ZEROES, 2, 0, SIZE as u32),
        (command::BLOCK_STATUS, 8, 0, 4096),
        (command::CACHE, 0, 0, 4096),
        // Past 32 MiB, past the end, past 2^64, 4 GiB, an unaligned tail, nothing at all.
        (command::READ, 0, 0, 64 << 20),
        (command::WRITE, 0, SIZE - 512, 4096),
        (command::READ, 0, u64::MAX - 511, 512),
        (command::BLOCK_STATUS, 0, 0, u32::MAX),
        (command::READ, 0, SIZE - 511, 511),
        (command::READ, 0, 0, 0),
        (99, 0, 0, 512),
        (command::DISC, 0, 0, 0),
    ];
    let one = |(command, flags, offset, length): &(u16, u16, u64, u32)| {
        let mut bytes = Vec::new();
        put_request(&mut bytes, *command, *flags, *offset, *length);
        bytes
    };
    let each: Vec<Vec<u8>> = all.iter().map(one).collect();
    let together = each.concat();
    each.into_iter().chain([together]).collect()
}

fn put_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
}

fn put_chunk(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, payload: &[u8]) {
    out.put_u32(CHUNK_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
}

/// What a good server says until transmission begins.
fn server_handshakes() -> Vec<Vec<u8>> {
    let mut structured = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    put_option_reply(&mut structured, option::STRUCTURED_REPLY, option_reply::ACK, &[]);
    let context = [&[0, 0, 0, 1][..], BASE_ALLOCATION.as_bytes()].concat();
    let (set, ack) = (option::SET_META_CONTEXT, option_reply::ACK);
    put_option_reply(&mut structured, set, option_reply::META_CONTEXT, &context);
    put_option_reply(&mut structured, set, ack, &[]);
    let size = [&[0, 0][..], &SIZE.to_be_bytes(), &[0x0d, 0xff]].concat();
    put_option_reply(&mut structured, option::GO, option_reply::INFO, &size);
    let negative = [&[0, 0][..], &u64::MAX.to_be_bytes(), &[0x0d, 0xff]].concat();
    let mut strange = structured.clone();
    put_option_reply(&mut structured, option::GO, ack, &[]);
    put_option_reply(&mut strange, option::GO, option_reply::INFO, &negative);
    put_option_reply(&mut strange, option::GO, ack, &[]);
    let mut list = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    put_option_reply(&mut list, option::LIST, option_reply::SERVER, &named(b"disk", b"a disk"));
    put_option_reply(&mut list, option::LIST, ack, &[]);
    let mut secure = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    put_option_reply(&mut secure, option::STARTTLS, ack, &[]);
    let plain = [b"NBDMAGICIHAVEOPT\0\0", &SIZE.to_be_bytes()[..], &[0, 1], &[0; 124]].concat();
    vec![structured, strange, list, secure, plain, b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec()]
}

/// Replies to the requests that [`use_it`] makes: the cookies of a client count slots and uses.
fn replies() -> Vec<Vec<u8>> {
    let cookie = |index: u64| 1 << 32 | index;
    let mut good = Vec::new();
    let data = [&0u64.to_be_bytes()[..], &[5; 4096]].concat();
    put_chunk(&mut good, 1, chunk::OFFSET_DATA, cookie(0), &data);
    put_chunk(&mut good, 1, chunk::NONE, cookie(1), &[]);
    let status = [1u32, 4096, 0, 4096, 3].map(u32::to_be_bytes);
    put_chunk(&mut good, 1, chunk::BLOCK_STATUS, cookie(2), status.as_flattened());
    let mut pieces = Vec::new();
    let hole = [&0u64.to_be_bytes()[..], &2048u32.to_be_bytes()].concat();
    put_chunk(&mut pieces, 0, chunk::OFFSET_HOLE, cookie(0), &hole);
    let data = [&2048u64.to_be_bytes()[..], &[5; 2048]].concat();
    put_chunk(&mut pieces, 0, chunk::OFFSET_DATA, cookie(0), &data);
    put_chunk(&mut pieces, 1, chunk::NONE, cookie(0), &[]);
    let mut failed = Vec::new();
    let error = [&5u32.to_be_bytes()[..], &[0, 4], b"text"].concat();
    put_chunk(&mut failed, 1, chunk::ERROR, cookie(0), &error);
    put_chunk(&mut failed, 0, 0x7fff, cookie(1), &[9; 100]);
    let mut simple = Vec::new();
    simple.put_u32(SIMPLE_REPLY_MAGIC);
    simple.put_u32(0);
    simple.put_u64(cookie(1));
    let all = [&good[..], &pieces, &failed, &simple].concat();
    vec![good, pieces, failed, simple, all]
}

fn session() -> Session {
    Session { export: ExportInfo::writable(SIZE), structured: true, allocation: true }
}

#[test]
fn the_servers_machine() {
    let corpus = handshakes();
    laps("the_servers_machine", |random| {
        let bytes = random.mutant(&corpus);
        let mut out = Vec::new();
        let limits = HandshakeLimits::default();
        let mut machine = match random.below(2) {
            0 => Handshake::new(limits, &mut out),
            _ => Handshake::requiring_tls(limits, &mut out),
        };
        let info = ExportInfo::writable(SIZE);
        let mut input = BytesMut::new();
        let piece = 1 + random.below(bytes.len() + 1);
        'pieces: for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            loop {
                let answer = match machine.step(&mut input, &mut out) {
                    Err(_) | Ok(Event::Aborted) => break 'pieces,
                    Ok(Event::NeedInput) => break,
                    Ok(Event::StartTls) => {
                        assert!(input.is_empty(), "plain text counts as said under TLS");
                        machine.secured();
                        continue;
                    }
                    Ok(Event::List) => Answer::List(&[]),
                    Ok(Event::Describe(_)) => Answer::Described(Ok(&info)),
                    Ok(Event::Open(name)) if name.len() % 2 == 1 => {
                        Answer::Opened(Err(&OpenError::NotFound))
                    }
                    Ok(Event::Open(_)) => Answer::Opened(Ok(&info)),
                };
                if !matches!(machine.answer(answer, &mut out), Ok(None)) {
                    break 'pieces;
                }
            }
        }
        assert!(out.len() <= (1 << 20) + bytes.len() * 64, "{} bytes are answered", out.len());
    });
}

#[test]
fn the_servers_requests() {
    let corpus = requests();
    laps("the_servers_requests", |random| {
        let bytes = random.mutant(&corpus);
        let mut at = 0;
        while let Ok(Some(header)) = RequestHeader::decode(&bytes[at..]) {
            let _ = header.judge(&session());
            at += 28 + header.payload() as usize;
            if at > bytes.len() {
                break;
            }
        }
    });
}

#[test]
fn the_clients_machine_and_replies() {
    let (greetings, replies) = (server_handshakes(), replies());
    laps("the_clients_machine_and_replies", |random| {
        let bytes = random.mutant(&greetings);
        let contexts = vec![BASE_ALLOCATION.to_owned()];
        let tls = random.below(3) == 0;
        let mut machine = match random.below(4) {
            0 => ClientHandshake::list(tls),
            _ => ClientHandshake::new(Wish {
                export: "disk".into(),
                structured: true,
                contexts,
                tls,
            }),
        };
        let (mut input, mut out) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(1 + random.below(bytes.len() + 1)) {
            input.extend_from_slice(piece);
            match machine.step(&mut input, &mut out) {
                Ok(ClientEvent::Ready(negotiated)) => {
                    assert!(i64::try_from(negotiated.export.size).is_ok(), "a negative size");
                    break;
                }
                Ok(ClientEvent::NeedInput | ClientEvent::StartTls) => {}
                Ok(ClientEvent::Listed(_)) | Err(_) => break,
            }
        }
        let bytes = random.mutant(&replies);
        let mut at = 0;
        while let Ok(Some((_, length))) = ReplyHeader::decode(&bytes[at..]) {
            at += length;
            let rest = &bytes[at..];
            let payload = &rest[..random.below(rest.len() + 1)];
            let _ = (decode_error(payload), decode_hole(payload));
            let _ = decode_status(payload, 8192, random.below(2) == 0);
        }
    });
}

#[test]
fn uris() {
    let corpus: Vec<Vec<u8>> = [
        "nbd://h:1/a%20b?x=1",
        "nbds://[::1]:10809/d?tls-certificates=/etc/a&tls-hostname=h",
        "nbd+unix:///d?socket=/run/a%20b.sock",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    laps("uris", |random| {
        let bytes = random.mutant(&corpus);
        let _ = String::from_utf8_lossy(&bytes).parse::<Uri>();
    });
}

/// A disk in memory.
#[derive(Clone)]
struct Disk(Arc<Mutex<Vec<u8>>>);

impl Backend for Disk {
    fn list(&self, _: &ClientInfo) -> Vec<ExportSummary> {
        vec![ExportSummary { name: "disk".into(), description: String::new() }]
    }

    fn describe(&self, name: &str, _: &ClientInfo) -> Result<ExportInfo, OpenError> {
        if name == "disk" { Ok(self.info()) } else { Err(OpenError::NotFound) }
    }

    async fn open(&self, name: &str, _: &ClientInfo) -> Result<Arc<dyn Export>, OpenError> {
        if name == "disk" { Ok(Arc::new(self.clone())) } else { Err(OpenError::NotFound) }
    }
}

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        ExportInfo::writable(SIZE)
    }

    fn submit(&self, request: Request, reply: Reply) {
        let mut disk = self.0.lock().unwrap();
        // Whatever comes here is within the disk, or indexing panics.
        match request {
            Request::Read { offset, length } => {
                reply.data(disk[offset as usize..][..length as usize].to_vec());
            }
            Request::Write { offset, data, .. } => {
                disk[offset as usize..][..data.len()].copy_from_slice(&data);
                reply.ok();
            }
            Request::WriteZeroes { offset, length, .. } | Request::Trim { offset, length, .. } => {
                disk[offset as usize..][..length as usize].fill(0);
                reply.ok();
            }
            Request::Flush | Request::Cache { .. } => reply.ok(),
            Request::BlockStatus { length, .. } => {
                reply.extents(&[srn_nbd::proto::StatusExtent::data(length.into())]);
            }
        }
    }

    fn closed(&self) {}
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Whole conversations with a real server.
#[test]
fn a_server() {
    let sessions: Vec<Vec<u8>> = handshakes()
        .into_iter()
        .flat_map(|shake| requests().into_iter().map(move |asked| [&shake[..], &asked].concat()))
        .collect();
    let runtime = runtime();
    let disk = Arc::new(Disk(Arc::new(Mutex::new(vec![0; SIZE as usize]))));
    let _inside = runtime.enter();
    let server = Server::new(disk, Limits::default(), PayloadBudget::default());
    laps("a_server", |random| {
        let bytes = random.mutant(&sessions);
        let (ours, theirs) = UnixStream::pair().unwrap();
        server.serve_unix(theirs).unwrap();
        let talk = runtime.block_on(tokio::time::timeout(PATIENCE, async {
            let (mut read, mut write) = ours.into_split();
            let say = async {
                // A server that has closed is in its right.
                let _ = write.write_all(&bytes).await;
                let _ = write.shutdown().await;
            };
            let hear = async {
                let mut answers = Vec::new();
                let _ = read.read_to_end(&mut answers).await;
            };
            tokio::join!(say, hear);
        }));
        assert!(talk.is_ok(), "the server hangs");
    });
    // And it serves on.
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        server.serve_unix(theirs).unwrap();
        let client = Client::over_unix(ours, "disk", &ConnectOptions::default()).await.unwrap();
        client.write(0, vec![7; 4096].into(), true).await.unwrap();
        assert_eq!(client.read(0, 4096).await.unwrap(), vec![7; 4096]);
    });
}

/// What a client does with a server, whatever comes of it.
async fn use_it(stream: UnixStream) {
    let Ok(client) = Client::over_unix(stream, "disk", &ConnectOptions::default()).await else {
        return;
    };
    let write = client.write(0, vec![1; 512].into(), false);
    let (read, _, status) =
        tokio::join!(client.read(0, 4096), write, client.block_status(0, 8192, false));
    assert!(read.map_or(true, |data| data.len() == 4096), "less than was asked for");
    for extents in status.unwrap_or_default() {
        assert!(!extents.is_empty(), "a status of nothing");
    }
    let _ = client.disconnect().await;
}

/// A real client with a server that says anything.
#[test]
fn a_client() {
    let greetings = server_handshakes();
    let scripts: Vec<Vec<u8>> = replies()
        .into_iter()
        .flat_map(|said| [[&greetings[0][..], &said].concat(), [&greetings[4][..], &said].concat()])
        .chain(greetings.iter().cloned())
        .collect();
    let runtime = runtime();
    let _inside = runtime.enter();
    laps("a_client", |random| {
        let bytes = random.mutant(&scripts);
        let pause = random.below(2) == 0;
        let talk = runtime.block_on(tokio::time::timeout(PATIENCE, async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (mut read, mut write) = theirs.into_split();
            let lie = async move {
                let half = bytes.len() / 2;
                let _ = write.write_all(&bytes[..half]).await;
                if pause {
                    tokio::task::yield_now().await;
                }
                let _ = write.write_all(&bytes[half..]).await;
                let _ = write.shutdown().await;
                let _ = read.read_to_end(&mut Vec::new()).await;
            };
            tokio::join!(use_it(ours), lie);
        }));
        assert!(talk.is_ok(), "the client hangs");
    });
}
