//! A node's identity: an Ed25519 key, and the id that its public half hashes to.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ED25519};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use srn_core::ids::NodeId;

use crate::error::LinkError;

/// A node's key with a certificate wrapped around it.
///
/// Only the key is kept; the certificate is made anew at each start, and says nothing.
pub struct Identity {
    id: NodeId,
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.id)
    }
}

impl Identity {
    /// A new identity from the system's entropy.
    ///
    /// # Errors
    /// [`LinkError::Identity`] when there is no entropy.
    pub fn generate() -> Result<Self, LinkError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(identity_error)?;
        Self::wrap(key)
    }

    /// The identity of a key that was kept.
    ///
    /// # Errors
    /// [`LinkError::Identity`] when it is no Ed25519 key in PKCS #8.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, LinkError> {
        let der = PrivatePkcs8KeyDer::from(der.to_vec());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519);
        Self::wrap(key.map_err(identity_error)?)
    }

    fn wrap(key: KeyPair) -> Result<Self, LinkError> {
        let mut params = CertificateParams::new(Vec::new()).map_err(identity_error)?;
        params.distinguished_name = DistinguishedName::new();
        let certificate = params.self_signed(&key).map_err(identity_error)?.der().clone();
        let id = node_id_of(&certificate)?;
        Ok(Self { id, key, certificate })
    }

    /// The key in PKCS #8, to be kept where only this node reads it.
    #[must_use]
    pub fn pkcs8(&self) -> &[u8] {
        self.key.serialized_der()
    }

    /// The id.
    #[must_use]
    pub const fn id(&self) -> NodeId {
        self.id
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialized_der().to_vec()).into()
    }
}

fn identity_error(error: rcgen::Error) -> LinkError {
    LinkError::Identity(error.to_string())
}

/// The id of whoever holds the key of this certificate.
pub(crate) fn node_id_of(certificate: &CertificateDer<'_>) -> Result<NodeId, LinkError> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|error| LinkError::Identity(format!("unreadable certificate: {error}")))?;
    let key = parsed.subject_public_key_info();
    Ok(NodeId(Sha256::digest(key.as_ref()).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_the_identity() {
        let one = Identity::generate().unwrap();
        let again = Identity::from_pkcs8(one.pkcs8()).unwrap();
        assert_eq!(one.id(), again.id());
        assert_ne!(one.id(), Identity::generate().unwrap().id());
        assert!(Identity::from_pkcs8(b"no key").is_err());
        assert!(!format!("{one:?}").contains("KeyPair"));
    }
}
