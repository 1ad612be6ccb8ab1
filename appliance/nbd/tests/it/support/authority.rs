//! A certificate authority, with certificates good and bad, in the layout of QEMU and libnbd.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use srn_nbd::tls::to_pem;

pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

/// What a certificate is for.
#[derive(Clone, Copy)]
pub(crate) enum For {
    Server,
    Client,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = params(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    pub(crate) fn issue(
        &self,
        name: &str,
        purpose: For,
        expired: bool,
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut params = params(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![match purpose {
            For::Server => ExtendedKeyUsagePurpose::ServerAuth,
            For::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if let For::Server = purpose {
            let names = ["localhost", "127.0.0.1"].map(str::to_owned);
            params.subject_alt_names = CertificateParams::new(names).unwrap().subject_alt_names;
        }
        if expired {
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    /// Writes the authority's certificate, and one of its own for `purpose`, to a directory.
    pub(crate) fn write(&self, to: &Path, name: &str, purpose: For, expired: bool) -> Vec<u8> {
        let (certificate, key) = self.issue(name, purpose, expired);
        let kind = match purpose {
            For::Server => "server",
            For::Client => "client",
        };
        let write = |file: &str, label: &str, der: &[u8]| {
            std::fs::write(to.join(file), to_pem(label, der)).unwrap();
        };
        write("ca-cert.pem", "CERTIFICATE", &self.der);
        write(&format!("{kind}-cert.pem"), "CERTIFICATE", &certificate);
        write(&format!("{kind}-key.pem"), "PRIVATE KEY", key.secret_der());
        certificate.to_vec()
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2100, 1, 1);
    params
}
