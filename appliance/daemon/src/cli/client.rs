//! Asking the daemon: HTTP on a unix socket.

use std::path::PathBuf;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::error::{Failure, Kind, Result};

/// The largest answer in bytes.
const ANSWER_MAX: usize = 64 << 20;

/// The daemon, as a client sees it.
#[derive(Debug, Clone)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) const fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::GET, path, None::<&()>).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        self.ask(Method::POST, path, Some(body)).await
    }

    pub(super) async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        self.ask(Method::PATCH, path, Some(body)).await
    }

    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::DELETE, path, None::<&()>).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        let response = self.send(method, path, body).await?;
        let whole = collect(response.into_body()).await?;
        serde_json::from_slice(&whole)
            .map_err(|error| Failure::internal(format!("the daemon's answer: {error}")))
    }

    /// Sends a request whose answer stays open; gives its first line, and the rest to hold on to.
    pub(super) async fn hold<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(T, Incoming)> {
        let mut stream = self.send(Method::POST, path, Some(body)).await?.into_body();
        let mut line = Vec::new();
        while !line.contains(&b'\n') {
            let frame = stream
                .frame()
                .await
                .ok_or_else(|| Failure::internal("the daemon's answer ended early"))?
                .map_err(|error| Failure::unreachable(format!("the daemon: {error}")))?;
            if let Some(data) = frame.data_ref() {
                line.extend_from_slice(data);
            }
        }
        let answer = serde_json::from_slice(&line)
            .map_err(|error| Failure::internal(format!("the daemon's answer: {error}")))?;
        Ok((answer, stream))
    }

    /// Sends a request that is answered by lines of JSON; gives each to `line` until that says that
    /// it was the last. What is asked for ends when this is dropped.
    pub(super) async fn lines<T: DeserializeOwned, R>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut line: impl FnMut(T) -> Option<R>,
    ) -> Result<R> {
        let mut stream = self.send(Method::POST, path, Some(body)).await?.into_body();
        let mut rest = Vec::new();
        loop {
            let frame = stream
                .frame()
                .await
                .ok_or_else(|| Failure::unreachable("the daemon's answer ended early"))?
                .map_err(|error| Failure::unreachable(format!("the daemon: {error}")))?;
            let Some(data) = frame.data_ref() else { continue };
            rest.extend_from_slice(data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let whole: Vec<u8> = rest.drain(..=end).collect();
                let said = serde_json::from_slice(&whole)
                    .map_err(|error| Failure::internal(format!("the daemon's answer: {error}")))?;
                if let Some(last) = line(said) {
                    return Ok(last);
                }
            }
            if rest.len() > ANSWER_MAX {
                return Err(Failure::internal("the daemon's answer is too long"));
            }
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.lost(&error))?;
        let gone = |error: hyper::Error| {
            Failure::unreachable(format!("the daemon at {}: {error}", self.socket.display()))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
        tokio::spawn(connection);
        let body = match body {
            Some(body) => serde_json::to_vec(body)
                .map_err(|error| Failure::internal(format!("encoding a request: {error}")))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "srn")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Failure::invalid(format!("{path}: {error}")))?;
        let response = sender.send_request(request).await.map_err(gone)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let whole = collect(response.into_body()).await?;
        Err(serde_json::from_slice(&whole)
            .unwrap_or_else(|_| Failure::internal(format!("the daemon answered {status}"))))
    }

    fn lost(&self, error: &std::io::Error) -> Failure {
        let socket = self.socket.display();
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => Failure::new(
                Kind::Refused,
                format!(
                    "{socket} may be opened by root and by members of control.group only; \
                     try it with sudo"
                ),
            ),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                Failure::unreachable(format!(
                    "no daemon answers at {socket}; start it with: systemctl start srn, or name \
                     its socket with --socket or SRN_SOCKET"
                ))
            }
            _ => Failure::unreachable(format!("{socket}: {error}")),
        }
    }
}

async fn collect(body: Incoming) -> Result<Bytes> {
    let limited = http_body_util::Limited::new(body, ANSWER_MAX);
    let whole = limited
        .collect()
        .await
        .map_err(|error| Failure::unreachable(format!("the daemon's answer: {error}")))?;
    Ok(whole.to_bytes())
}

/// Makes a name fit for a path: what cannot be in a name is found by the daemon, not by a proxy.
///
/// # Errors
/// When it is empty: then there is no path.
pub(super) fn segment(name: &str) -> Result<String> {
    if name.is_empty() {
        return Err(Failure::invalid(
            "an empty name names nothing; srn status shows what there is",
        ));
    }
    let mut out = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_segment() {
        assert_eq!(segment("web-1").unwrap(), "web-1");
        assert_eq!(segment("../x y").unwrap(), "..%2Fx%20y");
        assert!(segment("").is_err());
    }
}
