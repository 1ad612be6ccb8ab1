//! Both handshake machines, byte by byte and against each other.

use bytes::{BufMut, BytesMut};

use super::constants::{option, option_reply};
use super::*;

/// A server machine with its export and everything it said.
struct Server {
    machine: Handshake,
    input: BytesMut,
    out: Vec<u8>,
    exports: Vec<(String, Result<ExportInfo, OpenError>)>,
    session: Option<Session>,
    aborted: bool,
    /// How often TLS was started.
    secured: u32,
}

fn disk() -> ExportInfo {
    ExportInfo { description: "first disk".into(), ..ExportInfo::writable(1 << 20) }
}

impl Server {
    fn new() -> Self {
        Self::with_limits(HandshakeLimits::default())
    }

    fn with_limits(limits: HandshakeLimits) -> Self {
        let mut out = Vec::new();
        let machine = Handshake::new(limits, &mut out);
        let exports = vec![
            ("disk".to_owned(), Ok(disk())),
            (String::new(), Ok(ExportInfo { allocation: false, ..disk() })),
            ("secret".to_owned(), Err(OpenError::Policy("not yours".into()))),
            ("taken".to_owned(), Err(OpenError::Busy("by another".into()))),
            ("broken".to_owned(), Err(OpenError::Unavailable("disk failed".into()))),
        ];
        let input = BytesMut::new();
        Self { machine, input, out, exports, session: None, aborted: false, secured: 0 }
    }

    /// Past the greeting, to a client that has to start TLS.
    fn guarded() -> Self {
        let mut server = Self::new();
        server.machine = Handshake::requiring_tls(HandshakeLimits::default(), &mut Vec::new());
        server.feed(&[0, 0, 0, 3]).unwrap();
        server.out.clear();
        server
    }

    /// Past the greeting, with the usual client flags.
    fn greeted() -> Self {
        let mut server = Self::new();
        server.feed(&[0, 0, 0, 3]).unwrap();
        server.out.clear();
        server
    }

    fn find(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let found = self.exports.iter().find(|(known, _)| known == name);
        found.map_or(Err(OpenError::NotFound), |(_, export)| export.clone())
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        self.input.extend_from_slice(bytes);
        loop {
            let session = match self.machine.step(&mut self.input, &mut self.out)? {
                Event::NeedInput => return Ok(()),
                Event::Aborted => {
                    self.aborted = true;
                    return Ok(());
                }
                Event::StartTls => {
                    self.machine.secured();
                    self.secured += 1;
                    continue;
                }
                Event::List => {
                    let list: Vec<_> = self.exports.iter().take(2).map(summary).collect();
                    self.machine.answer(Answer::List(&list), &mut self.out)?
                }
                Event::Describe(name) => {
                    let found = self.find(&name);
                    self.machine.answer(Answer::Described(found.as_ref()), &mut self.out)?
                }
                Event::Open(name) => {
                    let found = self.find(&name);
                    self.machine.answer(Answer::Opened(found.as_ref()), &mut self.out)?
                }
            };
            if session.is_some() {
                self.session = session;
                return Ok(());
            }
        }
    }

    fn said(&mut self) -> String {
        hex(&std::mem::take(&mut self.out))
    }

    /// Sends an option and returns the types and payloads of the replies.
    fn ask(&mut self, option: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.feed(&option_bytes(option, payload)).unwrap();
        replies(option, &std::mem::take(&mut self.out))
    }

    fn kinds(&mut self, option: u32, payload: &[u8]) -> Vec<u32> {
        self.ask(option, payload).into_iter().map(|(kind, _)| kind).collect()
    }
}

fn summary((name, info): &(String, Result<ExportInfo, OpenError>)) -> ExportSummary {
    let description = info.as_ref().map(|info| info.description.clone()).unwrap_or_default();
    ExportSummary { name: name.clone(), description }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.put_u32(option);
    bytes.put_u32(payload.len() as u32);
    bytes.put_slice(payload);
    bytes
}

fn replies(option: u32, mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(hex(&bytes[..8]), "0003e889045565a9");
        assert_eq!(bytes[8..12], option.to_be_bytes());
        let kind = u32::from_be_bytes(bytes[12..16].try_into().unwrap());
        let length = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        replies.push((kind, bytes[20..20 + length].to_vec()));
        bytes = &bytes[20 + length..];
    }
    replies
}

fn name_and_requests(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_u32(name.len() as u32);
    payload.put_slice(name.as_bytes());
    payload.put_u16(requests.len() as u16);
    requests.iter().for_each(|request| payload.put_u16(*request));
    payload
}

fn name_and_queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_u32(name.len() as u32);
    payload.put_slice(name.as_bytes());
    payload.put_u32(queries.len() as u32);
    for query in queries {
        payload.put_u32(query.len() as u32);
        payload.put_slice(query.as_bytes());
    }
    payload
}

#[test]
fn the_greeting_is_pinned() {
    let mut server = Server::new();
    // NBDMAGIC, IHAVEOPT, fixed newstyle and no zeroes
    assert_eq!(server.said(), "4e42444d41474943".to_owned() + "49484156454f5054" + "0003");
}

#[test]
fn export_name_is_pinned() {
    for (flags, padding) in [(3, 0), (1, 124), (0, 124)] {
        let mut server = Server::new();
        server.out.clear();
        server.feed(&[0, 0, 0, flags]).unwrap();
        server.feed(&option_bytes(option::EXPORT_NAME, b"disk")).unwrap();
        let expected = "0000000000100000".to_owned() + "006d" + &"00".repeat(padding);
        assert_eq!(server.said(), expected);
        let session = server.session.unwrap();
        assert_eq!((session.structured, session.allocation), (false, false));
    }
}

#[test]
fn go_is_pinned() {
    let mut server = Server::greeted();
    server.feed(&option_bytes(option::STRUCTURED_REPLY, &[])).unwrap();
    assert_eq!(server.said(), "0003e889045565a9".to_owned() + "00000008" + "00000001" + "00000000");
    server.feed(&option_bytes(option::GO, &name_and_requests("disk", &[3]))).unwrap();
    let head = "0003e889045565a9".to_owned() + "00000007";
    let expected = [
        // NBD_INFO_EXPORT: 1 MiB; flush, FUA, trim, zeroes, DF
        head.clone() + "00000003" + "0000000c" + "0000" + "0000000000100000" + "00ed",
        // NBD_INFO_BLOCK_SIZE: 512, 4096, 32 MiB
        head.clone() + "00000003" + "0000000e" + "0003" + "00000200" + "00001000" + "02000000",
        head + "00000001" + "00000000",
    ];
    assert_eq!(server.said(), expected.concat());
    let session = server.session.unwrap();
    assert_eq!(session, Session { export: disk(), structured: true, allocation: false });
}

#[test]
fn info_tells_what_was_asked_for_and_does_not_open() {
    let mut server = Server::greeted();
    let payload = name_and_requests("disk", &[1, 2, 99]);
    let told = server.ask(option::INFO, &payload);
    let info = |kind: u16, rest: &[u8]| (option_reply::INFO, [&kind.to_be_bytes(), rest].concat());
    assert_eq!(told[1], info(1, b"disk"));
    assert_eq!(told[2], info(2, b"first disk"));
    assert_eq!(told.last().unwrap(), &(option_reply::ACK, vec![]));
    assert!(server.session.is_none());
    // The same in GO, as the document demands.
    assert_eq!(server.ask(option::GO, &payload), told);
    assert!(server.session.is_some());
}

#[test]
fn refusals_of_an_export() {
    for (name, kind, text) in [
        ("none", option_reply::ERR_UNKNOWN, "no such export"),
        ("secret", option_reply::ERR_POLICY, "not permitted: not yours"),
        ("taken", option_reply::ERR_POLICY, "in use: by another"),
        ("broken", option_reply::ERR_UNKNOWN, "not available: disk failed"),
    ] {
        let mut server = Server::greeted();
        for option in [option::INFO, option::GO] {
            let told = server.ask(option, &name_and_requests(name, &[]));
            assert_eq!(told, [(kind, text.as_bytes().to_vec())]);
        }
        // Negotiation goes on, until an option that cannot be refused.
        assert_eq!(server.kinds(option::INFO, &name_and_requests("disk", &[])).len(), 3);
        let error = server.feed(&option_bytes(option::EXPORT_NAME, name.as_bytes())).unwrap_err();
        assert!(matches!(error, HandshakeError::Refused(_)), "{error}");
        assert!(server.out.is_empty(), "nothing may be sent");
    }
}

#[test]
fn listing() {
    let mut server = Server::greeted();
    let told = server.ask(option::LIST, &[]);
    assert_eq!(told[0], (option_reply::SERVER, b"\0\0\0\x04diskfirst disk".to_vec()));
    assert_eq!(told[1], (option_reply::SERVER, b"\0\0\0\0first disk".to_vec()));
    assert_eq!(told[2], (option_reply::ACK, vec![]));
    assert_eq!(server.kinds(option::LIST, b"x"), [option_reply::ERR_INVALID]);
}

#[test]
fn contexts_are_selected_for_one_export_and_replaced_each_time() {
    const SET: u32 = option::SET_META_CONTEXT;
    let (ack, context) = (option_reply::ACK, option_reply::META_CONTEXT);
    let base: &[&str] = &["base:allocation"];
    let allocation_after = |steps: &[(&str, &[&str])], go: &str| {
        let mut server = Server::greeted();
        server.kinds(option::STRUCTURED_REPLY, &[]);
        for (name, queries) in steps {
            server.kinds(SET, &name_and_queries(name, queries));
        }
        server.kinds(option::GO, &name_and_requests(go, &[]));
        server.session.unwrap().allocation
    };
    assert!(allocation_after(&[("disk", base)], "disk"));
    assert!(!allocation_after(&[("disk", base)], ""), "another export");
    assert!(!allocation_after(&[("", base)], ""), "export cannot");
    assert!(!allocation_after(&[("disk", base), ("disk", &[])], "disk"), "replaced by nothing");
    assert!(!allocation_after(&[("disk", base), ("none", base)], "disk"), "replaced by failure");
    assert!(!allocation_after(&[("disk", &["base:"])], "disk"), "no wildcard when setting");
    assert!(allocation_after(&[("none", base), ("disk", base)], "disk"));

    let mut server = Server::greeted();
    let queries = name_and_queries("disk", base);
    assert_eq!(server.kinds(SET, &queries), [option_reply::ERR_INVALID], "not structured yet");
    server.kinds(option::STRUCTURED_REPLY, &[]);
    let told = server.ask(SET, &queries);
    assert_eq!(told[0], (context, b"\0\0\0\x01base:allocation".to_vec()));
    for (option, queries, expected) in [
        (option::LIST_META_CONTEXT, &[][..], vec![context, ack]),
        (option::LIST_META_CONTEXT, &["base:"], vec![context, ack]),
        (option::LIST_META_CONTEXT, base, vec![context, ack]),
        (option::LIST_META_CONTEXT, &["qemu:"], vec![ack]),
        (SET, &[], vec![ack]),
        (SET, &["qemu:dirty-bitmap:x", "nonsense"], vec![ack]),
    ] {
        assert_eq!(server.kinds(option, &name_and_queries("disk", queries)), expected);
    }
    let unknown = server.kinds(SET, &name_and_queries("none", base));
    assert_eq!(unknown, [option_reply::ERR_UNKNOWN]);
}

#[test]
fn unknown_options_are_consumed_and_refused() {
    let mut server = Server::greeted();
    let unsupported = [option_reply::ERR_UNSUP];
    assert_eq!(server.kinds(option::STARTTLS, &[]), [option_reply::ERR_POLICY]);
    assert_eq!(server.kinds(option::STARTTLS, &[7; 4096]), [option_reply::ERR_INVALID]);
    assert_eq!(server.kinds(option::EXTENDED_HEADERS, &[]), unsupported);
    assert_eq!(server.kinds(4, &[1; 100]), unsupported);
    assert_eq!(server.kinds(u32::MAX, &[1; 65_536]), unsupported);
    assert_eq!(server.kinds(0, &[]), unsupported);
    assert_eq!(server.kinds(99, &[1; 65_537]), [option_reply::ERR_TOO_BIG]);
    assert_eq!(server.kinds(option::GO, &[1; 1 << 20]), [option_reply::ERR_TOO_BIG]);
    assert_eq!(server.kinds(option::LIST, &[]).len(), 3, "still in place");
    assert_eq!(server.kinds(option::ABORT, b"ignored"), [option_reply::ACK]);
    assert!(server.aborted);
}

#[test]
fn names_of_full_length_work_and_longer_ones_do_not() {
    let longest = "n".repeat(4096);
    let mut server = Server::greeted();
    server.exports.push((longest.clone(), Ok(disk())));
    assert_eq!(server.kinds(option::INFO, &name_and_requests(&longest, &[1])).len(), 4);
    let longer = "n".repeat(4097);
    let too_big = [option_reply::ERR_TOO_BIG];
    assert_eq!(server.kinds(option::INFO, &name_and_requests(&longer, &[])), too_big);
    server.kinds(option::STRUCTURED_REPLY, &[]);
    let many: Vec<_> = std::iter::repeat_n(longest.as_str(), 14).collect();
    let queries = name_and_queries("disk", &many);
    assert_eq!(server.kinds(option::SET_META_CONTEXT, &queries), [option_reply::ACK]);
    server.feed(&option_bytes(option::EXPORT_NAME, longest.as_bytes())).unwrap();
    assert!(server.session.is_some());

    let mut server = Server::greeted();
    let error = server.feed(&option_bytes(option::EXPORT_NAME, longer.as_bytes())).unwrap_err();
    assert_eq!(error, HandshakeError::ExportName(MalformedOption::LongString));
}

#[test]
fn malformed_options_are_refused_and_parsing_goes_on() {
    let mut server = Server::greeted();
    server.kinds(option::STRUCTURED_REPLY, &[]);
    let invalid = [option_reply::ERR_INVALID];
    for option in [option::INFO, option::GO, option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        for payload in [&b""[..], b"\0\0\0", b"\0\0\0\x09disk\0\0", b"\xff\xff\xff\xffdisk"] {
            assert_eq!(server.kinds(option, payload), invalid, "{option}");
        }
    }
    assert_eq!(server.kinds(option::STRUCTURED_REPLY, b"x"), invalid);
    assert_eq!(server.kinds(option::INFO, &name_and_requests("a\0b", &[])), invalid);
    assert_eq!(server.kinds(option::LIST, &[]).len(), 3);
}

#[test]
fn what_ends_a_handshake() {
    let mut server = Server::new();
    assert_eq!(server.feed(&[0, 0, 0, 4]), Err(HandshakeError::UnknownFlags(4)));
    let mut server = Server::greeted();
    let error = server.feed(b"GET / HTTP/1.1\r\n\r\n").unwrap_err();
    assert!(matches!(error, HandshakeError::OptionMagic(_)));

    let mut server = Server::with_limits(HandshakeLimits { options: 3, ..Default::default() });
    server.feed(&[0, 0, 0, 3]).unwrap();
    let one = option_bytes(99, &[]);
    assert_eq!(server.feed(&one.repeat(3)), Ok(()));
    assert_eq!(server.feed(&one), Err(HandshakeError::TooManyOptions(3)));

    let limits = HandshakeLimits { total_bytes: 1000, option_bytes: 500, ..Default::default() };
    let mut server = Server::with_limits(limits);
    server.feed(&[0, 0, 0, 3]).unwrap();
    assert_eq!(server.feed(&option_bytes(99, &[0; 900])), Ok(()));
    assert_eq!(server.feed(&option_bytes(99, &[0; 100])), Ok(()));
    let error = server.feed(&option_bytes(99, &[0; 1])).unwrap_err();
    assert_eq!(error, HandshakeError::TooManyBytes(1000));
    // A length alone must not make the server wait for, or keep, what it will not take.
    let mut server = Server::greeted();
    let mut lie = option_bytes(99, &[]);
    lie.splice(12..16, u32::MAX.to_be_bytes());
    assert!(matches!(server.feed(&lie), Err(HandshakeError::TooManyBytes(_))));
}

#[test]
fn a_handshake_may_come_in_any_pieces() {
    let mut whole = vec![0, 0, 0, 3];
    whole.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    whole.extend(option_bytes(77, &[3; 70_000]));
    whole.extend(option_bytes(
        option::SET_META_CONTEXT,
        &name_and_queries("disk", &["base:allocation"]),
    ));
    whole.extend(option_bytes(option::GO, &name_and_requests("disk", &[1, 2, 3])));
    whole.extend(b"first request");
    let run = |piece: usize| {
        let mut server = Server::new();
        for piece in whole.chunks(piece) {
            if server.session.is_some() {
                server.input.extend_from_slice(piece);
            } else {
                server.feed(piece).unwrap();
            }
        }
        assert_eq!(&server.input[..], b"first request");
        assert!(server.session.as_ref().unwrap().allocation);
        server.said()
    };
    let at_once = run(usize::MAX);
    for piece in [1, 2, 3, 7, 16, 17, 4096] {
        assert_eq!(run(piece), at_once, "in pieces of {piece}");
    }
}

#[test]
fn answers_must_fit_their_questions() {
    let mut server = Server::greeted();
    let misuse = Err(HandshakeError::Misuse);
    let mut out = Vec::new();
    assert_eq!(server.machine.answer(Answer::List(&[]), &mut out), misuse);
    server.input.extend_from_slice(&option_bytes(option::LIST, &[]));
    let event = server.machine.step(&mut server.input, &mut out).unwrap();
    assert_eq!(event, Event::List);
    assert_eq!(server.machine.answer(Answer::Described(Ok(&disk())), &mut out), misuse);
    assert_eq!(server.machine.answer(Answer::List(&[]), &mut out), Ok(None));
}

/// Lets the two machines talk until the client is satisfied.
fn talk(server: &mut Server, mut client: ClientHandshake) -> Result<ClientEvent, String> {
    let (mut to_client, mut to_server) = (BytesMut::new(), Vec::new());
    for _ in 0..100 {
        to_client.extend_from_slice(&std::mem::take(&mut server.out));
        let event = client.step(&mut to_client, &mut to_server);
        if !to_server.is_empty() {
            server.feed(&std::mem::take(&mut to_server)).map_err(|error| error.to_string())?;
        }
        match event.map_err(|error| error.to_string())? {
            ClientEvent::NeedInput => {}
            event => return Ok(event),
        }
    }
    panic!("no end of talking");
}

fn wish(export: &str, structured: bool, contexts: &[&str]) -> ClientHandshake {
    let contexts = contexts.iter().map(|context| (*context).to_owned()).collect();
    ClientHandshake::new(Wish { export: export.into(), structured, contexts, tls: false })
}

#[test]
fn client_and_server_understand_each_other() {
    let mut server = Server::new();
    let client = wish("disk", true, &["qemu:dirty-bitmap:x", "base:allocation"]);
    let event = talk(&mut server, client).unwrap();
    let ClientEvent::Ready(negotiated) = event else { panic!("{event:?}") };
    assert_eq!(negotiated.export, disk());
    assert!(negotiated.structured);
    assert_eq!(negotiated.contexts, [MetaContext { id: 1, name: "base:allocation".into() }]);
    assert_eq!(negotiated.canonical_name.as_deref(), Some("disk"));
    assert!(server.session.unwrap().allocation);

    let mut server = Server::new();
    let event = talk(&mut server, wish("disk", false, &["base:allocation"])).unwrap();
    let ClientEvent::Ready(negotiated) = event else { panic!("{event:?}") };
    assert!(!negotiated.structured && negotiated.contexts.is_empty());
    assert_eq!(negotiated.flags & constants::transmission_flag::SEND_DF, 0);

    let mut server = Server::new();
    let event = talk(&mut server, ClientHandshake::list(false)).unwrap();
    let ClientEvent::Listed(exports) = event else { panic!("{event:?}") };
    assert_eq!(exports.len(), 2);
    assert!(server.aborted);

    let refusal = talk(&mut Server::new(), wish("secret", true, &[])).unwrap_err();
    assert_eq!(refusal, "server refuses export \"secret\": not permitted: not yours");
    let unknown = talk(&mut Server::new(), wish("none", true, &[])).unwrap_err();
    assert_eq!(unknown, "export \"none\" is not available: no such export");
}

#[test]
fn the_client_falls_back_to_older_ways() {
    // A server that knows no option but the export name, fixed newstyle or not.
    for (flags, zeroes) in [(0u16, 124), (1, 124), (2, 0), (3, 0)] {
        let mut client = wish("disk", true, &["base:allocation"]);
        let (mut input, mut out) = (BytesMut::new(), Vec::new());
        input.extend_from_slice(b"NBDMAGICIHAVEOPT");
        input.put_u16(flags);
        let mut step = |input: &mut BytesMut| {
            out.clear();
            let event = client.step(input, &mut out).unwrap();
            (event, out.clone())
        };
        let (_, mut said) = step(&mut input);
        assert_eq!(said[..4], u32::from(flags).to_be_bytes());
        said.drain(..4);
        if flags & 1 != 0 {
            for option in [option::STRUCTURED_REPLY, option::GO] {
                assert_eq!(said[8..12], option.to_be_bytes());
                input.put_u64(constants::OPTION_REPLY_MAGIC);
                input.put_u32(option);
                input.put_u32(option_reply::ERR_UNSUP);
                input.put_u32(0);
                (_, said) = step(&mut input);
            }
        }
        assert_eq!(said, option_bytes(option::EXPORT_NAME, b"disk"));
        input.put_u64(1 << 30);
        input.put_u16(0b101);
        input.put_bytes(0, zeroes);
        let (event, _) = step(&mut input);
        let ClientEvent::Ready(negotiated) = event else { panic!("{event:?}") };
        assert_eq!(negotiated.export.size, 1 << 30);
        assert!(negotiated.export.can_flush && !negotiated.structured);
        assert_eq!(negotiated.export.block_sizes, BlockSizes::UNNEGOTIATED);
        assert!(input.is_empty());
    }
}

#[test]
fn nothing_is_told_before_tls_where_it_is_required() {
    let mut server = Server::guarded();
    let required = [option_reply::ERR_TLS_REQD];
    assert_eq!(server.kinds(option::LIST, &[]), required);
    assert_eq!(server.kinds(option::GO, &[0; 6]), required);
    assert_eq!(server.kinds(option::INFO, &[0; 6]), required);
    assert_eq!(server.kinds(option::STRUCTURED_REPLY, &[]), required);
    assert_eq!(
        server.kinds(option::SET_META_CONTEXT, &name_and_queries("disk", &["base:allocation"])),
        required
    );
    assert_eq!(server.kinds(option::LIST_META_CONTEXT, &[7; 4000]), required, "payload consumed");
    assert_eq!(server.kinds(99, &[1; 65_536]), required);
    assert_eq!(server.kinds(99, &[1; 65_537]), [option_reply::ERR_TOO_BIG]);
    assert_eq!(server.kinds(option::STARTTLS, &[7; 100]), [option_reply::ERR_INVALID]);
    assert_eq!(server.kinds(option::LIST, &[]), required, "still in place");
    assert_eq!(server.secured, 0);
    assert_eq!(server.kinds(option::STARTTLS, &[]), [option_reply::ACK]);
    assert_eq!(server.secured, 1);
    assert_eq!(server.kinds(option::LIST, &[]).len(), 3);
    assert_eq!(server.kinds(option::STARTTLS, &[]), [option_reply::ERR_INVALID], "once");
    assert_eq!(server.secured, 1);
    let error = Server::guarded().feed(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert_eq!(error, Err(HandshakeError::NotSecured));
    let mut leaving = Server::guarded();
    leaving.feed(&option_bytes(option::ABORT, &[])).unwrap();
    assert!(leaving.aborted);
}

/// CVE-2021-3716: what a stranger injected before TLS counted as said by the client after it.
#[test]
fn nothing_said_before_tls_is_remembered_after_it() {
    let mut server = Server::guarded();
    assert_eq!(server.kinds(option::STRUCTURED_REPLY, &[]), [option_reply::ERR_TLS_REQD]);
    assert_eq!(server.kinds(option::STARTTLS, &[]), [option_reply::ACK]);
    let contexts = name_and_queries("disk", &["base:allocation"]);
    assert_eq!(
        server.kinds(option::SET_META_CONTEXT, &contexts),
        [option_reply::ERR_INVALID],
        "no structured replies"
    );

    // Plain text right behind the wish, in the same packet.
    let mut injected = option_bytes(option::STARTTLS, &[]);
    injected.extend_from_slice(&option_bytes(option::STRUCTURED_REPLY, &[]));
    assert_eq!(Server::guarded().feed(&injected), Err(HandshakeError::PlainText));
    let mut server = Server::guarded();
    let mut cut = option_bytes(option::STARTTLS, &[]);
    cut.push(0x49);
    assert_eq!(server.feed(&cut), Err(HandshakeError::PlainText));
    assert_eq!(server.secured, 0);
}

#[test]
fn a_client_that_wants_tls_gets_it_or_nothing() {
    let secure = || {
        let (export, contexts) = ("disk".to_owned(), vec!["base:allocation".to_owned()]);
        ClientHandshake::new(Wish { export, structured: true, contexts, tls: true })
    };
    let talk_tls = |server: &mut Server, mut client: ClientHandshake| {
        let (mut input, mut said, mut secured) = (BytesMut::new(), Vec::new(), false);
        for _ in 0..20 {
            input.extend_from_slice(&std::mem::take(&mut server.out));
            let event = client.step(&mut input, &mut said)?;
            assert!(
                secured || said.len() <= 4 + 16,
                "in plain text only flags and the wish: {said:?}"
            );
            if !said.is_empty() {
                server.feed(&std::mem::take(&mut said)).unwrap();
            }
            match event {
                ClientEvent::NeedInput => {}
                ClientEvent::StartTls => secured = true,
                event => return Ok((event, secured)),
            }
        }
        panic!("no end of talking");
    };
    let greeting = |server: &mut Server| {
        server.out.clear();
        server.machine = Handshake::requiring_tls(HandshakeLimits::default(), &mut server.out);
    };
    let mut server = Server::new();
    greeting(&mut server);
    let (event, secured) = talk_tls(&mut server, secure()).unwrap();
    let ClientEvent::Ready(negotiated) = event else { panic!("{event:?}") };
    assert!(secured && negotiated.structured && negotiated.contexts.len() == 1);
    let mut server = Server::new();
    greeting(&mut server);
    let (event, secured) = talk_tls(&mut server, ClientHandshake::list(true)).unwrap();
    assert!(secured && matches!(event, ClientEvent::Listed(_)), "{event:?}");

    // Downgrades: a server, or somebody between, that says it has no TLS.
    let refused = talk_tls(&mut Server::new(), secure()).unwrap_err();
    assert!(matches!(refused, ClientHandshakeError::TlsRefused(_)), "{refused}");
    for (flags, kind) in [(0u16, None), (3, Some(option_reply::ERR_UNSUP))] {
        let (mut client, mut input, mut out) = (secure(), BytesMut::new(), Vec::new());
        input.extend_from_slice(b"NBDMAGICIHAVEOPT");
        input.put_u16(flags);
        let mut outcome = client.step(&mut input, &mut out);
        if let Some(kind) = kind {
            input.put_u64(constants::OPTION_REPLY_MAGIC);
            input.put_u32(option::STARTTLS);
            input.put_u32(kind);
            input.put_u32(0);
            outcome = client.step(&mut input, &mut out);
        }
        let refused = outcome.unwrap_err();
        assert!(matches!(refused, ClientHandshakeError::TlsRefused(_)), "{refused}");
    }
    // An answer with more behind it, which would count as said under TLS.
    let (mut client, mut input, mut out) = (secure(), BytesMut::new(), Vec::new());
    input.extend_from_slice(b"NBDMAGICIHAVEOPT\0\x03");
    client.step(&mut input, &mut out).unwrap();
    for option in [option::STARTTLS, option::STRUCTURED_REPLY] {
        input.put_u64(constants::OPTION_REPLY_MAGIC);
        input.put_u32(option);
        input.put_u32(option_reply::ACK);
        input.put_u32(0);
    }
    let error = client.step(&mut input, &mut out).unwrap_err();
    assert_eq!(error, ClientHandshakeError::Violation(HandshakeViolation::PlainText));
}
