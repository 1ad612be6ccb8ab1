//! From an address to a connection: sockets and the handshake.

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::ConnectOptions;
use super::error::ClientError;
use super::uri::Address;
use crate::proto::{ClientEvent, ClientHandshake, ExportSummary, Negotiated};
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

/// Leads a handshake to its end. What the server sent beyond it comes back too.
pub(super) async fn negotiate(
    stream: &mut Stream,
    mut machine: ClientHandshake,
    options: &ConnectOptions,
) -> Result<(Outcome, BytesMut), ClientError> {
    stream.prepare(options.dead_peer).map_err(ClientError::io("preparing the socket"))?;
    let mut input = BytesMut::with_capacity(4096);
    let mut out = Vec::new();
    loop {
        let event = machine.step(&mut input, &mut out);
        if !out.is_empty() {
            let sent = stream.write_all(&out).await;
            out.clear();
            // A server that has closed may have told the reason, which is better than this one.
            if event.is_ok()
                && let Err(error) = sent
            {
                return Err(ClientError::io("sending")(error));
            }
        }
        match event? {
            ClientEvent::Ready(negotiated) => return Ok((Outcome::Ready(negotiated), input)),
            ClientEvent::Listed(exports) => return Ok((Outcome::Listed(exports), input)),
            ClientEvent::NeedInput => {
                input.reserve(4096);
                match stream.read_buf(&mut input).await {
                    Ok(0) => return Err(ClientError::ServerGone),
                    Ok(_) => {}
                    Err(error) => return Err(ClientError::io("receiving")(error)),
                }
            }
        }
    }
}
