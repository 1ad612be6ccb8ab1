//! A node that does not keep to the protocol: QUIC with any key, and bytes of one's own choice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use srn_core::time::WallTime;
use srn_core::wire::{Hello, Message};
use srn_e2e::{Node, PATIENCE};

/// The protocol of paired nodes.
pub(crate) const DATA: &[u8] = b"srn/1";
/// The protocol of nodes that want to be paired.
pub(crate) const PAIR: &[u8] = b"srn-pair/1";

/// Codes with which a node closes a connection.
pub(crate) const NOT_PAIRED: u32 = 1;
pub(crate) const MISBEHAVED: u32 = 2;
pub(crate) const VERSION: u32 = 4;

/// A key, as nodes have them.
pub(crate) struct Key(KeyPair);

impl Key {
    /// A key that nobody knows.
    pub(crate) fn new() -> Self {
        Self(KeyPair::generate_for(&PKCS_ED25519).expect("a key"))
    }

    /// The key of a node, stolen from its state directory.
    pub(crate) fn of(node: &Node) -> Self {
        let der = std::fs::read(node.state_dir().join("node.key")).expect("its key");
        let der = PrivatePkcs8KeyDer::from(der);
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519);
        Self(key.expect("a key"))
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        let params = CertificateParams::new(Vec::new()).expect("no names");
        vec![params.self_signed(&self.0).expect("a certificate").der().clone()]
    }

    fn private(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.serialized_der().to_vec()).into()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Takes everybody for who they say they are.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Credulous {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

fn builder<S: rustls::ConfigSide>(
    made: Result<rustls::ConfigBuilder<S, rustls::WantsVerifier>, rustls::Error>,
) -> rustls::ConfigBuilder<S, rustls::WantsVerifier> {
    made.expect("TLS 1.3")
}

/// Dials a node's link with this key, or with none.
pub(crate) async fn dial(
    node: &Node,
    key: Option<&Key>,
    protocol: &[u8],
) -> Result<quinn::Connection, quinn::ConnectionError> {
    let versions = [&rustls::version::TLS13];
    let config = rustls::ClientConfig::builder_with_provider(provider());
    let config = builder(config.with_protocol_versions(&versions));
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(Credulous));
    let mut config = match key {
        Some(key) => config.with_client_auth_cert(key.chain(), key.private()).expect("a key"),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let config = QuicClientConfig::try_from(config).expect("TLS 1.3");
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a port");
    let address = SocketAddr::from((node.address(), 7310));
    let config = quinn::ClientConfig::new(Arc::new(config));
    let connecting = endpoint.connect_with(config, address, "srn").expect("an address");
    tokio::time::timeout(PATIENCE, connecting).await.expect("an answer")
}

/// Listens at a node's address, with this key.
pub(crate) fn listen(node: &Node, key: &Key, protocol: &[u8]) -> quinn::Endpoint {
    let versions = [&rustls::version::TLS13];
    let config = rustls::ServerConfig::builder_with_provider(provider());
    let config = builder(config.with_protocol_versions(&versions));
    let config = config.with_client_cert_verifier(Arc::new(Credulous));
    let mut config = config.with_single_cert(key.chain(), key.private()).expect("a key");
    config.alpn_protocols = vec![protocol.to_vec()];
    let config = QuicServerConfig::try_from(config).expect("TLS 1.3");
    let config = quinn::ServerConfig::with_crypto(Arc::new(config));
    let address = SocketAddr::from((node.address(), 7310));
    quinn::Endpoint::server(config, address).expect("the port")
}

/// The first message of a session.
pub(crate) fn hello() -> Vec<u8> {
    let hello = Hello {
        name: "rogue".parse().expect("a name"),
        software: "0".into(),
        wall_time: WallTime(0),
    };
    Message::Hello(hello).encode()
}

/// The first message of a session of another version of the protocol.
pub(crate) fn hello_of_version(version: u16) -> Vec<u8> {
    let mut bytes = hello();
    let at = bytes.windows(4).position(|four| four == b"SRNh").expect("its first bytes") + 4;
    bytes[at..at + 2].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// Waits until the node closes the connection: with which code, saying what, and how many bytes it
/// has sent in streams before that.
pub(crate) async fn closed(connection: &quinn::Connection) -> (u32, String, usize) {
    let heard = async {
        let mut bytes = 0;
        // Whatever it opens is read to the end.
        while let Ok(mut stream) = connection.accept_uni().await {
            while let Ok(Some(chunk)) = stream.read_chunk(1 << 16, true).await {
                bytes += chunk.bytes.len();
            }
        }
        bytes
    };
    let bytes = tokio::time::timeout(PATIENCE, heard).await.expect("it closes the connection");
    match connection.closed().await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            let code = u64::from(close.error_code) as u32;
            (code, String::from_utf8_lossy(&close.reason).into_owned(), bytes)
        }
        other => panic!("closed without a word: {other}"),
    }
}

/// Opens a stream, sends `bytes` and reads what comes back until the stream or the connection ends.
pub(crate) async fn converse(connection: &quinn::Connection, bytes: &[u8]) -> Vec<u8> {
    let Ok((mut send, mut receive)) = connection.open_bi().await else { return Vec::new() };
    let _ = send.write_all(bytes).await;
    let mut back = Vec::new();
    let reading = async {
        while let Ok(Some(chunk)) = receive.read_chunk(1 << 16, true).await {
            back.extend_from_slice(&chunk.bytes);
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(20), reading).await;
    back
}
