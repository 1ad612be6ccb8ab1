//! Clients that break every rule: each gets what it deserves, and nobody else notices.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut;
use srn_nbd::proto::constants::{chunk, command, command_flag, option, option_reply};
use srn_nbd::proto::{HandshakeLimits, RequestHeader};
use srn_nbd::server::{Limits, Listener, PayloadBudget, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::backend::{Exports, pattern};
use crate::support::{Fixture, Random, Raw, SIZE, option_bytes, until, within};

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn header(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    RequestHeader { flags, command, cookie, offset, length }.encode(&mut bytes);
    bytes
}

#[tokio::test]
async fn an_address_that_is_not_listed_gets_no_byte() {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    for allowed in [vec![], vec!["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]] {
        let exports = Arc::new(Exports::default());
        let server = Server::new(exports, Limits::default(), PayloadBudget::default());
        let listener = Listener::tcp(any, allowed).await.unwrap();
        let address = listener.tcp_address().unwrap();
        server.listen(listener);
        Raw::connect(address).await.assert_closed().await;
        assert!(server.connections().is_empty());
    }
}

#[tokio::test]
async fn a_mapped_address_is_judged_as_what_it_is() {
    let exports = Arc::new(Exports::default());
    let server = Server::new(exports, Limits::default(), PayloadBudget::default());
    let any = SocketAddr::from(([0u16; 8], 0));
    let listener = Listener::tcp(any, vec!["127.0.0.0/8".parse().unwrap()]).await.unwrap();
    let port = listener.tcp_address().unwrap().port();
    server.listen(listener);
    Raw::greeted(SocketAddr::from(([127, 0, 0, 1], port))).await;
}

#[tokio::test]
async fn a_handshake_that_dawdles_is_ended() {
    let handshake = Duration::from_millis(300);
    let fixture = Fixture::with_limits(Limits { handshake, ..Limits::default() }).await;
    // One says nothing, one a byte now and then, one asks for ever.
    let mut silent = fixture.raw().await;
    let mut asking = Raw::greeted(fixture.tcp).await;
    let mut slow = fixture.raw().await;
    silent.take(18).await;
    slow.take(18).await;
    let drip = async {
        let mut byte = 0;
        while slow.stream.write_all(&[byte]).await.is_ok() {
            byte = 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let ask = async {
        loop {
            let sent = asking.stream.write_all(&option_bytes(option::LIST, &[])).await;
            let mut bytes = [0; 4096];
            let read = asking.stream.read(&mut bytes).await;
            if sent.is_err() || !matches!(read, Ok(1..)) {
                return;
            }
        }
    };
    within("dripping", drip).await;
    within("asking", ask).await;
    silent.assert_closed().await;
    until("forgetting", || fixture.server.connections().is_empty()).await;
    assert_eq!(fixture.opened(), 0);
    fixture.assert_healthy().await;
}

#[tokio::test]
async fn a_handshake_that_floods_is_ended() {
    let options = HandshakeLimits { options: 100, option_bytes: 4096, total_bytes: 100_000 };
    let fixture = Fixture::with_limits(Limits { options, ..Limits::default() }).await;
    let many = option_bytes(99, &[]).repeat(101);
    let large = option_bytes(99, &[0; 50_000]).repeat(3);
    let mut lie = option_bytes(option::GO, &[]);
    lie.splice(12..16, u32::MAX.to_be_bytes());
    for (flood, answered) in [(many, 100), (large, 2), (lie, 0)] {
        let mut raw = Raw::greeted(fixture.tcp).await;
        raw.send(&flood).await;
        for _ in 0..answered {
            let told = raw.replies().await;
            assert!(told[0] & option_reply::ERROR_BIT != 0);
        }
        raw.assert_closed().await;
    }
    fixture.assert_healthy().await;
}

#[tokio::test]
async fn a_name_of_any_length_is_survived() {
    let fixture = Fixture::start().await;
    for length in [0usize, 255, 256, 3000, 4095, 4096, 4097, 65_000] {
        let name = "n".repeat(length);
        let mut raw = Raw::greeted(fixture.tcp).await;
        raw.send(&option_bytes(option::GO, &Raw::go_payload(&name))).await;
        let expected = match length {
            0 => option_reply::ACK,
            1..=4096 => option_reply::ERR_UNKNOWN,
            _ => option_reply::ERR_TOO_BIG,
        };
        assert_eq!(raw.replies().await.last(), Some(&expected), "{length}");
        let mut raw = Raw::greeted(fixture.tcp).await;
        raw.send(&option_bytes(option::EXPORT_NAME, name.as_bytes())).await;
        if length > 0 {
            raw.assert_closed().await;
        } else {
            assert_eq!(raw.take(8).await, SIZE.to_be_bytes());
        }
    }
    fixture.assert_healthy().await;
}

#[tokio::test]
async fn a_secret_export_is_refused_and_the_handshake_goes_on() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::greeted(fixture.tcp).await;
    for option in [option::INFO, option::GO] {
        raw.send(&option_bytes(option, &Raw::go_payload("secret"))).await;
        assert_eq!(raw.replies().await, [option_reply::ERR_POLICY]);
    }
    raw.send(&option_bytes(option::STARTTLS, &[])).await;
    assert_eq!(raw.replies().await, [option_reply::ERR_POLICY]);
    raw.send(&option_bytes(option::ABORT, &[])).await;
    assert_eq!(raw.replies().await, [option_reply::ACK]);
    raw.assert_closed().await;
    assert_eq!(fixture.opened(), 0);
}

#[tokio::test]
async fn what_is_no_request_ends_the_connection() {
    let fixture = Fixture::start().await;
    let mut wrong = header(command::READ, 0, 1, 0, 512);
    wrong[3] ^= 1;
    for garbage in [wrong, vec![0; 28], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n1234".to_vec()] {
        let mut raw = Raw::using(fixture.tcp, "disk", true).await;
        // What came before the garbage is answered all the same.
        raw.request(command::FLUSH, 0, 1, 0, 0).await;
        assert_eq!(raw.simple().await, (0, 1));
        raw.send(&garbage).await;
        raw.assert_closed().await;
    }
    until("closing", || fixture.closed() == 3).await;
    fixture.assert_healthy().await;
}

/// Requests that are wrong are answered, their payloads consumed, and the next one is understood.
#[tokio::test]
async fn wrong_requests_are_answered_in_place() {
    let fixture = Fixture::start().await;
    let top = u64::MAX - 511;
    let (read, write, flush) = (command::READ, command::WRITE, command::FLUSH);
    let (trim, zeroes, status) = (command::TRIM, command::WRITE_ZEROES, command::BLOCK_STATUS);
    let cases: &[(&str, u16, u16, u64, u32, u32)] = &[
        ("disk", read, 0, SIZE, 512, EINVAL),
        ("disk", read, 0, top, 512, EINVAL),
        ("disk", read, 0, 0, 33 << 20, EINVAL),
        ("disk", read, 0, 1, 512, EINVAL),
        ("disk", read, 0, 0, 513, EINVAL),
        ("disk", write, 0, SIZE - 512, 1024, ENOSPC),
        ("disk", write, 0, top, 1024, ENOSPC),
        ("disk", write, 0, 0, (32 << 20) + 512, EINVAL),
        ("disk", write, 0, 0, 63 << 20, EINVAL),
        ("disk", write, 0, 256, 512, EINVAL),
        ("disk", write, 0, 0, 100, EINVAL),
        ("disk", write, 0, 0, 100_001, EINVAL),
        ("disk", write, command_flag::NO_HOLE, 0, 4096, EINVAL),
        ("disk", flush, 0, 0, 512, EINVAL),
        ("disk", trim, 0, SIZE, 512, EINVAL),
        ("disk", zeroes, 0, SIZE, 512, ENOSPC),
        ("disk", zeroes, 0, 0, u32::MAX - 511, ENOSPC),
        ("disk", status, 0, 0, u32::MAX - 511, EINVAL),
        ("disk", status, 0, 0, 0, EINVAL),
        ("disk", 8, 0, 0, 0, EINVAL),
        ("disk", 0xffff, 0, 0, 0, EINVAL),
        ("disk", read, 0x8000, 0, 512, EINVAL),
        ("reader", write, 0, 0, 4096, EPERM),
        ("reader", write, 0, top, 100_000, EPERM),
        ("reader", trim, 0, 0, 512, EPERM),
        ("reader", zeroes, 0, 0, 512, EPERM),
        ("plain", flush, 0, 0, 0, EINVAL),
        ("plain", trim, 0, 0, 512, EINVAL),
        ("plain", zeroes, 0, 0, 512, EINVAL),
        ("plain", command::CACHE, 0, 0, 512, EINVAL),
        ("plain", status, 0, 0, 512, EINVAL),
        ("plain", write, command_flag::FUA, 0, 512, EINVAL),
    ];
    for structured in [true, false] {
        for (export, command, flags, offset, length, error) in cases {
            let mut raw = Raw::using(fixture.tcp, export, structured).await;
            raw.request(*command, *flags, 5, *offset, *length).await;
            if *command == write {
                raw.send(&vec![0xee; *length as usize]).await;
            }
            let told = if structured {
                let (flags, kind, cookie, payload) = raw.chunk().await;
                assert_eq!((flags, kind), (chunk::FLAG_DONE, chunk::ERROR));
                (u32::from_be_bytes(payload[..4].try_into().unwrap()), cookie)
            } else {
                raw.simple().await
            };
            assert_eq!(told, (*error, 5), "{export} {command} {flags} {offset} {length}");
            raw.request(read, 0, 6, 0, 512).await;
            if structured {
                let (_, _, cookie, _) = raw.chunk().await;
                assert_eq!(cookie, 6);
            } else {
                assert_eq!(raw.simple().await, (0, 6));
            }
        }
    }
    assert!(fixture.memory.contents(0, 1 << 20).iter().all(|byte| *byte == 0), "nothing written");
}

#[tokio::test]
async fn nothing_asked_for_is_granted() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "disk", true).await;
    for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        raw.request(command, 0, 3, 512, 0).await;
        assert_eq!(raw.simple().await, (0, 3));
    }
}

#[tokio::test]
async fn a_payload_past_all_reason_ends_the_connection() {
    let fixture = Fixture::start().await;
    let mut raw = Raw::using(fixture.tcp, "disk", true).await;
    raw.request(command::WRITE, 0, 5, 0, u32::MAX - 511).await;
    raw.assert_closed().await;
    fixture.assert_healthy().await;
}

#[tokio::test]
async fn a_payload_that_stops_half_way_is_not_waited_for() {
    let stall = Duration::from_millis(200);
    let limits = Limits { stall, slowest_payload: 256 << 20, ..Limits::default() };
    let fixture = Fixture::with_limits(limits).await;
    for (offset, length) in [(0, 1 << 20), (SIZE, 1 << 20)] {
        let mut raw = Raw::using(fixture.tcp, "disk", true).await;
        raw.request(command::WRITE, 0, 5, offset, length).await;
        raw.send(&[1; 70_000]).await;
        raw.assert_closed().await;
    }
    assert_eq!(fixture.budget.available(), PayloadBudget::default().available());
    assert!(fixture.memory.contents(0, 1 << 20).iter().all(|byte| *byte == 0), "nothing written");
}

/// Everything in pieces of any size: what is parsed does not depend on how it arrives.
#[tokio::test]
async fn requests_may_come_in_any_pieces() {
    let mut random = Random::new("pieces");
    let fixture = Fixture::start().await;
    let mut stream = Vec::new();
    let mut expected = Vec::new();
    let lengths = [512u32, 4096, 65_024, 65_536, 66_048, 512, 200_704, 4096];
    for (cookie, length) in (0u64..).zip(lengths) {
        let offset = cookie * (1 << 20);
        stream.extend(header(command::WRITE, 0, cookie, offset, length));
        stream.extend_from_slice(&pattern(4, offset, length as usize));
        stream.extend(header(command::WRITE, 0, 1000, SIZE, length));
        stream.extend(vec![9; length as usize]);
        expected.push((offset, length));
    }
    for largest in [1, 29, 1000, 70_000, 1 << 20] {
        if largest == 1 {
            // Byte by byte is slow; the first few requests will do.
            fixture.memory.fill(0, &vec![0; 1 << 20]);
        }
        let whole: &[u8] = if largest == 1 { &stream[..12_000] } else { &stream };
        let mut raw = Raw::using(fixture.tcp, "disk", false).await;
        let mut sent = 0;
        while sent < whole.len() {
            let piece = (1 + random.below(largest) as usize).min(whole.len() - sent);
            raw.send(&whole[sent..sent + piece]).await;
            sent += piece;
        }
        let answers = if largest == 1 { 4 } else { 2 * expected.len() };
        for index in 0..answers {
            let answer = raw.simple().await;
            let even = index % 2 == 0;
            assert_eq!(answer, if even { (0, index as u64 / 2) } else { (ENOSPC, 1000) });
        }
        for (offset, length) in expected.iter().take(answers / 2) {
            let written = fixture.memory.contents(*offset, *length as usize);
            assert!(written == pattern(4, *offset, *length as usize), "at {offset}");
            fixture.memory.fill(*offset, &vec![0; *length as usize]);
        }
    }
}

/// A client that sends its first requests together with the handshake is still understood.
#[tokio::test]
async fn a_client_in_a_hurry() {
    let fixture = Fixture::start().await;
    let mut raw = fixture.raw().await;
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    bytes.extend(option_bytes(option::GO, &Raw::go_payload("disk")));
    bytes.extend(header(command::WRITE, 0, 1, 0, 512));
    bytes.extend([7; 512]);
    bytes.extend(header(command::READ, 0, 2, 0, 512));
    raw.send(&bytes).await;
    raw.take(18).await;
    raw.replies().await;
    raw.replies().await;
    assert_eq!(raw.simple().await, (0, 1));
    let (_, _, cookie, payload) = raw.chunk().await;
    assert_eq!((cookie, &payload[8..]), (2, &[7; 512][..]));
}

/// How often `bytes` could be sent, at most `most` times, before it took too long.
async fn sent_until_stuck(raw: &mut Raw, bytes: &[u8], most: usize) -> usize {
    for sent in 0..most {
        let patience = Duration::from_millis(500);
        if tokio::time::timeout(patience, raw.stream.write_all(bytes)).await.is_err() {
            return sent;
        }
    }
    most
}

/// A client that asks and asks and takes no answer is held back, and holds back nobody else.
#[tokio::test]
async fn a_client_that_takes_no_answers() {
    let limits = Limits { payload_bytes: 4 << 20, requests: 64, ..Limits::default() };
    let budget = PayloadBudget::new(4 << 20);
    let fixture = Fixture::with(limits, budget.clone()).await;
    let mut greedy = Raw::using(fixture.tcp, "disk", true).await;
    fixture.memory.fill(0, &pattern(5, 0, 1 << 20));
    let mut nagging = Raw::using(fixture.tcp, "disk", true).await;
    let reads = header(command::READ, 0, 1, 0, 1 << 20).repeat(10_000);
    let wrong = header(command::READ, 0x8000, 1, 0, 512).repeat(10_000);
    // Neither is read to the end, though what the sockets hold is much: the server stops taking
    // requests.
    assert!(sent_until_stuck(&mut greedy, &reads, 200).await < 200);
    assert!(sent_until_stuck(&mut nagging, &wrong, 200).await < 200);
    let statuses = fixture.server.connections();
    assert!(statuses[0].requests <= 64, "{statuses:?}");
    assert_eq!(budget.available(), 0, "the greedy one has it all");
    // The others go on past the exhausted budget.
    fixture.assert_healthy().await;
    drop(greedy);
    drop(nagging);
    until("release", || budget.available() == 4 << 20).await;
    assert_eq!(fixture.opened(), 3);
    until("closing", || fixture.closed() == 3).await;
}

#[tokio::test]
async fn one_connection_too_many_is_closed() {
    let fixture = Fixture::with_limits(Limits { connections: 2, ..Limits::default() }).await;
    let first = Raw::greeted(fixture.tcp).await;
    let _second = Raw::greeted(fixture.tcp).await;
    fixture.raw().await.assert_closed().await;
    drop(first);
    until("room", || fixture.server.connections().len() == 1).await;
    fixture.assert_healthy().await;
}

/// Noise of all kinds, from many at once.
#[tokio::test]
async fn noise() {
    let mut random = Random::new("noise");
    let fixture = Fixture::start().await;
    let mut tasks = Vec::new();
    for round in 0..60 {
        let (mut random, address) = (random.fork(), fixture.tcp);
        tasks.push(tokio::spawn(async move {
            let mut raw = match round % 3 {
                0 => Raw::connect(address).await,
                1 => Raw::greeted(address).await,
                _ => Raw::using(address, "disk", random.chance(2)).await,
            };
            for _ in 0..random.below(40) {
                let mut bytes = Vec::new();
                match random.below(4) {
                    0 => bytes.put_slice(b"IHAVEOPT"),
                    1 => {
                        let command = random.below(9) as u16;
                        let length = random.below(1 << 17) as u32;
                        let at = random.below(SIZE * 2);
                        bytes = header(command, random.below(32) as u16, random.next(), at, length);
                    }
                    _ => {
                        for _ in 0..random.below(2000) {
                            bytes.put_u8(random.next() as u8);
                        }
                    }
                }
                if raw.stream.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        }));
    }
    for task in tasks {
        within("noise", task).await.unwrap();
    }
    until("forgetting", || fixture.server.connections().is_empty()).await;
    assert_eq!(fixture.opened(), fixture.closed());
    fixture.assert_healthy().await;
}
