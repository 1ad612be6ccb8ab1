//! Two endpoints on loopback: pairing, pinned keys, sessions, frames, and peers that misbehave.

#![expect(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use srn_core::frame::envelope;
use srn_core::ids::{GroupId, NodeId, Seq};
use srn_core::name::Name;
use srn_core::pairing::{Refusal, TRIES_MAX, TokenBook};
use srn_core::time::{Mono, WallTime};
use srn_core::token::Token;
use srn_core::wire::{Hello, Message, StreamHeader};
use srn_link::diagnose::{Reach, probe};
use srn_link::pairing::{Paired, initiate, respond};
use srn_link::{
    Accepted, Endpoint, EndpointConfig, Identity, LinkError, Session, SessionEvent, endpoint,
};
use tokio::sync::mpsc;

const DEADLINE: Duration = Duration::from_secs(20);

struct Node {
    endpoint: Endpoint,
    addr: SocketAddr,
    accepted: mpsc::Receiver<Accepted>,
    tokens: Arc<Mutex<TokenBook>>,
    name: Name,
}

fn node(name: &str) -> Node {
    let identity = Arc::new(Identity::generate().unwrap());
    let config = EndpointConfig { listen: "127.0.0.1:0".parse().unwrap() };
    let endpoint = Endpoint::open(&config, identity).unwrap();
    let (to, accepted) = mpsc::channel(8);
    tokio::spawn({
        let endpoint = endpoint.clone();
        async move { endpoint.accept(to).await }
    });
    let addr = endpoint.local_addr().unwrap();
    Node { endpoint, addr, accepted, tokens: Arc::default(), name: name.parse().unwrap() }
}

impl Node {
    fn issue(&self, secret: u8) -> Token {
        let token = Token::new([secret; 15]);
        self.tokens.lock().unwrap().add(token.clone(), Mono(0), 1_000_000);
        token
    }

    /// Answers one node that wants to pair.
    async fn respond(&mut self, now: Mono) -> Result<Paired, LinkError> {
        let Some(Accepted::Pair(connection)) = self.accepted.recv().await else {
            panic!("nobody wants to pair");
        };
        let id = self.endpoint.id();
        respond(connection, id, &self.name, &self.tokens, now, |_| async { Ok(()) }).await
    }

    async fn connection(&mut self) -> endpoint::Connection {
        match self.accepted.recv().await {
            Some(Accepted::Data(connection)) => connection,
            other => panic!("no data connection: {other:?}"),
        }
    }
}

async fn pair(
    initiator: &Node,
    responder: &mut Node,
    token: &Token,
    now: Mono,
) -> (Result<Paired, LinkError>, Result<Paired, LinkError>) {
    let addr = responder.addr;
    tokio::time::timeout(DEADLINE, async {
        tokio::join!(
            initiate(&initiator.endpoint, addr, &initiator.name, token, |_| async { Ok(()) }),
            responder.respond(now),
        )
    })
    .await
    .expect("pairing in time")
}

fn hello(name: &str) -> Hello {
    Hello { name: name.parse().unwrap(), software: "test".into(), wall_time: WallTime(1) }
}

async fn sessions(
    a: &Node,
    b: &mut Node,
) -> ((Session, mpsc::Receiver<SessionEvent>), (Session, mpsc::Receiver<SessionEvent>)) {
    let (id, addr) = (b.endpoint.id(), b.addr);
    let (one, other) = tokio::join!(
        async {
            let connection = a.endpoint.dial(addr, id).await.unwrap();
            Session::begin(connection, hello("a")).await.unwrap()
        },
        async {
            let connection = b.connection().await;
            Session::begin(connection, hello("b")).await.unwrap()
        },
    );
    (one, other)
}

async fn event(events: &mut mpsc::Receiver<SessionEvent>) -> SessionEvent {
    tokio::time::timeout(DEADLINE, events.recv()).await.expect("event in time").expect("event")
}

#[tokio::test]
async fn a_token_pairs_two_nodes_once() {
    let (a, mut b) = (node("a"), node("b"));
    let token = b.issue(7);
    let (here, there) = pair(&a, &mut b, &token, Mono(1)).await;
    let (here, there) = (here.unwrap(), there.unwrap());
    assert_eq!((here.peer, here.name.as_str()), (b.endpoint.id(), "b"));
    assert_eq!((there.peer, there.name.as_str()), (a.endpoint.id(), "a"));
    let (here, there) = pair(&a, &mut b, &token, Mono(2)).await;
    for result in [here, there] {
        assert!(matches!(result, Err(LinkError::Refused(Refusal::Used))), "{result:?}");
    }
}

#[tokio::test]
async fn wrong_and_expired_tokens_are_told_apart() {
    let (a, mut b) = (node("a"), node("b"));
    let token = b.issue(7);
    let expired = pair(&a, &mut b, &token, Mono(2_000_000)).await;
    assert!(matches!(expired.0, Err(LinkError::Refused(Refusal::Expired))), "{:?}", expired.0);
    let wrong = Token::new([8; 15]);
    for _ in 0..TRIES_MAX {
        let result = pair(&a, &mut b, &wrong, Mono(1)).await.0;
        assert!(matches!(result, Err(LinkError::Refused(Refusal::Wrong))), "{result:?}");
    }
    let void = pair(&a, &mut b, &token, Mono(1)).await.0;
    assert!(matches!(void, Err(LinkError::Refused(Refusal::Void))), "{void:?}");
}

#[tokio::test]
async fn a_node_does_not_pair_with_itself() {
    let a = node("a");
    let token = a.issue(7);
    let result = initiate(&a.endpoint, a.addr, &a.name, &token, |_| async { Ok(()) }).await;
    assert!(matches!(result, Err(LinkError::Address(_))), "{result:?}");
}

#[tokio::test]
async fn what_cannot_be_pinned_is_not_paired() {
    let (a, mut b) = (node("a"), node("b"));
    let token = b.issue(7);
    let refuse = |_| async { Err(LinkError::Identity("disk full".into())) };
    let addr = b.addr;
    let (here, there) =
        tokio::join!(initiate(&a.endpoint, addr, &a.name, &token, refuse), b.respond(Mono(1)),);
    assert!(matches!(here, Err(LinkError::Identity(_))), "{here:?}");
    assert!(there.is_err());
    // The token was not spent.
    let (here, _) = pair(&a, &mut b, &token, Mono(1)).await;
    here.unwrap();
}

#[tokio::test]
async fn another_key_at_the_address_is_named() {
    let (a, b) = (node("a"), node("b"));
    let expected = NodeId([1; 32]);
    match a.endpoint.dial(b.addr, expected).await {
        Err(LinkError::WrongKey { found, expected: named, .. }) => {
            assert_eq!((found, named), (b.endpoint.id(), expected));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn unpaired_nodes_are_turned_away() {
    let (a, mut b) = (node("a"), node("b"));
    let (id, addr) = (b.endpoint.id(), b.addr);
    let (result, ()) = tokio::join!(
        async {
            let connection = a.endpoint.dial(addr, id).await.unwrap();
            Session::begin(connection, hello("a")).await
        },
        async { b.connection().await.refuse_unpaired() },
    );
    assert!(matches!(result, Err(LinkError::NotPaired(_))), "{:?}", result.map(|_| ()));
}

#[tokio::test]
async fn nobody_there_is_said_in_words() {
    let a = node("a");
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap();
    let result = a.endpoint.dial(addr, NodeId([1; 32])).await;
    let text = result.unwrap_err().to_string();
    assert!(text.contains(&addr.to_string()) && text.contains("firewall"), "{text}");
    // Nobody there at all is heard from the system, and sooner.
    drop(silent);
    let result = a.endpoint.dial(addr, NodeId([1; 32])).await;
    let text = result.unwrap_err().to_string();
    assert!(text.contains("nothing listens"), "{text}");
}

#[tokio::test]
async fn a_node_answers_whoever_asks_what_there_is() {
    let a = node("a");
    assert_eq!(probe(a.addr).await, Reach::Answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_and_frames_arrive_in_order() {
    let (a, mut b) = (node("a"), node("b"));
    let ((one, _one_events), (other, mut events)) = sessions(&a, &mut b).await;
    assert_eq!(one.hello().name.as_str(), "b");
    assert_eq!(other.hello().name.as_str(), "a");
    let group = GroupId([3; 16]);
    for seq in 0..1000 {
        one.send(&Message::Ack { group, seq: Seq(seq) }).await.unwrap();
        match event(&mut events).await {
            SessionEvent::Message(Message::Ack { seq: got, .. }) => assert_eq!(got, Seq(seq)),
            other => panic!("{other:?}"),
        }
    }
    let header = StreamHeader { group, nonce: 5, first: Seq(1) };
    let mut writer = one.open_frames(&header).await.unwrap();
    let SessionEvent::Frames(got, mut reader) = event(&mut events).await else { panic!() };
    assert_eq!(got, header);
    let sending = tokio::spawn(async move {
        for n in 0..200u32 {
            let content = Bytes::from(vec![n.to_le_bytes()[0]; 256 * 1024]);
            let envelope = envelope::Envelope {
                segment: 0,
                head_len: 10,
                encoded_blocks: 0,
                stored_len: 256 * 1024,
                hash: srn_core::ids::FrameHash([0; 16]),
                durable: Seq(0),
            };
            let fixed = Bytes::copy_from_slice(&envelope.encode(&[]));
            let front = Bytes::from(n.to_le_bytes().repeat(3)[..10].to_vec());
            writer.write(&mut [fixed, front, content]).await.unwrap();
        }
        writer.finish();
        // Until everything has arrived.
        one
    });
    for n in 0..200u32 {
        let frame = reader.next(|len| vec![0; len]).await.unwrap().expect("frame");
        assert_eq!(&frame.front[..4], n.to_le_bytes());
        assert!(frame.content.iter().all(|byte| *byte == n.to_le_bytes()[0]));
        assert_eq!(frame.wire_len, 64 + 10 + 256 * 1024);
    }
    assert!(reader.next(|len| vec![0; len]).await.unwrap().is_none());
    drop(sending.await.unwrap());
}

/// Jumbo packets cost half of what others do; a path that takes them has to be used.
#[tokio::test]
async fn packets_grow_to_what_the_path_takes() {
    let (a, mut b) = (node("a"), node("b"));
    let ((one, _one), (_other, mut events)) = sessions(&a, &mut b).await;
    let header = StreamHeader { group: GroupId([3; 16]), nonce: 5, first: Seq(1) };
    let mut writer = one.open_frames(&header).await.unwrap();
    let SessionEvent::Frames(_, reader) = event(&mut events).await else { panic!() };
    // Nobody reads: what fits into the windows is enough for the probes to be answered.
    writer.write(&mut [Bytes::from(vec![0; 1 << 20])]).await.unwrap();
    tokio::time::timeout(DEADLINE, async {
        while one.path().packet_bytes < 6500 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("packets have {} bytes", one.path().packet_bytes));
    drop(reader);
}

#[tokio::test]
async fn the_end_of_a_session_is_told_with_its_reason() {
    let (a, mut b) = (node("a"), node("b"));
    let ((one, mut one_events), (_other, mut events)) = sessions(&a, &mut b).await;
    one.send(&Message::Goodbye { unpaired: false, text: "down".into() }).await.unwrap();
    one.close("going down").await;
    // What was said before is heard before.
    assert!(matches!(event(&mut events).await, SessionEvent::Message(Message::Goodbye { .. })));
    let SessionEvent::Closed(why) = event(&mut events).await else { panic!() };
    let text = why.to_string();
    assert!(text.contains("going down") || text.contains("ended the session"), "{text}");
    assert!(matches!(event(&mut one_events).await, SessionEvent::Closed(_)));
    assert!(one.send(&Message::Drain { group: GroupId([0; 16]) }).await.is_err());
}

#[tokio::test]
async fn malformed_frames_are_refused_before_they_cost_memory() {
    let (a, mut b) = (node("a"), node("b"));
    let ((one, _events), (_other, mut events)) = sessions(&a, &mut b).await;
    let header = StreamHeader { group: GroupId([3; 16]), nonce: 5, first: Seq(1) };
    for bad in [vec![0; 64], {
        let mut huge = b"SRNe\x01\x00\x00\x00".to_vec();
        huge.resize(64, 0xff);
        huge
    }] {
        let mut writer = one.open_frames(&header).await.unwrap();
        let SessionEvent::Frames(_, mut reader) = event(&mut events).await else { panic!() };
        writer.write(&mut [Bytes::from(bad)]).await.unwrap();
        let result = reader.next(|_| -> Vec<u8> { panic!("a buffer was asked for") }).await;
        assert!(matches!(result, Err(LinkError::Misbehaved(_))), "{:?}", result.map(|_| ()));
    }
}
