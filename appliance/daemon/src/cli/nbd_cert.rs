//! Certificates of NBD clients, as files.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use srn_core::time::WallTime;
use srn_nbd::tls::{CA_CERT, CLIENT_CERT, CLIENT_KEY};

use super::args::NbdCertCommand;
use super::client::{Client, segment};
use super::commands::Out;
use crate::api::{CertificateRequest, Revoked};
use crate::clock;
use crate::error::{Failure, Kind, Result};
use crate::nbd_cert::{ClientCertificate, NewCertificate};

pub(super) async fn run(client: &Client, out: &Out, command: NbdCertCommand) -> Result<()> {
    match command {
        NbdCertCommand::New { name, out: directory, days } => {
            let name = name.to_string();
            // What stands in the way is found before anything is issued.
            prepare(&directory)?;
            let request = CertificateRequest { name, days };
            let issued: NewCertificate = client.post("/v1/nbd-certs", &request).await?;
            if let Err(error) = write(&directory, &issued) {
                // A certificate whose key is lost is of use to nobody.
                let path = format!("/v1/nbd-certs/{}", segment(&issued.name)?);
                let revoked: Result<Revoked> = client.delete(&path).await;
                let so = if revoked.is_ok() { "it was revoked" } else { "revoke it" };
                let text = format!("writing the certificate of {}: {error}; {so}", issued.name);
                return Err(Failure::new(Kind::Storage, text));
            }
            out.show(&Written::of(&issued, &directory), |written| {
                format!(
                    "{} may connect until {}, with the certificates in {dir}:\n  \
                     nbds://NODE:PORT/GROUP/DISK?tls-certificates={dir}\n  \
                     qemu --object tls-creds-x509,id=srn,endpoint=client,dir={dir}",
                    written.name,
                    written.expires_at,
                    dir = written.directory
                )
            });
            Ok(())
        }
        NbdCertCommand::List => {
            let all: Vec<ClientCertificate> = client.get("/v1/nbd-certs").await?;
            out.show(&all, |all| list(all));
            Ok(())
        }
        NbdCertCommand::Revoke { name } => {
            let path = format!("/v1/nbd-certs/{}", segment(&name)?);
            let revoked: Revoked = client.delete(&path).await?;
            out.show(&revoked, |revoked| {
                let count = revoked.disconnected;
                format!("the certificate of {name} is revoked; {count} connections were dropped")
            });
            Ok(())
        }
    }
}

/// What is shown of a new certificate: everything but the key.
#[derive(serde::Serialize)]
struct Written {
    name: String,
    expires_at: String,
    directory: String,
}

impl Written {
    fn of(issued: &NewCertificate, directory: &Path) -> Self {
        Self {
            name: issued.name.clone(),
            expires_at: issued.expires_at.clone(),
            directory: directory.display().to_string(),
        }
    }
}

fn prepare(directory: &Path) -> Result<()> {
    let failed = |error: std::io::Error| {
        Failure::new(Kind::Storage, format!("making {}: {error}", directory.display()))
    };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    for name in [CA_CERT, CLIENT_CERT, CLIENT_KEY] {
        let path = directory.join(name);
        if path.exists() {
            let text = format!("{} is there already; name another directory", path.display());
            return Err(Failure::conflict(text));
        }
    }
    Ok(())
}

fn write(directory: &Path, issued: &NewCertificate) -> std::io::Result<()> {
    for (name, mode, text) in [
        (CLIENT_KEY, 0o600, &issued.client_key),
        (CLIENT_CERT, 0o644, &issued.client_cert),
        (CA_CERT, 0o644, &issued.ca_cert),
    ] {
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(directory.join(name))?;
        file.write_all(text.as_bytes())?;
    }
    Ok(())
}

fn list(all: &[ClientCertificate]) -> String {
    if all.is_empty() {
        return "no certificate was issued yet".to_owned();
    }
    let now = clock::wall().0;
    let lines: Vec<String> = all
        .iter()
        .map(|client| {
            let time = |at| clock::rfc3339(WallTime(at));
            let state = match client.revoked_at {
                Some(at) => format!("revoked {}", time(at)),
                None if client.expires_at < now => format!("expired {}", time(client.expires_at)),
                None => format!("valid until {}", time(client.expires_at)),
            };
            format!("{:<24} issued {}  {state}", client.name, time(client.issued_at))
        })
        .collect();
    lines.join("\n")
}
