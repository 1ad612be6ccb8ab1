//! Certificates: whom a server admits, whom a client trusts. TLS 1.3 only, by rustls.
//!
//! Files are laid out as QEMU and libnbd expect them: `ca-cert.pem`, `client-cert.pem` and
//! `client-key.pem` in one directory. How certificates are issued is not known here, nor where the list
//! of those that were taken back is kept: the server's [`Authority`] is asked.
//!
//! Sessions are never resumed: a resumed session would not show its certificate again, and one that
//! was taken back meanwhile would get in.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
#[cfg(feature = "client")]
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
pub use rustls::pki_types::{CertificateDer, PrivateKeyDer};
#[cfg(feature = "client")]
use rustls::{ClientConfig, ClientConnection, Connection};

/// Name of the file of the authority's certificate.
pub const CA_CERT: &str = "ca-cert.pem";
/// Name of the file of a client's certificate.
pub const CLIENT_CERT: &str = "client-cert.pem";
/// Name of the file of a client's key.
pub const CLIENT_KEY: &str = "client-key.pem";

/// No file of certificates is longer; more is not read. In bytes.
const FILE_MAX: u64 = 1 << 20;

/// Why certificates cannot be used. The operator's fault.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// A file has not what it should have.
    #[error("{} holds no {what} in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// Certificate and key do not fit each other, or are of a kind that is not understood.
    #[error("certificates cannot be used: {0}")]
    Unusable(String),
    /// No certificate can have such a name.
    #[error("{0:?} is no name that a server's certificate could have")]
    Name(String),
}

fn unusable(error: impl std::fmt::Display) -> TlsError {
    TlsError::Unusable(error.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).map_err(unusable)?;
    Ok(Arc::new(roots))
}

/// What a client shows and whom it trusts. Clones share it.
#[cfg(feature = "client")]
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    hostname: Option<String>,
}

#[cfg(feature = "client")]
impl ClientTls {
    /// Trusts servers whose certificate `authority` has issued, and shows them `chain`, if there is
    /// one, and proof of its key.
    ///
    /// # Errors
    /// [`TlsError::Unusable`].
    pub fn new(
        authority: &CertificateDer<'static>,
        own: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    ) -> Result<Self, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots(authority)?);
        let mut config = match own {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(unusable)?,
            None => builder.with_no_client_auth(),
        };
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self { config: Arc::new(config), hostname: None })
    }

    /// Reads `ca-cert.pem` in `directory`, and `client-cert.pem` with `client-key.pem` if they are
    /// there. Blocks, for small files.
    ///
    /// # Errors
    /// [`TlsError`], which names the file.
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let authority = certificates(&directory.join(CA_CERT))?;
        let (cert, key) = (directory.join(CLIENT_CERT), directory.join(CLIENT_KEY));
        let own = match cert.exists() || key.exists() {
            true => Some((certificates(&cert)?, private_key(&key)?)),
            false => None,
        };
        let authority = authority.first().ok_or_else(|| no_certificate(&directory.join(CA_CERT)));
        Self::new(authority?, own)
    }

    /// The name the server's certificate must have, where that is not the host connected to.
    #[must_use]
    pub fn with_hostname(mut self, hostname: String) -> Self {
        self.hostname = Some(hostname);
        self
    }

    pub(crate) fn connection(&self, host: &str) -> Result<Connection, TlsError> {
        let name = self.hostname.as_deref().unwrap_or(host);
        let strange = |_| TlsError::Name(name.to_owned());
        let name = ServerName::try_from(name.to_owned()).map_err(strange)?;
        let connection = ClientConnection::new(Arc::clone(&self.config), name);
        connection.map(Connection::Client).map_err(unusable)
    }
}

fn no_certificate(path: &Path) -> TlsError {
    TlsError::Pem { path: path.to_owned(), what: "certificate" }
}

/// The certificates in a PEM file, at least one.
///
/// # Errors
/// [`TlsError`], which names the file.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    parsed.ok().filter(|all| !all.is_empty()).ok_or_else(|| no_certificate(path))
}

/// The private key in a PEM file.
///
/// # Errors
/// [`TlsError`], which names the file.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?)
        .map_err(|_| TlsError::Pem { path: path.to_owned(), what: "private key" })
}

/// DER as PEM: `label` is for instance `CERTIFICATE` or `PRIVATE KEY`.
#[must_use]
pub fn to_pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    // A line has 64 characters for 48 bytes.
    for line in der.chunks(48) {
        for three in line.chunks(3) {
            let byte = |index: usize| u32::from(three.get(index).copied().unwrap_or(0));
            let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
            for digit in 0..4 {
                let value = (bits >> (18 - 6 * digit) & 63) as usize;
                let padding = digit > three.len();
                let letter = ALPHABET.get(value).map_or('=', |letter| char::from(*letter));
                text.push(if padding { '=' } else { letter });
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read;

    let failed = |error| TlsError::Read { path: path.to_owned(), error: Arc::new(error) };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_is_read_as_it_was_written() {
        let one = to_pem("CERTIFICATE", b"foobar");
        assert_eq!(one, "-----BEGIN CERTIFICATE-----\nZm9vYmFy\n-----END CERTIFICATE-----\n");
        for length in [1, 2, 3, 47, 48, 49, 1000] {
            let der: Vec<u8> = (0..length).map(|index| (index * 7) as u8).collect();
            let text = to_pem("CERTIFICATE", &der);
            let read = CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
            assert_eq!(read.as_ref(), der, "{text}");
        }
    }
}

#[cfg(feature = "server")]
pub use server::{Authority, ServerTls};

#[cfg(feature = "server")]
mod server {
    use std::collections::BTreeMap;
    use std::fmt;
    use std::net::IpAddr;
    use std::sync::{Arc, Mutex, PoisonError};

    use rustls::client::danger::HandshakeSignatureValid;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
    use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
    use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
    use rustls::{
        CertificateError, Connection, DigitallySignedStruct, DistinguishedName, Error,
        ServerConfig, ServerConnection, SignatureScheme,
    };

    use super::{TlsError, provider, roots, unusable};

    /// Addresses of this machine for which a certificate is kept at hand.
    const ADDRESSES: usize = 64;

    /// Issues the server's certificates, and decides whether a client's is still good.
    pub trait Authority: Send + Sync + fmt::Debug + 'static {
        /// The certificate that has issued all others.
        fn certificate(&self) -> CertificateDer<'static>;

        /// A certificate, with its key, for a server at this address of this machine. Blocks no
        /// longer than signing takes; asked once for each address.
        ///
        /// # Errors
        /// [`TlsError`]: then nobody is served at that address.
        fn server_certificate(
            &self,
            address: IpAddr,
        ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError>;

        /// The name of a client by its certificate in DER; `None` turns it away. Asked when the
        /// authority's signature, the dates and the purpose of the certificate are found good, and
        /// once more before the client is served.
        fn name_of(&self, certificate: &[u8]) -> Option<String>;
    }

    /// What a server shows and whom it admits: clients with a certificate, nobody else.
    #[derive(Debug, Clone)]
    pub struct ServerTls {
        authority: Arc<dyn Authority>,
        verifier: Arc<Verifier>,
        configs: Arc<Mutex<BTreeMap<IpAddr, Arc<ServerConfig>>>>,
    }

    impl ServerTls {
        /// Admits clients whose certificate `authority` has issued and knows.
        ///
        /// # Errors
        /// [`TlsError::Unusable`].
        pub fn new(authority: Arc<dyn Authority>) -> Result<Self, TlsError> {
            let roots = roots(&authority.certificate())?;
            let inner = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(unusable)?;
            let verifier = Arc::new(Verifier { inner, authority: Arc::clone(&authority) });
            Ok(Self { authority, verifier, configs: Arc::default() })
        }

        /// For a connection that came in at this address.
        pub(crate) fn connection(&self, address: IpAddr) -> Result<Connection, TlsError> {
            let config = self.config(address)?;
            ServerConnection::new(config).map(Connection::Server).map_err(unusable)
        }

        fn config(&self, address: IpAddr) -> Result<Arc<ServerConfig>, TlsError> {
            let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(config) = configs.get(&address) {
                return Ok(Arc::clone(config));
            }
            let (certificate, key) = self.authority.server_certificate(address)?;
            let verifier = Arc::clone(&self.verifier);
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(unusable)?
                .with_client_cert_verifier(verifier)
                .with_single_cert(vec![certificate], key)
                .map_err(unusable)?;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            let config = Arc::new(config);
            if configs.len() >= ADDRESSES {
                configs.clear();
            }
            configs.insert(address, Arc::clone(&config));
            Ok(config)
        }

        pub(crate) fn name_of(&self, certificate: &[u8]) -> Option<String> {
            self.authority.name_of(certificate)
        }
    }

    /// The usual rules, and then the list of those that are still good.
    #[derive(Debug)]
    struct Verifier {
        inner: Arc<dyn ClientCertVerifier>,
        authority: Arc<dyn Authority>,
    }

    impl ClientCertVerifier for Verifier {
        fn root_hint_subjects(&self) -> &[DistinguishedName] {
            self.inner.root_hint_subjects()
        }

        fn verify_client_cert(
            &self,
            end_entity: &CertificateDer<'_>,
            intermediates: &[CertificateDer<'_>],
            now: UnixTime,
        ) -> Result<ClientCertVerified, Error> {
            let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
            match self.authority.name_of(end_entity) {
                Some(_) => Ok(verified),
                None => Err(Error::InvalidCertificate(CertificateError::Revoked)),
            }
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.inner.verify_tls12_signature(message, certificate, signature)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.inner.verify_tls13_signature(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.inner.supported_verify_schemes()
        }
    }
}
