//! Pairing over the wire: four messages on one stream, driven by `srn_core::pairing`.
//!
//! ```text
//! initiator                                   responder
//!   Hi {version, name, proof}      ────────▶   checks the proof, reserves the token
//!   checks the proof, pins         ◀────────   Welcome {name, proof} or Refused {code}
//!   Confirm                        ────────▶   pins, spends the token
//!                                  ◀────────   Done
//! ```
//!
//! A cut before `Confirm` leaves the token usable; a cut before `Done` leaves both paired.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use srn_core::bytes::{Reader, Truncated, Writer};
use srn_core::ids::NodeId;
use srn_core::name::Name;
use srn_core::pairing::{
    EXPORTER_LABEL, Proof, Refusal, Side, TokenBook, Transcript, prove, verify,
};
use srn_core::time::Mono;
use srn_core::token::Token;
use srn_core::wire;

use crate::endpoint::{CLOSE_DONE, CLOSE_MISBEHAVED, Connection, Endpoint, refine};
use crate::error::LinkError;

/// The whole exchange must be over in this time.
const DEADLINE: Duration = Duration::from_secs(15);

/// Longest message of the exchange in bytes.
const MESSAGE_MAX: usize = 512;

const HI: u8 = 1;
const WELCOME: u8 = 2;
const REFUSED: u8 = 3;
const CONFIRM: u8 = 4;
const DONE: u8 = 5;

/// Who was paired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paired {
    /// The other node's key.
    pub peer: NodeId,
    /// Its name.
    pub name: Name,
    /// Its address as seen from here.
    pub addr: SocketAddr,
}

struct Streams {
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    peer: SocketAddr,
}

impl Streams {
    async fn write(&mut self, kind: u8, body: &[u8]) -> Result<(), LinkError> {
        let mut message = Vec::with_capacity(3 + body.len());
        message.put_u8(kind);
        message.put_u16(u16::try_from(body.len()).unwrap_or(u16::MAX));
        message.put(body);
        self.send.write_all(&message).await.map_err(|error| LinkError::gone(&self.peer, &error))
    }

    async fn read(&mut self) -> Result<(u8, Vec<u8>), LinkError> {
        let mut head = [0; 3];
        self.read_exact(&mut head).await?;
        let [kind, low, high] = head;
        let len = usize::from(u16::from_le_bytes([low, high]));
        if len > MESSAGE_MAX {
            return Err(LinkError::Misbehaved("a pairing message is too long".into()));
        }
        let mut body = vec![0; len];
        self.read_exact(&mut body).await?;
        Ok((kind, body))
    }

    async fn read_exact(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        self.receive.read_exact(into).await.map_err(|error| match error {
            quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => {
                refine(self.peer, &error)
            }
            other => LinkError::gone(&self.peer, &other),
        })
    }
}

fn transcript(connection: &Connection, own: NodeId, side: Side) -> Result<Transcript, LinkError> {
    let mut exporter = [0; 32];
    connection
        .quic
        .export_keying_material(&mut exporter, EXPORTER_LABEL, b"")
        .map_err(|_| LinkError::Misbehaved("the TLS session has no exporter".into()))?;
    let (initiator, responder) = match side {
        Side::Initiator => (own, connection.peer),
        Side::Responder => (connection.peer, own),
    };
    Ok(Transcript { exporter, initiator, responder })
}

fn introduction(name: &Name, proof: &Proof) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_u16(wire::VERSION);
    body.put_u8(u8::try_from(name.as_str().len()).unwrap_or(0));
    body.put(name.as_str().as_bytes());
    body.put(proof);
    body
}

fn read_introduction(body: &[u8]) -> Result<(Name, Proof), LinkError> {
    let mut reader = Reader::new(body);
    let mut read = || {
        let version = reader.u16()?;
        let len = usize::from(reader.u8()?);
        let name = reader.take(len)?.to_vec();
        Ok::<_, Truncated>((version, name, reader.array::<32>()?))
    };
    let (version, name, proof) =
        read().map_err(|error| LinkError::Misbehaved(format!("a pairing message {error}")))?;
    if version != wire::VERSION {
        return Err(wire::WireError::Version { theirs: version }.into());
    }
    let name = String::from_utf8_lossy(&name)
        .parse()
        .map_err(|_| LinkError::Misbehaved("a malformed node name".into()))?;
    Ok((name, proof))
}

/// Pairs with the node at `addr`, which made `token`. `pin` must make the peer's key durable; it is
/// called once the peer has proven that it knows the token, before the peer is told.
///
/// # Errors
/// [`LinkError::Refused`] with the reason, [`LinkError::Unproven`], [`LinkError::Unreachable`],
/// [`LinkError::Version`]; whatever `pin` gives.
pub async fn initiate<P, F>(
    endpoint: &Endpoint,
    addr: SocketAddr,
    own_name: &Name,
    token: &Token,
    pin: P,
) -> Result<Paired, LinkError>
where
    P: FnOnce(Paired) -> F,
    F: Future<Output = Result<(), LinkError>>,
{
    let connection = endpoint.dial_to_pair(addr).await?;
    if connection.peer == endpoint.id() {
        return Err(LinkError::Address(format!("{addr} is this node itself")));
    }
    let exchange = async {
        let (send, receive) =
            connection.quic.open_bi().await.map_err(|error| refine(addr, &error))?;
        let mut streams = Streams { send, receive, peer: addr };
        let transcript = transcript(&connection, endpoint.id(), Side::Initiator)?;
        let proof = prove(token, Side::Initiator, &transcript);
        streams.write(HI, &introduction(own_name, &proof)).await?;
        let (name, proof) = match streams.read().await? {
            (WELCOME, body) => read_introduction(&body)?,
            (REFUSED, body) => return Err(refusal(&body)),
            (kind, _) => return Err(unexpected(kind)),
        };
        if !verify(token, Side::Responder, &transcript, &proof) {
            return Err(LinkError::Unproven(addr));
        }
        let paired = Paired { peer: connection.peer, name, addr };
        pin(paired.clone()).await?;
        streams.write(CONFIRM, &[]).await?;
        match streams.read().await? {
            (DONE, _) => Ok(paired),
            (kind, _) => Err(unexpected(kind)),
        }
    };
    let result = tokio::time::timeout(DEADLINE, exchange)
        .await
        .unwrap_or_else(|_| Err(LinkError::gone(&addr, &"pairing took too long")));
    connection.quic.close(CLOSE_DONE, b"pairing ended");
    result
}

fn refusal(body: &[u8]) -> LinkError {
    match body.first().and_then(|code| Refusal::from_code(*code)) {
        Some(refusal) => refusal.into(),
        None => LinkError::Misbehaved("a refusal without a known reason".into()),
    }
}

fn unexpected(kind: u8) -> LinkError {
    LinkError::Misbehaved(format!("unexpected pairing message {kind}"))
}

/// Answers a node that wants to be paired. `now` is the monotonic clock that the tokens count in;
/// `pin` must make the peer's key durable.
///
/// # Errors
/// [`LinkError::Refused`] when the peer does not know an outstanding token (it is told why);
/// whatever `pin` gives.
pub async fn respond<P, F>(
    connection: Connection,
    own: NodeId,
    own_name: &Name,
    tokens: &Arc<Mutex<TokenBook>>,
    now: Mono,
    pin: P,
) -> Result<Paired, LinkError>
where
    P: FnOnce(Paired) -> F,
    F: Future<Output = Result<(), LinkError>>,
{
    let addr = connection.remote_address();
    let book = || tokens.lock().unwrap_or_else(PoisonError::into_inner);
    let exchange = async {
        let (send, receive) =
            connection.quic.accept_bi().await.map_err(|error| refine(addr, &error))?;
        let mut streams = Streams { send, receive, peer: addr };
        let (name, proof) = match streams.read().await? {
            (HI, body) => read_introduction(&body)?,
            (kind, _) => return Err(unexpected(kind)),
        };
        let transcript = transcript(&connection, own, Side::Responder)?;
        let checked = book().check(&transcript, &proof, now);
        let reservation = match checked {
            Ok(reservation) => reservation,
            Err(refusal) => {
                streams.write(REFUSED, &[refusal.code()]).await?;
                let _ = streams.send.finish();
                // The peer closes once it has read it.
                connection.quic.closed().await;
                return Err(refusal.into());
            }
        };
        let paired = Paired { peer: connection.peer, name, addr };
        let mut held = Held { tokens, reservation: Some(reservation) };
        let proof = held.reservation.as_ref().map_or([0; 32], |held| held.proof);
        streams.write(WELCOME, &introduction(own_name, &proof)).await?;
        match streams.read().await? {
            (CONFIRM, _) => {}
            (kind, _) => return Err(unexpected(kind)),
        }
        pin(paired.clone()).await?;
        held.confirm();
        streams.write(DONE, &[]).await?;
        let _ = streams.send.finish();
        connection.quic.closed().await;
        Ok(paired)
    };
    let result = tokio::time::timeout(DEADLINE, exchange)
        .await
        .unwrap_or_else(|_| Err(LinkError::gone(&addr, &"pairing took too long")));
    let code =
        if matches!(result, Err(LinkError::Misbehaved(_))) { CLOSE_MISBEHAVED } else { CLOSE_DONE };
    connection.quic.close(code, b"pairing ended");
    result
}

/// A reserved token, given back when the exchange ends before it was confirmed.
struct Held<'a> {
    tokens: &'a Arc<Mutex<TokenBook>>,
    reservation: Option<srn_core::pairing::Reservation>,
}

impl Held<'_> {
    fn confirm(&mut self) {
        if let Some(reservation) = self.reservation.take() {
            self.tokens.lock().unwrap_or_else(PoisonError::into_inner).confirm(reservation);
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(reservation) = self.reservation.take() {
            self.tokens.lock().unwrap_or_else(PoisonError::into_inner).release(reservation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Accepted, EndpointConfig};
    use crate::identity::Identity;
    use tokio::sync::mpsc;

    fn endpoint() -> (Endpoint, SocketAddr, mpsc::Receiver<Accepted>) {
        let config = EndpointConfig { listen: "127.0.0.1:0".parse().unwrap() };
        let endpoint = Endpoint::open(&config, Arc::new(Identity::generate().unwrap())).unwrap();
        let (to, accepted) = mpsc::channel(4);
        let listening = endpoint.clone();
        tokio::spawn(async move { listening.accept(to).await });
        let addr = endpoint.local_addr().unwrap();
        (endpoint, addr, accepted)
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn numbers_of_the_link_are_pinned() {
        use crate::endpoint::{CLOSE_NOT_PAIRED, CLOSE_REPLACED, CLOSE_VERSION};
        use crate::tls::{ALPN_DATA, ALPN_PAIR};
        assert_eq!((ALPN_DATA, ALPN_PAIR), (&b"srn/1"[..], &b"srn-pair/1"[..]));
        let codes = [CLOSE_DONE, CLOSE_NOT_PAIRED, CLOSE_MISBEHAVED, CLOSE_REPLACED, CLOSE_VERSION];
        assert_eq!(codes.map(u64::from), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn introduction_bytes_are_pinned() {
        let name: Name = "node-a".parse().unwrap();
        let bytes = introduction(&name, &[0x5a; 32]);
        assert_eq!(hex(&bytes), format!("0100066e6f64652d61{}", "5a".repeat(32)));
        assert_eq!(read_introduction(&bytes).unwrap(), (name, [0x5a; 32]));
        for cut in 0..bytes.len() {
            assert!(read_introduction(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    /// Whoever can reach the port can send these.
    #[test]
    fn fuzz_introductions() {
        use srn_testkit::fuzz::{Target, run, unsealed};
        let bytes = |name: &str| introduction(&name.parse().unwrap(), &[0x5a; 32]);
        let target = Target {
            name: "introductions",
            corpus: vec![bytes("node-a"), bytes(&"a".repeat(63))],
            seal: unsealed,
            cap: 16 << 20,
        };
        run(&target, |bytes, _| {
            let Ok((name, proof)) = read_introduction(bytes) else { return };
            assert!(bytes.starts_with(&introduction(&name, &proof)));
        });
        let refusals = Target { name: "refusals", corpus: vec![vec![1]], ..target };
        run(&refusals, |bytes, _| {
            let _ = refusal(bytes);
        });
    }

    async fn exactly(receive: &mut quinn::RecvStream, len: usize) -> String {
        let mut bytes = vec![0; len];
        receive.read_exact(&mut bytes).await.unwrap();
        hex(&bytes)
    }

    /// A responder that is written out byte by byte, against the real initiator: Hi is 44 bytes
    /// (a name of six), Confirm three.
    #[tokio::test]
    async fn pairing_bytes_of_the_initiator_are_pinned() {
        let (a, ..) = endpoint();
        let (b, b_addr, mut b_accepted) = endpoint();
        let token = Token::new([7; 15]);
        let responder = async {
            let Some(Accepted::Pair(connection)) = b_accepted.recv().await else { panic!() };
            let (mut send, mut receive) = connection.quic.accept_bi().await.unwrap();
            let transcript = transcript(&connection, b.id(), Side::Responder).unwrap();
            assert_eq!(transcript.initiator, a.id());
            let proof = prove(&token, Side::Initiator, &transcript);
            let expected = format!("01 2900 0100 06 6e6f64652d61 {}", hex(&proof));
            assert_eq!(exactly(&mut receive, 44).await, expected.replace(' ', ""));
            // Welcome: kind, length, version, length of the name, name, proof.
            let mut welcome = vec![2, 36, 0, 1, 0, 1, b'b'];
            welcome.extend(prove(&token, Side::Responder, &transcript));
            send.write_all(&welcome).await.unwrap();
            assert_eq!(exactly(&mut receive, 3).await, "040000");
            send.write_all(&[5, 0, 0]).await.unwrap();
            connection.quic.closed().await
        };
        let name = "node-a".parse().unwrap();
        let initiator = initiate(&a, b_addr, &name, &token, |_| async { Ok(()) });
        let (paired, closed) = tokio::join!(initiator, responder);
        let paired = paired.unwrap();
        assert_eq!((paired.peer, paired.name.as_str()), (b.id(), "b"));
        let quinn::ConnectionError::ApplicationClosed(close) = closed else { panic!("{closed}") };
        assert_eq!((close.error_code, &close.reason[..]), (CLOSE_DONE, &b"pairing ended"[..]));
    }

    /// An initiator that is written out byte by byte, against the real responder: first with a
    /// wrong proof, then with the right one.
    #[tokio::test]
    async fn pairing_bytes_of_the_responder_are_pinned() {
        let (a, ..) = endpoint();
        let (b, b_addr, mut b_accepted) = endpoint();
        let token = Token::new([7; 15]);
        let tokens: Arc<Mutex<TokenBook>> = Arc::default();
        tokens.lock().unwrap().add(token.clone(), Mono(0), 1_000_000);
        let responder = async {
            let name = "node-b".parse().unwrap();
            let mut results = Vec::new();
            for _ in 0..2 {
                let Some(Accepted::Pair(connection)) = b_accepted.recv().await else { panic!() };
                let pin = |_| async { Ok(()) };
                results.push(respond(connection, b.id(), &name, &tokens, Mono(1), pin).await);
            }
            results
        };
        let initiator = async {
            for right in [false, true] {
                let connection = a.dial_to_pair(b_addr).await.unwrap();
                let (mut send, mut receive) = connection.quic.open_bi().await.unwrap();
                let transcript = transcript(&connection, a.id(), Side::Initiator).unwrap();
                let mut proof = prove(&token, Side::Initiator, &transcript);
                proof[0] ^= u8::from(!right);
                let mut hi = vec![1, 36, 0, 1, 0, 1, b'a'];
                hi.extend(proof);
                send.write_all(&hi).await.unwrap();
                if !right {
                    assert_eq!(exactly(&mut receive, 4).await, "03010001");
                } else {
                    let proof = prove(&token, Side::Responder, &transcript);
                    let expected = format!("02 2900 0100 06 6e6f64652d62 {}", hex(&proof));
                    assert_eq!(exactly(&mut receive, 44).await, expected.replace(' ', ""));
                    send.write_all(&[4, 0, 0]).await.unwrap();
                    assert_eq!(exactly(&mut receive, 3).await, "050000");
                }
                connection.quic.close(CLOSE_DONE, b"");
            }
        };
        let (results, ()) = tokio::join!(responder, initiator);
        assert!(matches!(results[0], Err(LinkError::Refused(Refusal::Wrong))), "{results:?}");
        assert_eq!(results[1].as_ref().unwrap().name.as_str(), "a");
        assert_eq!(tokens.lock().unwrap().outstanding(Mono(2)), 0);
    }

    /// Somebody in between has a TLS session with either side and passes every byte on. The proofs
    /// are bound to their sessions, so nobody pins anything.
    #[tokio::test]
    async fn a_man_in_the_middle_pairs_with_nobody() {
        let (a, ..) = endpoint();
        let (middle, middle_addr, mut middle_accepted) = endpoint();
        let (b, b_addr, mut b_accepted) = endpoint();
        let token = Token::new([7; 15]);
        let tokens: Arc<Mutex<TokenBook>> = Arc::default();
        tokens.lock().unwrap().add(token.clone(), Mono(0), 1_000_000);
        let relay = async {
            let Some(Accepted::Pair(from_a)) = middle_accepted.recv().await else { panic!() };
            let to_b = middle.dial_to_pair(b_addr).await.unwrap();
            let (mut a_send, mut a_receive) = from_a.quic.accept_bi().await.unwrap();
            let (mut b_send, mut b_receive) = to_b.quic.open_bi().await.unwrap();
            let there = tokio::io::copy(&mut a_receive, &mut b_send);
            let back = tokio::io::copy(&mut b_receive, &mut a_send);
            let _ = tokio::join!(there, back);
        };
        let responder = async {
            let Some(Accepted::Pair(connection)) = b_accepted.recv().await else { panic!() };
            let name = "b".parse().unwrap();
            respond(connection, b.id(), &name, &tokens, Mono(1), |_| async {
                panic!("the middle was pinned")
            })
            .await
        };
        let name = "a".parse().unwrap();
        let initiator =
            initiate(&a, middle_addr, &name, &token, |_| async { panic!("the middle was pinned") });
        let (here, there, ()) = tokio::join!(initiator, responder, relay);
        assert!(matches!(here, Err(LinkError::Refused(Refusal::Wrong))), "{here:?}");
        assert!(matches!(there, Err(LinkError::Refused(Refusal::Wrong))), "{there:?}");
        assert_eq!(tokens.lock().unwrap().outstanding(Mono(2)), 1);
    }
}
