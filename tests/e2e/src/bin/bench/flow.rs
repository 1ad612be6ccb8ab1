//! One flow of bytes, as fast as its congestion control lets it: QUIC with each of the controllers,
//! and TCP. The program runs itself as sender and as receiver, in network name spaces of their own.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// Windows, as the product has them.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 24 << 20;
const SEND_WINDOW: u64 = 12 << 20;
const INITIAL_WINDOW: u64 = 65_000;
const MTU_MAX: u16 = 6500;

/// Bytes of one write.
const CHUNK: usize = 64 << 10;

/// How a flow is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    QuinnCubic,
    QuinnBbr,
    TcpCubic,
    TcpBbr,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] =
        [Self::Ours, Self::QuinnCubic, Self::QuinnBbr, Self::TcpCubic, Self::TcpBbr];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::QuinnCubic => "quinn-cubic",
            Self::QuinnBbr => "quinn-bbr",
            Self::TcpCubic => "tcp-cubic",
            Self::TcpBbr => "tcp-bbr",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    const fn tcp(self) -> Option<&'static str> {
        match self {
            Self::TcpCubic => Some("cubic"),
            Self::TcpBbr => Some("bbr"),
            Self::Ours | Self::QuinnCubic | Self::QuinnBbr => None,
        }
    }
}

fn transport(kind: Kind) -> Arc<quinn::TransportConfig> {
    let mut config = quinn::TransportConfig::default();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(MTU_MAX);
    config
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(SEND_WINDOW)
        .mtu_discovery_config(Some(discovery));
    match kind {
        Kind::QuinnBbr => {
            let mut bbr = quinn::congestion::BbrConfig::default();
            bbr.initial_window(INITIAL_WINDOW);
            config.congestion_controller_factory(Arc::new(bbr));
        }
        Kind::QuinnCubic => {
            let mut cubic = quinn::congestion::CubicConfig::default();
            cubic.initial_window(INITIAL_WINDOW);
            config.congestion_controller_factory(Arc::new(cubic));
        }
        Kind::Ours | Kind::TcpCubic | Kind::TcpBbr => {
            let ours = srn_link::congestion::RateBased { initial_window: INITIAL_WINDOW };
            config.congestion_controller_factory(Arc::new(ours));
        }
    }
    Arc::new(config)
}

fn endpoint(listen: SocketAddr, server: Option<quinn::ServerConfig>) -> quinn::Endpoint {
    let socket = std::net::UdpSocket::bind(listen).expect("a UDP port");
    let buffer = 4 << 20;
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, buffer).is_err() {
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, buffer);
    }
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, buffer);
    let mut port = quinn::EndpointConfig::default();
    port.max_udp_payload_size(MTU_MAX).expect("a packet size");
    quinn::Endpoint::new(port, server, socket, Arc::new(quinn::TokioRuntime)).expect("an endpoint")
}

/// Sends to `to` for so long.
pub(crate) async fn send(kind: Kind, to: SocketAddr, certificate: &Path, time: Duration) {
    let bytes = vec![0x5a; CHUNK];
    if let Some(control) = kind.tcp() {
        let mut stream = loop {
            match TcpStream::connect(to).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        rustix::net::sockopt::set_tcp_congestion(&stream, control).expect("TCP knows it");
        let sending = async { while stream.write_all(&bytes).await.is_ok() {} };
        let _ = tokio::time::timeout(time, sending).await;
        return;
    }
    let mut roots = rustls::RootCertStore::empty();
    // Until the receiver has written all of it.
    while !std::fs::read(certificate).is_ok_and(|der| roots.add(der.into()).is_ok()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let crypto = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let crypto = QuicClientConfig::try_from(crypto).expect("TLS for QUIC");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(kind));
    let endpoint = endpoint(([0, 0, 0, 0], 0).into(), None);
    let connection =
        endpoint.connect_with(config, to, "bench").expect("an address").await.expect("a server");
    let mut stream = connection.open_uni().await.expect("a stream");
    let sending = async { while stream.write_all(&bytes).await.is_ok() {} };
    let _ = tokio::time::timeout(time, sending).await;
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Receives one flow at `at`; what came per second from `skip` after its first byte until `time`
/// after it.
pub(crate) async fn receive(
    kind: Kind,
    at: SocketAddr,
    certificate: &Path,
    (skip, time): (Duration, Duration),
) -> f64 {
    let mut meter = Meter { first: None, skip, time, bytes: 0 };
    if kind.tcp().is_some() {
        let listener = TcpListener::bind(at).await.expect("a TCP port");
        let (mut stream, _) = listener.accept().await.expect("a client");
        let mut buffer = vec![0; CHUNK];
        while let Ok(Ok(length @ 1..)) = meter.next(stream.read(&mut buffer)).await {
            meter.count(length);
        }
        return meter.rate();
    }
    let made = rcgen::generate_simple_self_signed(vec!["bench".into()]).expect("a certificate");
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let crypto = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .expect("a certificate");
    let crypto = QuicServerConfig::try_from(crypto).expect("TLS for QUIC");
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(kind));
    let endpoint = endpoint(at, Some(config));
    std::fs::write(certificate, made.cert.der()).expect("the certificate is written");
    let connection = endpoint.accept().await.expect("a client").await.expect("a handshake");
    let mut stream = connection.accept_uni().await.expect("a stream");
    while let Ok(Ok(Some(chunk))) = meter.next(stream.read_chunk(CHUNK, true)).await {
        meter.count(chunk.bytes.len());
    }
    meter.rate()
}

struct Meter {
    first: Option<Instant>,
    skip: Duration,
    time: Duration,
    bytes: u64,
}

impl Meter {
    async fn next<T>(
        &self,
        what: impl Future<Output = T>,
    ) -> Result<T, tokio::time::error::Elapsed> {
        let end = self.first.unwrap_or_else(Instant::now) + self.time;
        tokio::time::timeout_at(end, what).await
    }

    fn count(&mut self, bytes: usize) {
        let first = *self.first.get_or_insert_with(Instant::now);
        if first.elapsed() >= self.skip {
            self.bytes += bytes as u64;
        }
    }

    fn rate(&self) -> f64 {
        self.bytes as f64 / (self.time - self.skip).as_secs_f64()
    }
}
