//! The node's one UDP port: it listens and dials.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use srn_core::ids::NodeId;

use crate::congestion::RateBased;
use crate::diagnose::{self, Reach};
use crate::error::LinkError;
use crate::identity::{Identity, node_id_of};
use crate::tls::{self, ALPN_DATA, ALPN_PAIR, Expect};

/// A silent peer is given up after this time.
const IDLE: Duration = Duration::from_secs(10);

/// Something is sent at least this often, so that a dead link is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// A handshake that takes longer is given up.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);

/// Data on its way in one stream, in bytes: four times what 200 Mbit/s at 80 ms holds. More would
/// let a burst of lost packets tear so many gaps that quinn gives the connection up.
const STREAM_WINDOW: u32 = 8 << 20;

/// Data on its way in all streams, in bytes.
const CONNECTION_WINDOW: u32 = 24 << 20;

/// Data handed to quinn and not acknowledged, in bytes.
pub(crate) const SEND_WINDOW: u64 = 12 << 20;

/// Largest packet that is taken, and that path discovery tries: ten of them fill one 64 KiB
/// segmentation offload, which is the most that quinn hands to the kernel at once. Larger ones
/// would be refused there, taken for lost, and bring the path down to 1200. On a path that takes
/// them they halve the processor time of packets of 1472.
const MTU_MAX: u16 = 6500;

/// Data that may be on its way before the path is known, in bytes: ten of the largest packets. With
/// the usual ten of 1200 a probe for larger packets fills the window, and quinn does not send the
/// close of a connection through a full one: the peer would learn of it from silence.
const INITIAL_WINDOW: u64 = 10 * MTU_MAX as u64;

/// Kernel buffers of the socket, in bytes. Beyond the system's limit with the privilege for that:
/// the usual 208 KiB are full before a reader has woken up, and what does not fit is lost.
const SOCKET_BUFFER: usize = 4 << 20;

/// A handshake that takes longer than this makes us ask what answers at the address at all.
const ASK_AFTER: Duration = Duration::from_secs(2);

/// Handshakes that may be under way at once, from peers that are not known yet.
const HANDSHAKES_MAX: usize = 64;

/// Application error codes in a QUIC close.
pub(crate) const CLOSE_DONE: VarInt = VarInt::from_u32(0);
pub(crate) const CLOSE_NOT_PAIRED: VarInt = VarInt::from_u32(1);
pub(crate) const CLOSE_MISBEHAVED: VarInt = VarInt::from_u32(2);
pub(crate) const CLOSE_REPLACED: VarInt = VarInt::from_u32(3);
pub(crate) const CLOSE_VERSION: VarInt = VarInt::from_u32(4);

/// How the port is used.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// Address and port to listen on.
    pub listen: SocketAddr,
}

/// The port.
#[derive(Debug, Clone)]
pub struct Endpoint {
    endpoint: quinn::Endpoint,
    identity: Arc<Identity>,
    transport: Arc<TransportConfig>,
    handshakes: Arc<tokio::sync::Semaphore>,
}

/// A connection that came in.
#[derive(Debug)]
pub enum Accepted {
    /// From a node that wants to go on with a pairing that exists; its key is proven.
    Data(Connection),
    /// From a node that wants to be paired.
    Pair(Connection),
}

/// A connection with a proven key at the other end.
#[derive(Debug, Clone)]
pub struct Connection {
    pub(crate) quic: quinn::Connection,
    /// The key at the other end.
    pub peer: NodeId,
    /// Whether this node dialled.
    pub dialled: bool,
}

fn transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    let congestion = RateBased { initial_window: INITIAL_WINDOW };
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MTU_MAX);
    config
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .max_concurrent_bidi_streams(VarInt::from_u32(4))
        .max_concurrent_uni_streams(VarInt::from_u32(1024))
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(congestion))
        .mtu_discovery_config(Some(discovery));
    config
}

fn socket(listen: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    let domain = socket2::Domain::for_address(listen);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
    if listen.is_ipv6() {
        // One port for both families.
        let _ = socket.set_only_v6(false);
    }
    // As much as the system allows: what is refused costs speed, not safety.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    }
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    Ok(socket.into())
}

impl Endpoint {
    /// Opens the port. Must be called inside a tokio runtime, in which its work will be done.
    ///
    /// # Errors
    /// [`LinkError::Io`] when the port cannot be had.
    pub fn open(config: &EndpointConfig, identity: Arc<Identity>) -> Result<Self, LinkError> {
        let transport = Arc::new(transport());
        let crypto = QuicServerConfig::try_from(tls::server(&identity)?)
            .map_err(|error| LinkError::Identity(error.to_string()))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(transport.clone());
        server.max_incoming(256);
        let doing = || format!("listening on UDP {}", config.listen);
        let socket =
            socket(config.listen).map_err(|source| LinkError::Io { doing: doing(), source })?;
        let mut port = quinn::EndpointConfig::default();
        // What a peer's path discovery may try: 1472 unless said.
        port.max_udp_payload_size(MTU_MAX)
            .map_err(|error| LinkError::Address(format!("packets of {MTU_MAX}: {error}")))?;
        let endpoint =
            quinn::Endpoint::new(port, Some(server), socket, Arc::new(quinn::TokioRuntime))
                .map_err(|source| LinkError::Io { doing: doing(), source })?;
        let handshakes = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
        Ok(Self { endpoint, identity, transport, handshakes })
    }

    /// This node's id.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.identity.id()
    }

    /// The address that the port really has.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn local_addr(&self) -> Result<SocketAddr, LinkError> {
        self.endpoint
            .local_addr()
            .map_err(|source| LinkError::Io { doing: "asking for the own address".into(), source })
    }

    /// Waits for connections for ever, and hands on each that has shook hands. Ends when the
    /// endpoint is closed or nobody takes them any more.
    pub async fn accept(&self, to: tokio::sync::mpsc::Sender<Accepted>) {
        while let Some(incoming) = self.endpoint.accept().await {
            let Ok(permit) = self.handshakes.clone().try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            if to.is_closed() {
                return;
            }
            let to = to.clone();
            tokio::spawn(async move {
                let from = incoming.remote_address();
                match tokio::time::timeout(HANDSHAKE, shake(incoming)).await {
                    Ok(Ok(accepted)) => {
                        let _ = to.send(accepted).await;
                    }
                    Ok(Err(error)) => log::info!("handshake with {from}: {error}"),
                    Err(_) => log::info!("handshake with {from}: took too long"),
                }
                drop(permit);
            });
        }
    }

    /// Dials a paired node.
    ///
    /// # Errors
    /// [`LinkError::Unreachable`], [`LinkError::WrongKey`], [`LinkError::NotPaired`],
    /// [`LinkError::Version`].
    pub async fn dial(&self, addr: SocketAddr, peer: NodeId) -> Result<Connection, LinkError> {
        let seen = Arc::new(std::sync::Mutex::new(None));
        let quic = self.connect(addr, Expect::Pinned(peer, seen.clone()), ALPN_DATA).await;
        let found = *seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(found) = found {
            return Err(LinkError::WrongKey { addr, expected: peer, found });
        }
        Ok(Connection { quic: quic?, peer, dialled: true })
    }

    /// Dials a node to pair with it.
    pub(crate) async fn dial_to_pair(&self, addr: SocketAddr) -> Result<Connection, LinkError> {
        let quic = self.connect(addr, Expect::Any, ALPN_PAIR).await?;
        let peer = peer_of(&quic)?;
        Ok(Connection { quic, peer, dialled: true })
    }

    async fn connect(
        &self,
        addr: SocketAddr,
        expect: Expect,
        alpn: &[u8],
    ) -> Result<quinn::Connection, LinkError> {
        let crypto = QuicClientConfig::try_from(tls::client(&self.identity, expect, alpn)?)
            .map_err(|error| LinkError::Identity(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(self.transport.clone());
        // The name is sent nowhere that matters and checked by nobody.
        let connecting = self
            .endpoint
            .connect_with(config, addr, "srn")
            .map_err(|error| LinkError::Address(format!("cannot dial {addr}: {error}")))?;
        let shaking = tokio::time::timeout(HANDSHAKE, connecting);
        let asking = async {
            tokio::time::sleep(ASK_AFTER).await;
            diagnose::probe(addr).await
        };
        tokio::pin!(shaking, asking);
        let mut found = None;
        loop {
            tokio::select! {
                result = &mut shaking => return match (result, found) {
                    (Ok(Ok(connection)), _) => Ok(connection),
                    (Ok(Err(quinn::ConnectionError::TimedOut)) | Err(_), Some(reach)) => {
                        Err(unreachable(addr, &reach))
                    }
                    (Ok(Err(error)), _) => Err(refine(addr, &error)),
                    (Err(_), None) => Err(LinkError::gone(&addr, &"the handshake took too long")),
                },
                reach = &mut asking, if found.is_none() => {
                    // What the system says of the way will not change while we wait.
                    if matches!(reach, Reach::Refused | Reach::NoRoute(_)) {
                        return Err(unreachable(addr, &reach));
                    }
                    found = Some(reach);
                }
            }
        }
    }

    /// Closes every connection, and waits a moment for the peers to hear of it.
    pub async fn close(&self) {
        self.endpoint.close(CLOSE_DONE, b"closing");
        let _ = tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}

fn unreachable(addr: SocketAddr, reach: &Reach) -> LinkError {
    LinkError::gone(&format!("UDP {addr}"), &reach.words(addr))
}

/// Completes a handshake that came in.
async fn shake(incoming: quinn::Incoming) -> Result<Accepted, LinkError> {
    let from = incoming.remote_address();
    let quic = incoming.await.map_err(|error| refine(from, &error))?;
    let peer = peer_of(&quic)?;
    let alpn = quic
        .handshake_data()
        .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .and_then(|data| data.protocol);
    let connection = Connection { quic, peer, dialled: false };
    match alpn.as_deref() {
        Some(ALPN_DATA) => Ok(Accepted::Data(connection)),
        Some(ALPN_PAIR) => Ok(Accepted::Pair(connection)),
        _ => Err(LinkError::Misbehaved("no known protocol was agreed on".into())),
    }
}

fn peer_of(quic: &quinn::Connection) -> Result<NodeId, LinkError> {
    let certificates = quic
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or_else(|| LinkError::Misbehaved("the peer showed no key".into()))?;
    let first = certificates
        .first()
        .ok_or_else(|| LinkError::Misbehaved("the peer showed no key".into()))?;
    node_id_of(first)
}

/// Says in words what a failed connection means.
pub(crate) fn refine(addr: SocketAddr, error: &quinn::ConnectionError) -> LinkError {
    /// TLS alert "no_application_protocol" (RFC 7301), as a QUIC crypto error.
    const NO_ALPN: u64 = 0x100 + 120;
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            if close.error_code == CLOSE_NOT_PAIRED {
                return LinkError::NotPaired(addr.to_string());
            }
            let why = String::from_utf8_lossy(&close.reason).into_owned();
            if close.error_code == CLOSE_VERSION {
                return LinkError::Version(why);
            }
            LinkError::gone(&addr, &format!("the peer closed it: {why}"))
        }
        quinn::ConnectionError::ConnectionClosed(close)
            if u64::from(close.error_code) == NO_ALPN =>
        {
            LinkError::Version(format!(
                "the node at {addr} speaks another version of the protocol; update the older one"
            ))
        }
        quinn::ConnectionError::TransportError(error) if u64::from(error.code) == NO_ALPN => {
            LinkError::Version(format!("the node at {addr} speaks another version of the protocol"))
        }
        quinn::ConnectionError::TimedOut => LinkError::gone(&addr, &"no answer"),
        other => LinkError::gone(&addr, other),
    }
}

impl Connection {
    /// The address at the other end.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.quic.remote_address()
    }

    /// Turns away a node that is not paired.
    pub fn refuse_unpaired(self) {
        self.quic.close(CLOSE_NOT_PAIRED, b"not paired");
    }

    /// Closes a connection in favour of a newer one.
    pub fn replaced(&self) {
        self.quic.close(CLOSE_REPLACED, b"replaced by a newer connection");
    }
}
