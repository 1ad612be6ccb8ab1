//! From an address to a connection: sockets and the handshake.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::ConnectOptions;
use super::error::ClientError;
use super::uri::Address;
use crate::proto::{ClientEvent, ClientHandshake, ClientHandshakeError, ExportSummary, Negotiated};
use crate::tls::ClientTls;
use crate::transport::Stream;

pub(super) async fn open(address: &Address) -> Result<Stream, ClientError> {
    let connecting = "connecting";
    Ok(match address {
        Address::Tcp { host, port } => Stream::Tcp(
            TcpStream::connect((host.as_str(), *port))
                .await
                .map_err(ClientError::io(connecting))?,
        ),
        Address::Unix(path) => {
            Stream::Unix(UnixStream::connect(path).await.map_err(ClientError::io(connecting))?)
        }
    })
}

/// What a handshake led to.
pub(super) enum Outcome {
    Ready(Box<Negotiated>),
    Listed(Vec<ExportSummary>),
}

/// Leads a handshake to its end, through TLS with the host of that name if there is any. What the
/// server sent beyond it comes back too.
pub(super) async fn negotiate(
    mut stream: Stream,
    tls: Option<(&ClientTls, &str)>,
    mut machine: ClientHandshake,
    options: &ConnectOptions,
) -> Result<(Outcome, BytesMut, Stream), ClientError> {
    stream.prepare(options.dead_peer).map_err(ClientError::io("preparing the socket"))?;
    let mut input = BytesMut::with_capacity(4096);
    let mut out = Vec::new();
    loop {
        let event = machine.step(&mut input, &mut out);
        if !out.is_empty() {
            let sent = send(&mut stream, &out).await;
            out.clear();
            // A server that has closed may have told the reason, which is better than this one.
            if event.is_ok()
                && let Err(error) = sent
            {
                return Err(ClientError::io("sending")(error));
            }
        }
        match event? {
            ClientEvent::Ready(negotiated) => {
                return Ok((Outcome::Ready(negotiated), input, stream));
            }
            ClientEvent::Listed(exports) => return Ok((Outcome::Listed(exports), input, stream)),
            ClientEvent::StartTls => {
                let refused = || ClientHandshakeError::TlsRefused("we have no certificates".into());
                let (tls, host) = tls.ok_or_else(refused)?;
                let connection = tls.connection(host)?;
                stream = stream.secure(connection).await.map_err(tls_error)?;
            }
            ClientEvent::NeedInput => {
                input.reserve(4096);
                match stream.read_buf(&mut input).await {
                    Ok(0) => return Err(ClientError::ServerGone),
                    Ok(_) => {}
                    // A server tells only now that it does not like our certificate.
                    Err(error) => return Err(tls_error(error)),
                }
            }
        }
    }
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

fn tls_error(error: io::Error) -> ClientError {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::AlertReceived(alert)) => {
            ClientError::TlsFailed(format!("server refuses us ({alert:?})"))
        }
        Some(other) => ClientError::TlsFailed(other.to_string()),
        None if error.kind() == io::ErrorKind::UnexpectedEof => ClientError::ServerGone,
        None => ClientError::io("receiving")(error),
    }
}
