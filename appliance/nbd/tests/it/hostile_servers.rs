//! Servers that lie, break off or never answer: a client gets a typed error, and no wrong data.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use srn_nbd::client::{Client, ClientError, ConnectOptions, list_exports};
use srn_nbd::proto::constants::{
    CHUNK_MAGIC, OPTION_REPLY_MAGIC, REQUEST_HEADER_BYTES, SIMPLE_REPLY_MAGIC, chunk, command,
    option, option_reply,
};
use srn_nbd::proto::{
    ClientHandshakeError, ErrorCode, HandshakeViolation, ReplyViolation, RequestHeader,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

use crate::support::{Deadline, Random, option_bytes, uri, within};

/// A server that does what the test says.
struct Liar {
    stream: UnixStream,
    _deadline: Deadline,
}

impl Liar {
    async fn send(&mut self, bytes: &[u8]) {
        // The client may have had enough already.
        let _ = within("sending", self.stream.write_all(bytes)).await;
    }

    async fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        within("receiving", self.stream.read_exact(&mut bytes)).await.unwrap();
        bytes
    }

    async fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) {
        let mut bytes = Vec::new();
        bytes.put_u64(OPTION_REPLY_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(kind);
        bytes.put_u32(payload.len() as u32);
        bytes.put_slice(payload);
        self.send(&bytes).await;
    }

    async fn take_option(&mut self) -> u32 {
        let header = self.take(16).await;
        let length = u32::from_be_bytes(header[12..].try_into().unwrap());
        self.take(length as usize).await;
        u32::from_be_bytes(header[8..12].try_into().unwrap())
    }

    /// An honest handshake for an export of 1 MiB.
    async fn shake(&mut self, structured: bool) {
        self.send(b"NBDMAGICIHAVEOPT\0\x03").await;
        self.take(4).await;
        loop {
            match self.take_option().await {
                option @ option::STRUCTURED_REPLY if structured => {
                    self.reply(option, option_reply::ACK, &[]).await;
                }
                option @ option::SET_META_CONTEXT => {
                    let context = b"\0\0\0\x05base:allocation";
                    self.reply(option, option_reply::META_CONTEXT, context).await;
                    self.reply(option, option_reply::ACK, &[]).await;
                }
                option @ option::GO => {
                    let info = b"\0\0\0\0\0\0\0\x10\0\0\x0f\xff";
                    self.reply(option, option_reply::INFO, info).await;
                    self.reply(option, option_reply::ACK, &[]).await;
                    return;
                }
                option => self.reply(option, option_reply::ERR_UNSUP, &[]).await,
            }
        }
    }

    async fn take_request(&mut self) -> RequestHeader {
        let bytes = self.take(REQUEST_HEADER_BYTES).await;
        let header = RequestHeader::decode(&bytes).unwrap().unwrap();
        self.take(header.payload() as usize).await;
        header
    }
}

async fn liar_and_client(structured: bool) -> (Liar, Client) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut liar = Liar { stream: theirs, _deadline: Deadline::start() };
    let options = ConnectOptions { structured, ..ConnectOptions::default() };
    let client = tokio::spawn(async move { Client::over_unix(ours, "x", &options).await });
    liar.shake(structured).await;
    (liar, within("connecting", client).await.unwrap().unwrap())
}

fn chunk_bytes(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(CHUNK_MAGIC);
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(cookie);
    bytes.put_u32(payload.len() as u32);
    bytes.put_slice(payload);
    bytes
}

fn data(cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk_bytes(0, chunk::OFFSET_DATA, cookie, &[&offset.to_be_bytes(), bytes].concat())
}

fn hole(cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
    chunk_bytes(0, chunk::OFFSET_HOLE, cookie, &payload)
}

fn done(cookie: u64) -> Vec<u8> {
    chunk_bytes(1, chunk::NONE, cookie, &[])
}

fn failure(cookie: u64, flags: u16, number: u32, text: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_u32(number);
    payload.put_u16(text.len() as u16);
    payload.put_slice(text.as_bytes());
    chunk_bytes(flags, chunk::ERROR, cookie, &payload)
}

fn status(cookie: u64, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (length, flags) in extents {
        payload.put_u32(*length);
        payload.put_u32(*flags);
    }
    chunk_bytes(0, chunk::BLOCK_STATUS, cookie, &payload)
}

fn simple(cookie: u64, error: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(SIMPLE_REPLY_MAGIC);
    bytes.put_u32(error);
    bytes.put_u64(cookie);
    bytes
}

/// What a read of 4096 bytes at 8192 comes to when it is answered with `answer`.
async fn read(structured: bool, answer: impl FnOnce(u64) -> Vec<u8>) -> Result<Bytes, ClientError> {
    let (mut liar, client) = liar_and_client(structured).await;
    let reading = tokio::spawn(async move { client.read(8192, 4096).await });
    let request = liar.take_request().await;
    assert_eq!((request.offset, request.length), (8192, 4096));
    liar.send(&answer(request.cookie)).await;
    let _ = liar.stream.shutdown().await;
    within("reading", reading).await.unwrap()
}

async fn violation(answer: impl FnOnce(u64) -> Vec<u8>) -> ReplyViolation {
    match read(true, answer).await {
        Err(ClientError::Violation(violation)) => violation,
        other => panic!("expected a violation, got {other:?}"),
    }
}

#[tokio::test]
async fn reads_that_are_answered_well() {
    let whole = vec![7; 4096];
    let answer = |cookie| [data(cookie, 8192, &whole), done(cookie)].concat();
    assert_eq!(read(true, answer).await.unwrap(), whole);
    // In any order, with holes between, with a strange kind of flag.
    let pieces = |cookie| {
        [
            data(cookie, 12_000, &[3; 288]),
            hole(cookie, 8704, 3296),
            data(cookie, 8192, &[1; 512]),
            chunk_bytes(0xffff, chunk::NONE, cookie, &[]),
        ]
        .concat()
    };
    let expected = [vec![1; 512], vec![0; 3296], vec![3; 288]].concat();
    assert_eq!(read(true, pieces).await.unwrap(), expected);
    let plain = |cookie| [simple(cookie, 0), vec![9; 4096]].concat();
    assert_eq!(read(false, plain).await.unwrap(), vec![9; 4096]);
}

/// CVE-2022-0485: whatever else arrives, an error in a read is an error.
#[tokio::test]
async fn an_error_in_a_read_reaches_the_caller() {
    let whole = || vec![7; 4096];
    let io = "server failed to read 4096 bytes at 8192: input/output error (bad)";
    type Answers = Vec<Box<dyn FnOnce(u64) -> Vec<u8>>>;
    let answers: Answers = vec![
        Box::new(|c| failure(c, 1, 5, "bad")),
        Box::new(move |c| [data(c, 8192, &whole()), failure(c, 1, 5, "bad")].concat()),
        Box::new(move |c| [failure(c, 0, 5, "bad"), data(c, 8192, &whole()), done(c)].concat()),
        Box::new(move |c| [data(c, 8192, &whole()), failure(c, 0, 5, "bad"), done(c)].concat()),
        Box::new(|c| {
            let at = [b"\0\0\0\x05\0\x03bad" as &[u8], &8704u64.to_be_bytes()].concat();
            [data(c, 8192, &[1; 512]), chunk_bytes(1, chunk::ERROR_OFFSET, c, &at)].concat()
        }),
        Box::new(|c| chunk_bytes(1, chunk::ERROR_BIT + 99, c, b"\0\0\0\x05\0\x03badmore")),
    ];
    for answer in answers {
        assert_eq!(read(true, answer).await.unwrap_err().to_string(), io);
    }
    let no_words = "server failed to read 4096 bytes at 8192: input/output error";
    assert_eq!(read(false, |c| simple(c, 5)).await.unwrap_err().to_string(), no_words);
    let strange = read(false, |c| simple(c, 12_345)).await.unwrap_err();
    assert!(matches!(strange, ClientError::Server { code: ErrorCode::Invalid, .. }));
}

#[tokio::test]
async fn reads_that_are_answered_wrongly() {
    use ReplyViolation as V;
    let whole = vec![7; 4096];
    assert_eq!(violation(done).await, V::Missing);
    let short = |c| [data(c, 8192, &[1; 4095]), done(c)].concat();
    assert_eq!(violation(short).await, V::Missing);
    let twice = |c| [data(c, 8192, &whole), data(c, 8192, &whole), done(c)].concat();
    assert_eq!(violation(twice).await, V::Overlap);
    let overlap = |c| [data(c, 8192, &whole), hole(c, 12_287, 1), done(c)].concat();
    assert_eq!(violation(overlap).await, V::Overlap);
    assert_eq!(violation(|c| data(c, 8191, &[1; 4096])).await, V::OutOfRange);
    assert_eq!(violation(|c| data(c, 8192, &[1; 4097])).await, V::OutOfRange);
    assert_eq!(violation(|c| data(c, 0, &[1; 512])).await, V::OutOfRange);
    assert_eq!(violation(|c| data(c, u64::MAX - 10, &[1; 512])).await, V::OutOfRange);
    assert_eq!(violation(|c| hole(c, 8192, u32::MAX)).await, V::OutOfRange);
    assert_eq!(violation(|c| hole(c, 8192, 0)).await, V::OutOfRange);
    assert_eq!(violation(|c| data(c + 1, 8192, &[1; 512])).await, V::StrangeCookie);
    assert_eq!(violation(|_| data(u64::MAX, 8192, &[1; 512])).await, V::StrangeCookie);
    assert_eq!(violation(|c| status(c, 5, &[(512, 0)])).await, V::StrangeChunk(5));
    assert_eq!(violation(|c| chunk_bytes(0, 3, c, &[1; 8])).await, V::StrangeChunk(3));
    assert_eq!(violation(|c| chunk_bytes(0, 0, c, &[])).await, V::NotDone);
    assert_eq!(violation(|c| simple(c, 0)).await, V::SimpleReply);
    assert_eq!(violation(|_| b"HTTP/1.1".to_vec()).await, V::Magic(0x4854_5450));
    let empty_error = |c| chunk_bytes(1, chunk::ERROR, c, b"\0\0\0\0\0\0");
    assert_eq!(violation(empty_error).await, V::ErrorChunk);
    let long = |c: u64| {
        // A chunk that claims four gigabytes must not make the client wait for, or keep, them.
        let mut bytes = chunk_bytes(0, chunk::OFFSET_DATA, c, &[]);
        bytes.splice(16..20, u32::MAX.to_be_bytes());
        bytes.put_u64(8192);
        bytes
    };
    assert_eq!(violation(long).await, V::OutOfRange);
    let negotiated = read(false, |c| data(c, 8192, &[1; 512])).await.unwrap_err();
    assert!(matches!(negotiated, ClientError::Violation(V::NotNegotiated)));
}

#[tokio::test]
async fn reads_that_break_off() {
    let whole = vec![7; 4096];
    let full = [data(0, 8192, &whole), done(0)].concat();
    for end in [0, 1, 19, 20, 27, 28, 100, 4123, 4124, 4125, full.len() - 1] {
        let cut = |c| {
            let mut bytes = [data(c, 8192, &whole), done(c)].concat();
            bytes.truncate(end);
            bytes
        };
        let error = read(true, cut).await.unwrap_err();
        assert!(matches!(error, ClientError::ServerGone), "{end}: {error}");
    }
}

async fn ask_status(answer: impl FnOnce(u64) -> Vec<u8>) -> String {
    let (mut liar, client) = liar_and_client(true).await;
    let asking = tokio::spawn(async move { client.allocation(0, 1024).await });
    let cookie = liar.take_request().await.cookie;
    liar.send(&answer(cookie)).await;
    let _ = liar.stream.shutdown().await;
    match within("asking", asking).await.unwrap() {
        Ok(extents) => format!("{extents:?}").replace("StatusExtent ", ""),
        Err(error) => error.to_string().replace("server breaks the protocol: ", ""),
    }
}

#[tokio::test]
async fn status_that_is_answered_wrongly() {
    let well = |c| [status(c, 5, &[(512, 0xffff_fff0), (9999, 3)]), done(c)].concat();
    assert_eq!(
        ask_status(well).await,
        "[{ length: 512, hole: false, zero: false }, { length: 9999, hole: true, zero: true }]"
    );
    let context = "status of a context that was not selected";
    assert_eq!(ask_status(|c| status(c, 6, &[(512, 0)])).await, context);
    let twice = |c| [status(c, 5, &[(512, 0)]), status(c, 5, &[(512, 0)])].concat();
    assert_eq!(ask_status(twice).await, context);
    assert_eq!(ask_status(done).await, "success without the status of every context");
    assert_eq!(ask_status(|c| status(c, 5, &[(0, 0)])).await, "unlawful status extents");
    let many = |c| status(c, 5, &[(1024, 0), (1, 0)]);
    assert_eq!(ask_status(many).await, "unlawful status extents");
    let refused = ask_status(|c| failure(c, 1, 22, "")).await;
    assert_eq!(refused, "server failed to tell the status of 1024 bytes at 0: invalid argument");
}

/// What was in flight beside the broken reply learns why it will never be answered.
#[tokio::test]
async fn one_lie_ends_all_that_is_in_flight() {
    let (mut liar, client) = liar_and_client(true).await;
    let calls: Vec<_> = (0..20u64)
        .map(|index| {
            let client = client.clone();
            tokio::spawn(async move { client.read(index * 512, 512).await.map(drop) })
        })
        .collect();
    let mut cookies = Vec::new();
    for _ in 0..20 {
        cookies.push(liar.take_request().await.cookie);
    }
    liar.send(&data(cookies[7], 0, &[1; 100_000])).await;
    for call in calls {
        let error = within("reading", call).await.unwrap().unwrap_err();
        let lie = ReplyViolation::OutOfRange;
        assert!(matches!(&error, ClientError::Violation(known) if *known == lie), "{error}");
    }
    let later = within("writing", client.flush()).await.unwrap_err();
    assert!(matches!(later, ClientError::Violation(_)), "{later}");
    let goodbye = within("goodbye", client.disconnect()).await.unwrap_err();
    assert!(matches!(goodbye, ClientError::Violation(_)), "{goodbye}");
}

#[tokio::test]
async fn a_reply_that_comes_twice_is_strange() {
    let (mut liar, client) = liar_and_client(true).await;
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.flush().await }
    });
    let cookie = liar.take_request().await.cookie;
    liar.send(&simple(cookie, 0)).await;
    within("flushing", first).await.unwrap().unwrap();
    let second = tokio::spawn(async move { client.flush().await });
    assert_ne!(liar.take_request().await.cookie, cookie);
    liar.send(&simple(cookie, 0)).await;
    let error = within("flushing", second).await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Violation(ReplyViolation::StrangeCookie)), "{error}");
}

async fn handshake_with(act: impl AsyncFnOnce(&mut Liar)) -> ClientError {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut liar = Liar { stream: theirs, _deadline: Deadline::start() };
    let options = ConnectOptions { timeout: Duration::from_millis(500), ..Default::default() };
    let client = tokio::spawn(async move { Client::over_unix(ours, "x", &options).await });
    act(&mut liar).await;
    let error = within("connecting", client).await.unwrap().unwrap_err();
    drop(liar);
    error
}

#[tokio::test]
async fn handshakes_that_fail() {
    let error = handshake_with(async |_| {}).await;
    assert!(matches!(error, ClientError::Late), "{error}");
    let error = handshake_with(async |liar| {
        let _ = liar.stream.shutdown().await;
    })
    .await;
    assert!(matches!(error, ClientError::ServerGone), "{error}");
    let error = handshake_with(async |liar| liar.send(b"220 mail.example ESMTP").await).await;
    assert!(matches!(error, ClientError::Handshake(ClientHandshakeError::NotNbd(_))), "{error}");
    for (kind, expected) in [
        (
            option_reply::ERR_TLS_REQD,
            "server requires TLS; use nbds:// and certificates that it knows",
        ),
        (option_reply::ERR_SHUTDOWN, "server is shutting down"),
    ] {
        let error = handshake_with(async |liar| {
            liar.send(b"NBDMAGICIHAVEOPT\0\x03").await;
            liar.take(4).await;
            let option = liar.take_option().await;
            liar.reply(option, kind, b"").await;
        })
        .await;
        assert_eq!(error.to_string(), expected);
    }
    let error = handshake_with(async |liar| {
        liar.send(b"NBDMAGICIHAVEOPT\0\x03").await;
        liar.take(4).await;
        liar.send(&option_bytes(option::GO, &[])).await;
    })
    .await;
    let magic = ClientHandshakeError::Violation(HandshakeViolation::ReplyMagic);
    assert!(matches!(&error, ClientError::Handshake(known) if *known == magic), "{error}");
}

/// Arbitrary bytes after an honest handshake.
#[tokio::test]
async fn noise_from_a_server() {
    let mut random = Random::new("noise from a server");
    for _ in 0..200 {
        let structured = random.chance(2);
        let (mut liar, client) = liar_and_client(structured).await;
        let reading = tokio::spawn({
            let client = client.clone();
            async move { client.read(0, 65_536).await }
        });
        let cookie = liar.take_request().await.cookie;
        for _ in 0..random.below(6) {
            let noise: Vec<u8> = (0..random.below(300)).map(|_| random.next() as u8).collect();
            let offset = random.below(70_000);
            liar.send(&match random.below(6) {
                0 => noise,
                1 => simple(cookie, 0),
                2 => data(cookie, offset, &noise),
                3 => hole(cookie, offset, random.below(70_000) as u32),
                4 => chunk_bytes(random.below(4) as u16, random.below(8) as u16, cookie, &noise),
                _ => status(cookie, 5, &[(random.next() as u32, 0)]),
            })
            .await;
        }
        let _ = liar.stream.shutdown().await;
        if let Ok(data) = within("reading", reading).await.unwrap() {
            assert_eq!(data.len(), 65_536, "whole or not at all");
        }
    }
}

#[tokio::test]
async fn what_nobody_could_answer_is_not_asked() {
    let (mut liar, client) = liar_and_client(true).await;
    let reason = |result: Result<Bytes, ClientError>| match result {
        Err(ClientError::Usage { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(client.read(0, 0).await), "nothing is asked for");
    assert_eq!(reason(client.read(1 << 20, 1).await), "past the end of the export");
    assert_eq!(reason(client.read(u64::MAX, 2).await), "past the end of the export");
    let flush = tokio::spawn(async move { client.flush().await });
    assert_eq!(liar.take_request().await.command, command::FLUSH, "nothing came before");
    flush.abort();
}

#[tokio::test]
async fn addresses_where_nobody_is() {
    let options = ConnectOptions::default();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let uri = uri(&format!("nbd://{closed}/x"));
    let error = within("connecting", Client::connect(&uri, &options)).await.unwrap_err();
    assert!(matches!(error, ClientError::Io { operation: "connecting", .. }), "{error}");
    let error = within("listing", list_exports(&uri, &options)).await.unwrap_err();
    assert!(matches!(error, ClientError::Io { operation: "connecting", .. }), "{error}");
}
