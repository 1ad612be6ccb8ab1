//! TLS 1.3 with pinned keys: no names, no dates, no authorities.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, Error,
    PeerIncompatible, SignatureScheme,
};
use srn_core::ids::NodeId;

use crate::error::LinkError;
use crate::identity::{Identity, node_id_of};

/// Protocol of paired nodes.
pub(crate) const ALPN_DATA: &[u8] = b"srn/1";

/// Protocol of nodes that are about to be paired.
pub(crate) const ALPN_PAIR: &[u8] = b"srn-pair/1";

/// What a dialling node accepts.
#[derive(Debug, Clone)]
pub(crate) enum Expect {
    /// This key only; what was found instead is left here.
    Pinned(NodeId, Arc<Mutex<Option<NodeId>>>),
    /// Any key: the token decides.
    Any,
}

/// AES-128 first: at ten rounds instead of fourteen it is the cheaper one, and beyond what anybody
/// can break. A peer may insist on another.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    let cheapest = CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != cheapest);
    Arc::new(provider)
}

/// Checks that the peer holds its certificate's key, and perhaps which key that is.
#[derive(Debug)]
struct KeyVerifier {
    algorithms: WebPkiSupportedAlgorithms,
    expect: Expect,
}

impl KeyVerifier {
    fn new(expect: Expect) -> Arc<Self> {
        Arc::new(Self { algorithms: provider().signature_verification_algorithms, expect })
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let found = node_id_of(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        match &self.expect {
            Expect::Pinned(expected, seen) if *expected != found => {
                *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
                Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            }
            _ => Ok(()),
        }
    }
}

impl ServerCertVerifier for KeyVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for KeyVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn tls_error(error: &Error) -> LinkError {
    LinkError::Identity(error.to_string())
}

/// What a listening node uses: every client shows a key; whether it is a paired one is decided
/// before a byte of ours is sent to it.
pub(crate) fn server(identity: &Identity) -> Result<rustls::ServerConfig, LinkError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| tls_error(&error))?
        .with_client_cert_verifier(KeyVerifier::new(Expect::Any))
        .with_single_cert(identity.chain(), identity.private_key())
        .map_err(|error| tls_error(&error))?;
    config.alpn_protocols = vec![ALPN_DATA.to_vec(), ALPN_PAIR.to_vec()];
    // A resumed session would skip the proof of the key; sessions are long, nothing is gained.
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What a dialling node uses.
pub(crate) fn client(
    identity: &Identity,
    expect: Expect,
    alpn: &[u8],
) -> Result<rustls::ClientConfig, LinkError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| tls_error(&error))?
        .dangerous()
        .with_custom_certificate_verifier(KeyVerifier::new(expect))
        .with_client_auth_cert(identity.chain(), identity.private_key())
        .map_err(|error| tls_error(&error))?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}
