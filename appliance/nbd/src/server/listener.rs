//! Where clients come in, and who may.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::backend::Peer;
use crate::tls::ServerTls;
use crate::transport::Stream;

/// A socket that accepts connections, with its rule of whom to accept.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    tls: Option<ServerTls>,
}

#[derive(Debug)]
enum Socket {
    Tcp { listener: TcpListener, allowed: Vec<IpNet> },
    Unix { listener: UnixListener, path: Option<PathBuf> },
}

/// A connection that was accepted, or turned away.
pub(super) enum Accepted {
    Welcome(Stream, Peer),
    Refused(IpAddr),
}

impl Listener {
    /// Listens on a TCP address. A client whose address is in none of the `allowed` networks is
    /// turned away before a byte is read; so an empty list turns everybody away.
    ///
    /// # Errors
    /// As binding gives them.
    pub async fn tcp(address: SocketAddr, allowed: Vec<IpNet>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self { socket: Socket::Tcp { listener, allowed }, tls: None })
    }

    /// The networks of everybody, for [`Listener::tcp`] where [`Listener::requiring_tls`] decides.
    #[must_use]
    pub fn anywhere() -> Vec<IpNet> {
        let any = |address| IpNet::new_assert(address, 0);
        vec![any(IpAddr::from([0; 4])), any(IpAddr::from([0; 16]))]
    }

    /// Serves only clients that start TLS and show a certificate that is admitted. A unix socket
    /// stays as it is: its clients are known by the kernel.
    #[must_use]
    pub fn requiring_tls(mut self, tls: ServerTls) -> Self {
        if matches!(self.socket, Socket::Tcp { .. }) {
            self.tls = Some(tls);
        }
        self
    }

    pub(super) const fn tls(&self) -> Option<&ServerTls> {
        self.tls.as_ref()
    }

    /// The networks of this machine itself, for [`Listener::tcp`].
    #[must_use]
    pub fn loopback() -> Vec<IpNet> {
        let v4 = IpNet::new_assert(IpAddr::from([127, 0, 0, 0]), 8);
        let v6 = IpNet::new_assert(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), 128);
        vec![v4, v6]
    }

    /// Listens on a unix socket, whose file is made here and removed when the listener is dropped.
    /// A file left behind by a dead process is replaced. Who may connect is decided by the rights
    /// of the directory.
    ///
    /// # Errors
    /// `AddrInUse` if somebody else listens there, otherwise as binding gives them.
    pub async fn unix(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                match UnixStream::connect(path).await {
                    Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                        std::fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    _ => return Err(error),
                }
            }
            other => other?,
        };
        Ok(Self { socket: Socket::Unix { listener, path: Some(path.to_owned()) }, tls: None })
    }

    /// Takes over a unix socket that listens already, for instance one given by systemd.
    #[must_use]
    pub fn from_unix(listener: UnixListener) -> Self {
        Self { socket: Socket::Unix { listener, path: None }, tls: None }
    }

    /// The TCP address listened on, with the port that was really bound.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp { listener, .. } => listener.local_addr().ok(),
            Socket::Unix { .. } => None,
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match &self.socket {
            Socket::Tcp { listener, allowed } => {
                let (stream, address) = listener.accept().await?;
                let host = address.ip().to_canonical();
                if allowed.iter().any(|network| network.contains(&host)) {
                    let peer = Peer::Tcp(SocketAddr::new(host, address.port()));
                    Ok(Accepted::Welcome(Stream::Tcp(stream), peer))
                } else {
                    Ok(Accepted::Refused(host))
                }
            }
            Socket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let peer = unix_peer(&stream)?;
                Ok(Accepted::Welcome(Stream::Unix(stream), peer))
            }
        }
    }
}

pub(super) fn unix_peer(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = stream.peer_cred()?;
    let (process, user, group) = (credentials.pid(), credentials.uid(), credentials.gid());
    Ok(Peer::Unix { process, user, group })
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix { path: Some(path), .. } = &self.socket {
            // Somebody may have been faster; that is as good.
            let _ = std::fs::remove_file(path);
        }
    }
}
