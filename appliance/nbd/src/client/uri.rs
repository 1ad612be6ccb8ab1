//! NBD URIs, as `doc/uri.md` of the NetworkBlockDevice/nbd repository defines them.
//!
//! Parsing only; nothing is resolved, read or connected here. TLS is understood by certificates over
//! TCP; other kinds of it are refused by name.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::proto::constants::{DEFAULT_PORT, STRING_MAX};

/// Where an export is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// The name of the export; empty for the default export.
    pub export: String,
    /// `nbds://`: TLS is required.
    pub tls: Option<UriTls>,
}

/// What a URI says of TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UriTls {
    /// The directory of `ca-cert.pem`, `client-cert.pem` and `client-key.pem`.
    pub certificates: Option<PathBuf>,
    /// The name the server's certificate must have, if it is not the host.
    pub hostname: Option<String>,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A host name or address, and a port.
    Tcp {
        /// Name, IPv4 or IPv6 address (without brackets).
        host: String,
        /// Port.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// Why a URI is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Not `nbd://` nor `nbd+unix://`.
    #[error("{0:?} is not an NBD URI")]
    Scheme(String),
    /// `nbds+unix://`, or a TLS parameter that means nothing here.
    #[error("{0} is not supported: TLS is spoken as nbds://HOST/EXPORT?tls-certificates=DIRECTORY")]
    Tls(String),
    /// A host with strange characters, or none.
    #[error("host {0:?} is not understood")]
    Host(String),
    /// A port that is no number below 65536.
    #[error("port {0:?} is not understood")]
    Port(String),
    /// A unix URI without its socket, or with a host.
    #[error("a unix URI needs a socket parameter and no host")]
    Socket,
    /// A parameter nobody knows.
    #[error("parameter {0:?} is not known")]
    Parameter(String),
    /// A percent sign without two hexadecimal digits, or bytes that are no text.
    #[error("{0:?} is not properly escaped")]
    Escape(String),
    /// A name with a NUL, or of more than 4096 bytes.
    #[error("export name is not lawful")]
    Name,
    /// A `#`, which has no meaning here.
    #[error("a fragment has no meaning in an NBD URI")]
    Fragment,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if text.contains('#') {
            return Err(UriError::Fragment);
        }
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        let scheme = scheme.to_ascii_lowercase();
        let (unix, secure) = match scheme.as_str() {
            "nbd" => (false, false),
            "nbds" => (false, true),
            "nbd+unix" => (true, false),
            "nbds+unix" => return Err(UriError::Tls(scheme)),
            _ => return Err(UriError::Scheme(text.to_owned())),
        };
        let rest = rest.strip_prefix("//");
        let rest = rest.ok_or_else(|| UriError::Scheme(text.to_owned()))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));

        let export =
            String::from_utf8(unescape(path)?).map_err(|_| UriError::Escape(path.to_owned()))?;
        if export.len() > STRING_MAX || export.contains('\0') {
            return Err(UriError::Name);
        }
        let Query { socket, tls, tls_parameter } = parse_query(query)?;
        if let Some(parameter) = tls_parameter.filter(|_| !secure) {
            return Err(UriError::Tls(format!("parameter {parameter} without nbds://")));
        }
        let address = match (unix, socket) {
            (true, Some(socket)) if authority.is_empty() => Address::Unix(socket),
            (true, _) => return Err(UriError::Socket),
            (false, Some(_)) => return Err(UriError::Parameter("socket".to_owned())),
            (false, None) => parse_authority(authority)?,
        };
        Ok(Self { address, export, tls: secure.then_some(tls) })
    }
}

#[derive(Default)]
struct Query {
    socket: Option<PathBuf>,
    tls: UriTls,
    /// A parameter that makes sense for TLS only.
    tls_parameter: Option<String>,
}

fn parse_query(query: &str) -> Result<Query, UriError> {
    use std::os::unix::ffi::OsStringExt;

    let path = |value| Ok(PathBuf::from(std::ffi::OsString::from_vec(unescape(value)?)));
    let mut parsed = Query::default();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name {
            "socket" if !value.is_empty() => parsed.socket = Some(path(value)?),
            "socket" => return Err(UriError::Socket),
            "tls-certificates" if !value.is_empty() => {
                parsed.tls.certificates = Some(path(value)?);
                parsed.tls_parameter = Some(name.to_owned());
            }
            "tls-hostname" if !value.is_empty() => {
                let text = String::from_utf8(unescape(value)?);
                let text = text.map_err(|_| UriError::Escape(value.to_owned()))?;
                parsed.tls.hostname = Some(text);
                parsed.tls_parameter = Some(name.to_owned());
            }
            name if name.starts_with("tls-") => {
                return Err(UriError::Tls(format!("parameter {name}")));
            }
            name => return Err(UriError::Parameter(name.to_owned())),
        }
    }
    Ok(parsed)
}

fn parse_authority(authority: &str) -> Result<Address, UriError> {
    // A user is only of use to TLS.
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let strange = || UriError::Host(authority.to_owned());
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6.split_once(']').ok_or_else(strange)?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(strange());
            }
            (host, port)
        }
        None => {
            let colon = authority.find(':').unwrap_or(authority.len());
            authority.split_at_checked(colon).ok_or_else(strange)?
        }
    };
    let lawful = |character: char| character.is_ascii_alphanumeric() || "-._:".contains(character);
    if host.is_empty() || !host.chars().all(lawful) {
        return Err(strange());
    }
    let port = match port.strip_prefix(':') {
        Some("") => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| UriError::Port(port.to_owned()))?,
        None if port.is_empty() => DEFAULT_PORT,
        None => return Err(strange()),
    };
    Ok(Address::Tcp { host: host.to_owned(), port })
}

fn unescape(text: &str) -> Result<Vec<u8>, UriError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || (rest.next()? as char).to_digit(16);
        let value = digit().zip(digit()).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        bytes.push(value.ok_or_else(|| UriError::Escape(text.to_owned()))?);
    }
    Ok(bytes)
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => {
                write!(formatter, "[{host}]:{port}")
            }
            Self::Tcp { host, port } => write!(formatter, "{host}:{port}"),
            Self::Unix(path) => write!(formatter, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Uri {
        let address = Address::Tcp { host: host.to_owned(), port };
        Uri { address, export: export.to_owned(), tls: None }
    }

    fn secure(uri: Uri, certificates: Option<&str>, hostname: Option<&str>) -> Uri {
        let tls = UriTls {
            certificates: certificates.map(Into::into),
            hostname: hostname.map(str::to_owned),
        };
        Uri { tls: Some(tls), ..uri }
    }

    fn unix(path: &str, export: &str) -> Uri {
        Uri { address: Address::Unix(path.into()), export: export.to_owned(), tls: None }
    }

    #[test]
    fn lawful_uris() {
        for (text, uri) in [
            ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
            ("nbd://example.com/hello%20world", tcp("example.com", 10809, "hello world")),
            ("NBD://10.0.0.1:7/a/b", tcp("10.0.0.1", 7, "a/b")),
            ("nbd://user@host:1/", tcp("host", 1, "")),
            ("nbd://[::1]:10810/x", tcp("::1", 10810, "x")),
            ("nbd://[fe80::1]", tcp("fe80::1", 10809, "")),
            ("nbd+unix:///disk?socket=sock", unix("sock", "disk")),
            ("nbd+unix:///?socket=/run/a%20b.sock", unix("/run/a b.sock", "")),
            ("nbd+unix://?socket=/s", unix("/s", "")),
            ("nbds://h/d", secure(tcp("h", 10809, "d"), None, None)),
            (
                "NBDS://h:1/d?tls-certificates=/etc/a%20b&tls-hostname=disks",
                secure(tcp("h", 1, "d"), Some("/etc/a b"), Some("disks")),
            ),
        ] {
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
    }

    #[test]
    fn unlawful_uris() {
        let parse = |text: &str| text.parse::<Uri>().unwrap_err();
        assert!(matches!(parse("nbds+unix:///?socket=s"), UriError::Tls(_)));
        assert!(matches!(parse("nbds://h/?tls-psk-file=f"), UriError::Tls(_)));
        assert!(matches!(parse("nbds://h/?tls-verify-peer=false"), UriError::Tls(_)));
        assert!(matches!(parse("nbd://h/?tls-certificates=d"), UriError::Tls(_)), "in plain text?");
        assert!(matches!(parse("http://h/"), UriError::Scheme(_)));
        assert!(matches!(parse("nbd:h"), UriError::Scheme(_)));
        assert!(matches!(parse(""), UriError::Scheme(_)));
        assert!(matches!(parse("nbd:///x"), UriError::Host(_)));
        assert!(matches!(parse("nbd://[zz]/x"), UriError::Host(_)));
        assert!(matches!(parse("nbd://[::1/x"), UriError::Host(_)));
        assert!(matches!(parse("nbd://[::1]x/"), UriError::Host(_)));
        assert!(matches!(parse("nbd://a b/"), UriError::Host(_)));
        assert!(matches!(parse("nbd://h:65536/"), UriError::Port(_)));
        assert!(matches!(parse("nbd://h:x/"), UriError::Port(_)));
        assert_eq!(parse("nbd+unix:///x"), UriError::Socket);
        assert_eq!(parse("nbd+unix://h/x?socket=s"), UriError::Socket);
        assert_eq!(parse("nbd+unix:///x?socket="), UriError::Socket);
        assert!(matches!(parse("nbd://h/?what=1"), UriError::Parameter(_)));
        assert!(matches!(parse("nbd://h/?socket=s"), UriError::Parameter(_)));
        assert!(matches!(parse("nbd://h/%2"), UriError::Escape(_)));
        assert!(matches!(parse("nbd://h/%zz"), UriError::Escape(_)));
        assert!(matches!(parse("nbd://h/%ff"), UriError::Escape(_)));
        assert_eq!(parse("nbd://h/a%00b"), UriError::Name);
        assert_eq!(parse("nbd://h/a#b"), UriError::Fragment);
        assert_eq!(parse(&format!("nbd://h/{}", "a".repeat(4097))), UriError::Name);
    }
}
