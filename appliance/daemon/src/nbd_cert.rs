//! Certificates for NBD over TCP: this node is the authority, clients are issued certificates by name.
//!
//! Everything lies in one file of the state directory (`nbd-ca.json`, see `formats.md`): the
//! authority's key and certificate, and of every client's certificate its name, dates and hash. Keys of
//! clients are shown once and not kept. The file is replaced whole, and synced before anything that
//! depends on it is told: a certificate that was issued is known, one that was revoked is not admitted.
//!
//! A certificate is admitted when the authority has signed it, it is within its dates, *and* its hash is
//! on the list and not revoked: so whoever restores an old state directory revives old certificates, and
//! nothing else does.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, date_time_ymd,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use srn_core::name::Name;
use srn_core::time::WallTime;
use srn_nbd::tls::{Authority, CertificateDer, PrivateKeyDer, TlsError, to_pem};

use crate::clock;
use crate::error::{Failure, Kind, Result};

/// The file in the state directory.
const FILE: &str = "nbd-ca.json";

/// The version of the file's layout.
const VERSION: u32 = 1;

/// The most certificates that the file lists.
const CLIENTS_MAX: usize = 10_000;

/// How long a client's certificate is valid unless said otherwise, in days: ten years.
pub const DAYS: u32 = 3650;

/// The longest, in days.
const DAYS_MAX: u32 = 36_500;

const DAY_US: i64 = 24 * 3600 * 1_000_000;

/// The file. Unknown keys are an error: a later version has a higher number.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    version: u32,
    /// The authority's name, which is in every certificate.
    subject: String,
    /// Its key: PKCS #8, in hexadecimal.
    key: String,
    /// Its own certificate: DER, in hexadecimal.
    certificate: String,
    clients: Vec<ClientCertificate>,
}

/// A client's certificate, without its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// The client's name.
    pub name: String,
    /// SHA-256 of the certificate in DER, in hexadecimal.
    pub sha256: String,
    /// When it was issued, in microseconds since 1970.
    pub issued_at: i64,
    /// When it expires, in microseconds since 1970.
    pub expires_at: i64,
    /// When it was revoked, in microseconds since 1970.
    pub revoked_at: Option<i64>,
}

/// A new certificate, with the key that is shown once.
#[derive(Serialize, Deserialize)]
pub struct NewCertificate {
    /// The client's name.
    pub name: String,
    /// The authority's certificate in PEM.
    pub ca_cert: String,
    /// The client's certificate in PEM.
    pub client_cert: String,
    /// Its key in PEM.
    pub client_key: String,
    /// When it expires, in RFC 3339.
    pub expires_at: String,
}

impl std::fmt::Debug for NewCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NewCertificate({})", self.name)
    }
}

/// The authority of a node, made when it is first needed.
#[derive(Debug)]
pub struct NbdAuthority {
    path: PathBuf,
    /// Names by which clients reach this node.
    names: Vec<String>,
    /// Held while the file is written.
    kept: Mutex<Option<Kept>>,
    /// The names of what is admitted, by hash. Never locked while anything is written.
    admitted: RwLock<BTreeMap<[u8; 32], String>>,
}

/// Checks a name that is to stand in a server's certificate.
///
/// # Errors
/// A text that says why not.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    if name.parse::<IpAddr>().is_ok() || name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err(format!("{name:?} is no host name and no address"))
}

fn unusable(error: rcgen::Error) -> Failure {
    Failure::internal(format!("making a certificate for NBD: {error}"))
}

impl NbdAuthority {
    /// The authority of a state directory; `names` are those by which clients reach the node. Nothing
    /// is made yet.
    ///
    /// # Errors
    /// [`Kind::Storage`] when there is one that cannot be read: it is never replaced, for every client
    /// trusts it.
    pub fn open(state_dir: &Path, names: Vec<String>) -> Result<Self> {
        let path = state_dir.join(FILE);
        let failed = |text: String| {
            let way_out = "restore it from a backup, or remove it and give every NBD client a new \
                           certificate";
            Failure::new(Kind::Storage, format!("{}: {text}; {way_out}", path.display()))
        };
        let kept = match std::fs::read(&path) {
            Ok(bytes) => {
                let kept: Kept = serde_json::from_slice(&bytes)
                    .map_err(|error| failed(format!("no certificates of NBD: {error}")))?;
                if kept.version != VERSION {
                    let (found, known) = (kept.version, VERSION);
                    return Err(failed(format!("has version {found}, this program knows {known}")));
                }
                kept.issuer().map_err(|error| failed(error.message))?;
                Some(kept)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error.to_string())),
        };
        let admitted = match &kept {
            Some(kept) => kept.admitted().map_err(|error| failed(error.message))?,
            None => BTreeMap::new(),
        };
        let (kept, admitted) = (Mutex::new(kept), RwLock::new(admitted));
        Ok(Self { path, names, kept, admitted })
    }

    /// Makes the authority if there is none. Blocks.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn ensure(self: &Arc<Self>) -> Result<()> {
        self.made().map(|_| ())
    }

    fn made(&self) -> Result<MutexGuard<'_, Option<Kept>>> {
        let mut kept = self.lock();
        if kept.is_none() {
            let made = Kept::make()?;
            self.write(&made)?;
            *kept = Some(made);
        }
        Ok(kept)
    }

    /// Issues a certificate to a client. Blocks.
    ///
    /// # Errors
    /// [`Kind::Conflict`] when a certificate of that name is good; when the list cannot be written.
    pub fn issue(&self, name: &Name, days: u32) -> Result<NewCertificate> {
        if !(1..=DAYS_MAX).contains(&days) {
            let text = format!("a certificate is valid for 1 to {DAYS_MAX} days, not {days}");
            return Err(Failure::invalid(text));
        }
        let name = name.to_string();
        let mut guard = self.made()?;
        let Some(kept) = guard.as_mut() else { return Err(Failure::internal("no authority")) };
        if kept.clients.iter().any(|client| client.name == name && client.revoked_at.is_none()) {
            return Err(Failure::conflict(format!(
                "there is a certificate of the name {name}; revoke it first (srn nbd-cert revoke \
                 {name}), or use another name"
            )));
        }
        if kept.clients.len() >= CLIENTS_MAX {
            return Err(Failure::refused(format!("there are {CLIENTS_MAX} certificates")));
        }
        let now = clock::wall().0;
        // At the end of the day, so that none is shorter than was said.
        let last = now.saturating_add(i64::from(days).saturating_mul(DAY_US));
        let expires_at = last.div_euclid(DAY_US).saturating_add(1).saturating_mul(DAY_US);
        let mut params = leaf(&name, ExtendedKeyUsagePurpose::ClientAuth);
        let (year, month, day) = day_of(expires_at)?;
        params.not_after = date_time_ymd(year, month, day);
        let key = KeyPair::generate().map_err(unusable)?;
        let certificate = params.signed_by(&key, &kept.issuer()?).map_err(unusable)?;
        let hash: [u8; 32] = Sha256::digest(certificate.der()).into();
        let mut next = kept.clone();
        next.clients.push(ClientCertificate {
            name: name.clone(),
            sha256: to_hex(&hash),
            issued_at: now,
            expires_at,
            revoked_at: None,
        });
        self.write(&next)?;
        *kept = next;
        let ca_cert = to_pem("CERTIFICATE", &kept.certificate_der()?);
        drop(guard);
        self.admitted.write().unwrap_or_else(PoisonError::into_inner).insert(hash, name.clone());
        Ok(NewCertificate {
            name,
            ca_cert,
            client_cert: to_pem("CERTIFICATE", certificate.der()),
            client_key: to_pem("PRIVATE KEY", &key.serialize_der()),
            expires_at: clock::rfc3339(WallTime(expires_at)),
        })
    }

    /// All certificates that were issued, the oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<ClientCertificate> {
        self.lock().as_ref().map(|kept| kept.clients.clone()).unwrap_or_default()
    }

    /// Revokes a client's certificate: nobody gets in with it from now on. Who is in already is for the
    /// caller to disconnect. Blocks.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; when the list cannot be written, and then it is not revoked.
    pub fn revoke(&self, name: &str) -> Result<ClientCertificate> {
        let mut guard = self.lock();
        let found = guard.as_ref().and_then(|kept| {
            kept.clients
                .iter()
                .position(|client| client.name == name && client.revoked_at.is_none())
                .map(|index| (kept.clone(), index))
        });
        let Some((mut next, index)) = found else {
            let text = format!("there is no certificate of the name {name} that is not revoked");
            return Err(Failure::not_found(text));
        };
        let Some(client) = next.clients.get_mut(index) else {
            return Err(Failure::internal("the list of certificates has changed"));
        };
        client.revoked_at = Some(clock::wall().0);
        let revoked = client.clone();
        self.write(&next)?;
        let admitted = next.admitted()?;
        *guard = Some(next);
        *self.admitted.write().unwrap_or_else(PoisonError::into_inner) = admitted;
        Ok(revoked)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the file: whole or not at all, and durable.
    fn write(&self, kept: &Kept) -> Result<()> {
        let write = || -> std::io::Result<()> {
            let temporary = self.path.with_extension("json.tmp");
            let _ = std::fs::remove_file(&temporary);
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(kept)?)?;
            file.sync_all()?;
            rustix::fs::rename(&temporary, &self.path)?;
            match self.path.parent() {
                Some(directory) => File::open(directory)?.sync_all(),
                None => Ok(()),
            }
        };
        write().map_err(|error| {
            Failure::new(Kind::Storage, format!("writing {}: {error}", self.path.display()))
        })
    }
}

impl Authority for NbdAuthority {
    fn certificate(&self) -> CertificateDer<'static> {
        let der = self.lock().as_ref().and_then(|kept| kept.certificate_der().ok());
        CertificateDer::from(der.unwrap_or_default())
    }

    fn server_certificate(
        &self,
        address: IpAddr,
    ) -> std::result::Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError> {
        let failed = |error: &dyn std::fmt::Display| TlsError::Unusable(error.to_string());
        let issuer = match self.lock().as_ref() {
            Some(kept) => kept.issuer().map_err(|error| failed(&error))?,
            None => return Err(failed(&"no authority")),
        };
        let mut params = leaf("srn", ExtendedKeyUsagePurpose::ServerAuth);
        let mut names = vec![SanType::IpAddress(address)];
        for name in &self.names {
            names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => {
                    let name = name.as_str().try_into().map_err(|error| failed(&error))?;
                    SanType::DnsName(name)
                }
            });
        }
        params.subject_alt_names = names;
        let key = KeyPair::generate().map_err(|error| failed(&error))?;
        let certificate = params.signed_by(&key, &issuer).map_err(|error| failed(&error))?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| failed(&error))?;
        Ok((certificate.der().clone(), key))
    }

    fn name_of(&self, certificate: &[u8]) -> Option<String> {
        let hash: [u8; 32] = Sha256::digest(certificate).into();
        self.admitted.read().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned()
    }
}

impl Kept {
    fn make() -> Result<Self> {
        // Two nodes of one name must not have authorities of one name.
        let subject = format!("srn NBD {}", to_hex(&clock::random::<8>()));
        let key = KeyPair::generate().map_err(unusable)?;
        let certificate = authority(&subject).self_signed(&key).map_err(unusable)?;
        Ok(Self {
            version: VERSION,
            subject,
            key: to_hex(&key.serialize_der()),
            certificate: to_hex(certificate.der()),
            clients: Vec::new(),
        })
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>> {
        let broken = || Failure::new(Kind::Storage, "its key cannot be used");
        let key = KeyPair::try_from(from_hex(&self.key).ok_or_else(broken)?);
        Ok(Issuer::new(authority(&self.subject), key.map_err(|_| broken())?))
    }

    fn certificate_der(&self) -> Result<Vec<u8>> {
        let broken = || Failure::new(Kind::Storage, "its certificate cannot be used");
        from_hex(&self.certificate).ok_or_else(broken)
    }

    fn admitted(&self) -> Result<BTreeMap<[u8; 32], String>> {
        let good = self.clients.iter().filter(|client| client.revoked_at.is_none());
        good.map(|client| {
            let hash = from_hex(&client.sha256).and_then(|hash| hash.try_into().ok());
            let text = format!("the hash of {} is none", client.name);
            Ok((hash.ok_or_else(|| Failure::new(Kind::Storage, text))?, client.name.clone()))
        })
        .collect()
    }
}

/// What does not expire: clients with a certificate that does decide how long they are let in.
fn dated(subject: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject);
    // A clock that is wrong must not lock anybody out.
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(9999, 12, 31);
    params
}

fn authority(subject: &str) -> CertificateParams {
    let mut params = dated(subject);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn leaf(subject: &str, purpose: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = dated(subject);
    params.serial_number = Some(SerialNumber::from_slice(&clock::random::<16>()));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    params
}

/// The day, in UTC, on which `at` lies.
fn day_of(at: i64) -> Result<(i32, u8, u8)> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::invalid(format!("the certificate's last day: {error}"))
    };
    let at = jiff::Timestamp::from_microsecond(at).map_err(|error| failed(&error))?;
    let date = at.to_zoned(jiff::tz::TimeZone::UTC).date();
    let part = |part: i8| u8::try_from(part).map_err(|error| failed(&error));
    Ok((date.year().into(), part(date.month())?, part(date.day())?))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    let pairs = (0..text.len()).step_by(2);
    pairs.map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_issued_is_known_until_it_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let open = || NbdAuthority::open(dir.path(), vec!["node".to_owned()]).unwrap();
        let authority = open();
        assert!(authority.list().is_empty());
        assert!(!dir.path().join(FILE).exists(), "made when it is needed");
        assert_eq!(authority.revoke("one").unwrap_err().kind, Kind::NotFound);
        let one = authority.issue(&name("one"), 30).unwrap();
        let two = authority.issue(&name("two"), DAYS).unwrap();
        assert_eq!(one.ca_cert, two.ca_cert);
        assert_eq!(authority.issue(&name("one"), 30).unwrap_err().kind, Kind::Conflict);
        assert_eq!(authority.issue(&name("three"), 0).unwrap_err().kind, Kind::Invalid);
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(!text.contains("PRIVATE"), "keys of clients are not kept");

        let der = |pem: &str, dir: &Path| {
            let path = dir.join("x.pem");
            std::fs::write(&path, pem).unwrap();
            srn_nbd::tls::certificates(&path).unwrap().remove(0)
        };
        let (one, two) = (der(&one.client_cert, dir.path()), der(&two.client_cert, dir.path()));
        assert_eq!(authority.name_of(&one).as_deref(), Some("one"));
        authority.revoke("one").unwrap();
        assert_eq!(authority.name_of(&one), None);
        let again = open();
        assert_eq!(again.name_of(&one), None);
        assert_eq!(again.name_of(&two).as_deref(), Some("two"));
        assert_eq!(again.certificate(), authority.certificate());
        assert_eq!(again.list(), authority.list());
        again.server_certificate([192, 0, 2, 1].into()).unwrap();
        // A name is free again when its certificate is revoked, and the old one stays out.
        again.issue(&name("one"), 30).unwrap();
        assert_eq!(again.name_of(&one), None);
        assert_eq!(again.list().len(), 3);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        NbdAuthority::open(dir.path(), Vec::new()).unwrap().issue(&name("one"), 1).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("\"version\": 1", "\"version\": 2"),
            ("\"key\": \"", "\"key\": \"00"),
            ("\"sha256\": \"", "\"sha256\": \"x"),
            ("\"clients\"", "\"customers\""),
            ("}", ""),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            std::fs::write(&path, &bad).unwrap();
            let error = NbdAuthority::open(dir.path(), Vec::new()).unwrap_err();
            assert_eq!(error.kind, Kind::Storage, "{error}");
            assert!(error.message.contains("backup"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), bad);
        }
    }

    #[test]
    fn names_of_servers() {
        for good in ["node", "a.example.com", "192.0.2.1", "2001:db8::1", "a_b-c"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "a..b", "a b", "*.example.com", "a/b", &"a".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
