//! What no peer may do to the decoders, and what they make of arbitrary bytes.
//!
//! The random tests print their failing input; `PROPTEST_RNG_SEED` replays a run.

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;

use super::constants::{
    BASE_ALLOCATION, CHUNK_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, chunk, option,
    option_reply,
};
use super::*;

/// What a client makes of a server that greets well and then says `replies`.
fn client_against(replies: &[u8]) -> Result<ClientEvent, ClientHandshakeError> {
    let contexts = vec![BASE_ALLOCATION.to_owned()];
    let wish = Wish { export: "disk".into(), structured: true, contexts, tls: false };
    let mut client = ClientHandshake::new(wish);
    let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
    input.extend_from_slice(replies);
    client.step(&mut input, &mut Vec::new())
}

fn reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(OPTION_REPLY_MAGIC);
    bytes.put_u32(option);
    bytes.put_u32(kind);
    bytes.put_u32(payload.len() as u32);
    bytes.put_slice(payload);
    bytes
}

fn structured() -> Vec<u8> {
    reply(option::STRUCTURED_REPLY, option_reply::ACK, &[])
}

/// Replies up to GO, and then these.
fn at_go(replies: &[Vec<u8>]) -> Vec<u8> {
    let context = reply(option::SET_META_CONTEXT, option_reply::ACK, &[]);
    [structured(), context, replies.concat()].concat()
}

fn violation(bytes: &[u8]) -> HandshakeViolation {
    match client_against(bytes) {
        Err(ClientHandshakeError::Violation(violation)) => violation,
        other => panic!("expected a violation, got {other:?}"),
    }
}

#[test]
fn servers_that_break_the_handshake() {
    use HandshakeViolation as V;
    const GO: u32 = option::GO;
    const INFO: u32 = option_reply::INFO;
    let ack = || reply(GO, option_reply::ACK, &[]);
    let export = |size: u64| {
        let mut payload = vec![0, 0];
        payload.put_u64(size);
        payload.put_u16(1);
        reply(GO, INFO, &payload)
    };
    let sizes = |minimum: u32, preferred: u32, maximum: u32| {
        let mut payload = vec![0, 3];
        [minimum, preferred, maximum].into_iter().for_each(|size| payload.put_u32(size));
        reply(GO, INFO, &payload)
    };
    assert!(matches!(client_against(&at_go(&[export(1), ack()])), Ok(ClientEvent::Ready(_))));

    let context = |payload: &[u8]| {
        let context = reply(option::SET_META_CONTEXT, option_reply::META_CONTEXT, payload);
        [structured(), context].concat()
    };
    let mut twice = context(b"\0\0\0\x01base:allocation");
    twice.extend(context(b"\0\0\0\x02base:allocation").split_off(20));
    let mut long = structured();
    long.put_u64(OPTION_REPLY_MAGIC);
    long.put_slice(&[0, 0, 0, 10, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff]);

    for (bytes, expected) in [
        (b"HTTP/1.1 400".to_vec(), V::ReplyMagic),
        (reply(GO, option_reply::ACK, &[]), V::StrangeOption),
        (reply(option::STRUCTURED_REPLY, INFO, &[]), V::StrangeReply),
        (reply(option::STRUCTURED_REPLY, 77, &[]), V::StrangeReply),
        (long, V::LongReply),
        (context(b"\0\0\0\x01qemu:dirty-bitmap:x"), V::StrangeContext),
        (twice, V::StrangeContext),
        (context(b"\0\0\0"), V::Malformed),
        (context(b"\0\0\0\x01base:\xff"), V::Malformed),
        (at_go(&[ack()]), V::NoExportInfo),
        (at_go(&[export(u64::MAX), ack()]), V::NegativeSize),
        (at_go(&[export(1 << 63), ack()]), V::NegativeSize),
        (at_go(&[sizes(0, 4096, 4096)]), V::BlockSizes),
        (at_go(&[sizes(3, 4096, 4096)]), V::BlockSizes),
        (at_go(&[sizes(512, 4096, 512)]), V::BlockSizes),
        (at_go(&[sizes(1 << 17, 1 << 17, 1 << 20)]), V::BlockSizes),
        (at_go(&[reply(GO, INFO, &[])]), V::Malformed),
        (at_go(&[reply(GO, INFO, &[0, 0, 1])]), V::Malformed),
        (at_go(&[reply(GO, INFO, &[0; 13])]), V::Malformed),
        (at_go(&[reply(GO, INFO, &[0, 3, 0])]), V::Malformed),
        (at_go(&[reply(GO, INFO, b"\0\x01na\0me")]), V::Malformed),
        (at_go(&[reply(GO, option_reply::SERVER, &[0; 4])]), V::StrangeReply),
    ] {
        assert_eq!(violation(&bytes), expected);
    }
    // Information of strange types is none of the client's business.
    let strange = reply(GO, INFO, &[0x77, 0x77, 1, 2, 3]);
    assert!(client_against(&at_go(&[strange, export(1), ack()])).is_ok());
}

#[test]
fn a_server_cannot_talk_for_ever() {
    let mut client = ClientHandshake::list(false);
    let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
    let line = reply(option::LIST, option_reply::SERVER, &[[0, 0, 0, 4], *b"disk"].concat());
    let end = (0..1_000_000).find_map(|_| {
        input.extend_from_slice(&line);
        client.step(&mut input, &mut Vec::new()).err()
    });
    let too_many = ClientHandshakeError::Violation(HandshakeViolation::TooManyReplies);
    assert_eq!(end, Some(too_many));
}

#[test]
fn greetings_that_are_none() {
    let greet = |bytes: &[u8]| {
        let wish = Wish { export: String::new(), structured: true, contexts: vec![], tls: false };
        let mut input = BytesMut::from(bytes);
        ClientHandshake::new(wish).step(&mut input, &mut Vec::new())
    };
    assert!(matches!(greet(b"SSH-2.0-"), Err(ClientHandshakeError::NotNbd(_))));
    assert!(matches!(greet(b"NBDMAGICNBDMAGIC"), Err(ClientHandshakeError::NotNbd(_))));
    let oldstyle = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53";
    assert_eq!(greet(oldstyle), Err(ClientHandshakeError::Oldstyle));
    assert_eq!(greet(b"NBDMAGIC"), Ok(ClientEvent::NeedInput));
}

fn chunk_header(flags: u16, kind: u16, length: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(CHUNK_MAGIC);
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(9);
    bytes.put_u32(length);
    bytes
}

#[test]
fn chunks_of_impossible_length() {
    let decode = |flags, kind, length| {
        ReplyHeader::decode(&chunk_header(flags, kind, length)).map(|header| header.is_some())
    };
    let bad = |kind, length| Err(ReplyViolation::ChunkLength { kind, length });
    for (kind, length) in [
        (chunk::NONE, 1),
        (chunk::OFFSET_DATA, 8),
        (chunk::OFFSET_DATA, 0),
        (chunk::OFFSET_HOLE, 11),
        (chunk::OFFSET_HOLE, 13),
        (chunk::BLOCK_STATUS, 4),
        (chunk::BLOCK_STATUS, 13),
        (chunk::BLOCK_STATUS, 4 + 8 * ((1 << 20) + 1)),
        (chunk::ERROR, 5),
        (chunk::ERROR, 1 << 20),
        (chunk::ERROR_OFFSET, 13),
        (chunk::ERROR_BIT + 77, u32::MAX),
    ] {
        assert_eq!(decode(1, kind, length), bad(kind, length));
    }
    assert_eq!(decode(0, chunk::NONE, 0), Err(ReplyViolation::NotDone));
    assert_eq!(decode(1, 3, 8), Err(ReplyViolation::StrangeChunk(3)));
    assert_eq!(decode(0xffff, chunk::NONE, 0), Ok(true), "unknown flags are ignored");
    assert_eq!(decode(1, chunk::ERROR_BIT + 77, 8), Ok(true));
    assert_eq!(ReplyHeader::decode(&[1, 2, 3, 4]), Err(ReplyViolation::Magic(0x0102_0304)));
}

#[test]
fn error_chunks() {
    let decode = |bytes: &[u8]| decode_error(bytes);
    assert_eq!(decode(b"\0\0\0\x05\0\x02noX"), Ok((ErrorCode::Io, "no".into())));
    assert_eq!(decode(b"\0\0\0\x63\0\0"), Ok((ErrorCode::Invalid, String::new())));
    for bytes in [&b"\0\0\0\0\0\0"[..], b"\0\0\0\x05\0\x03no", b"\0\0\0\x05\xff\xff", b"\0"] {
        assert_eq!(decode(bytes), Err(ReplyViolation::ErrorChunk));
    }
}

#[test]
fn status_chunks() {
    let decode = |extents: &[(u32, u32)], requested, one| {
        let mut bytes = vec![0, 0, 0, 7];
        for (length, flags) in extents {
            bytes.put_u32(*length);
            bytes.put_u32(*flags);
        }
        decode_status(&bytes, requested, one).map(|(context, extents)| {
            assert_eq!(context, 7);
            extents.len()
        })
    };
    let bad = Err(ReplyViolation::Extents);
    assert_eq!(decode(&[(512, 0), (512, 3)], 1024, false), Ok(2));
    assert_eq!(decode(&[(512, 0), (u32::MAX, 3)], 1024, false), Ok(2), "the last may be longer");
    assert_eq!(decode(&[(1024, 0), (512, 3)], 1024, false), bad, "after the end");
    assert_eq!(decode(&[(0, 0)], 1024, false), bad);
    assert_eq!(decode(&[], 1024, false), bad);
    assert_eq!(decode(&[(1024, 0)], 1024, true), Ok(1));
    assert_eq!(decode(&[(1025, 0)], 1024, true), bad);
    assert_eq!(decode(&[(512, 0), (512, 3)], 1024, true), bad);
}

#[test]
fn coverage_accepts_any_order_and_nothing_twice() {
    let mut coverage = Coverage::new(1000, 100);
    assert_eq!(coverage.arrive(1050, 50), Ok(50..100));
    assert_eq!(coverage.finish(), Err(ReplyViolation::Missing));
    assert_eq!(coverage.arrive(1000, 10), Ok(0..10));
    for (offset, length) in [(1000, 1), (1009, 1), (1005, 20), (1049, 2), (1099, 1), (1000, 100)] {
        assert_eq!(coverage.arrive(offset, length), Err(ReplyViolation::Overlap));
    }
    for (offset, length) in [(999, 5), (1100, 1), (1099, 2), (1010, 0), (u64::MAX, 2), (0, 1)] {
        assert_eq!(coverage.arrive(offset, length), Err(ReplyViolation::OutOfRange));
    }
    assert_eq!(coverage.arrive(1010, u32::MAX), Err(ReplyViolation::OutOfRange));
    assert_eq!(coverage.arrive(1010, 40), Ok(10..50));
    assert_eq!(coverage.finish(), Ok(()));
}

#[test]
fn coverage_does_not_grow_without_bound() {
    let mut coverage = Coverage::new(0, u32::MAX);
    let refused = (0..1_000_000u64).find_map(|index| coverage.arrive(index * 2, 1).err());
    assert_eq!(refused, Some(ReplyViolation::TooManyPieces));
}

/// Arbitrary bytes, often beginning like something real.
fn noise(starts: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        proptest::sample::select(starts).prop_map(<[u8]>::to_vec),
        proptest::collection::vec(any::<u8>(), 0..40),
        proptest::collection::vec(Just(0u8), 0..8),
    ];
    proptest::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

const OPTIONS: &[&[u8]] = &[
    b"IHAVEOPT",
    b"\0\0\0\x03",
    b"\0\0\0\x06\0\0\0\x0a\0\0\0\x04disk\0\0",
    b"\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0",
    b"\0\0\0\x08\0\0\0\0",
    b"\0\0\0\x0a\0\0\0\x1f\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation",
    b"\0\0\0\x03\0\0\0\0",
    b"\0\0\0\x05\0\0\0\0",
];

const REPLIES: &[&[u8]] = &[
    b"NBDMAGICIHAVEOPT\0\x03",
    b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0",
    b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0",
    b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0",
    b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x10\0\0\0\x01",
    b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
];

fn session() -> Session {
    Session { export: ExportInfo::writable(1 << 20), structured: true, allocation: true }
}

proptest! {
    #[test]
    fn no_client_breaks_the_server_machine(bytes in noise(OPTIONS), piece in 1usize..64) {
        let mut out = Vec::new();
        let limits = HandshakeLimits::default();
        let mut machine = match piece % 2 {
            0 => Handshake::new(limits, &mut out),
            _ => Handshake::requiring_tls(limits, &mut out),
        };
        let mut input = BytesMut::new();
        let info = ExportInfo::writable(1 << 20);
        'pieces: for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            loop {
                let answer = match machine.step(&mut input, &mut out) {
                    Err(_) | Ok(Event::Aborted) => break 'pieces,
                    Ok(Event::NeedInput) => break,
                    Ok(Event::StartTls) => {
                        machine.secured();
                        continue;
                    }
                    Ok(Event::List) => Answer::List(&[]),
                    Ok(Event::Describe(_)) => Answer::Described(Ok(&info)),
                    Ok(Event::Open(_)) => Answer::Opened(Ok(&info)),
                };
                if machine.answer(answer, &mut out).unwrap().is_some() {
                    break 'pieces;
                }
            }
            prop_assert!(input.len() <= 16 + (64 << 10) + 64, "{} bytes kept", input.len());
        }
    }

    #[test]
    fn no_server_breaks_the_client_machine(bytes in noise(REPLIES), piece in 1usize..64) {
        let contexts = vec![BASE_ALLOCATION.to_owned()];
        let wish = Wish { export: "disk".into(), structured: true, contexts, tls: piece % 2 == 0 };
        let mut machine = ClientHandshake::new(wish);
        let (mut input, mut out) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            match machine.step(&mut input, &mut out) {
                Ok(ClientEvent::NeedInput | ClientEvent::StartTls) => {}
                Ok(ClientEvent::Ready(negotiated)) => {
                    prop_assert!(negotiated.export.block_sizes.are_lawful());
                    break;
                }
                _ => break,
            }
        }
    }

    #[test]
    fn what_an_export_gets_to_see_is_lawful(
        flags: u16,
        command in 0u16..10,
        offset in prop_oneof![0u64..(1 << 21), any::<u64>()],
        length in prop_oneof![0u32..(1 << 21), any::<u32>()],
    ) {
        let header = RequestHeader { flags, command, cookie: 1, offset, length };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        prop_assert_eq!(RequestHeader::decode(&bytes), Ok(Some(header)));
        let ranged = match header.judge(&session()) {
            Verdict::Run(Operation::Flush) => return Ok(()),
            Verdict::Run(_) => true,
            _ => false,
        };
        if ranged {
            prop_assert!(length > 0 && length % 512 == 0 && offset % 512 == 0);
            prop_assert!(offset + u64::from(length) <= 1 << 20);
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_reply(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = ReplyHeader::decode(&bytes);
        let _ = RequestHeader::decode(&bytes);
        let _ = decode_error(&bytes);
        let _ = decode_hole(&bytes);
        let _ = decode_status(&bytes, 4096, false);
        let mut simple = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        simple.extend_from_slice(&bytes);
        let decoded = ReplyHeader::decode(&simple).unwrap();
        prop_assert_eq!(decoded.is_some(), bytes.len() >= 12);
    }

    /// The clever interval set against one flag a byte.
    #[test]
    fn coverage_agrees_with_a_dumb_model(
        arrivals in proptest::collection::vec((0u64..80, 0u32..40), 0..40)
    ) {
        let mut coverage = Coverage::new(10, 50);
        let mut model = [false; 50];
        for (offset, length) in arrivals {
            let inside = offset >= 10 && length > 0 && offset + u64::from(length) <= 60;
            let range = (offset.saturating_sub(10)) as usize;
            let fresh = inside && model[range..range + length as usize].iter().all(|seen| !seen);
            prop_assert_eq!(coverage.arrive(offset, length).is_ok(), fresh);
            if fresh {
                model[range..range + length as usize].fill(true);
            }
            prop_assert_eq!(coverage.finish().is_ok(), model.iter().all(|seen| *seen));
        }
    }

    #[test]
    fn tidy_extents_tell_the_same(
        extents in proptest::collection::vec((0u64..20, any::<bool>(), any::<bool>()), 0..20),
        length in 1u32..100,
        most in 1usize..8,
    ) {
        let given: Vec<_> = extents
            .into_iter()
            .map(|(length, hole, zero)| StatusExtent { length, hole, zero })
            .collect();
        let bytes = |extents: &[StatusExtent]| -> Vec<u32> {
            let one = |extent: &StatusExtent| {
                std::iter::repeat_n(extent.flags(), extent.length as usize)
            };
            extents.iter().flat_map(one).collect()
        };
        let told = bytes(&given);
        match tidy_extents(&given, length, most) {
            None => prop_assert!(told.is_empty()),
            Some(tidy) => {
                prop_assert!(tidy.len() <= most);
                prop_assert!(tidy.iter().all(|extent| extent.length > 0));
                prop_assert!(tidy.windows(2).all(|pair| !pair[0].same_status(&pair[1])));
                let tidy = bytes(&tidy);
                prop_assert!(tidy.len() <= length as usize);
                prop_assert_eq!(&tidy[..], &told[..tidy.len()]);
            }
        }
    }
}
