//! A client without manners: says what the test wants said, byte by byte.

use std::net::SocketAddr;

use bytes::BufMut;
use srn_nbd::proto::RequestHeader;
use srn_nbd::proto::constants::{
    CHUNK_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, option, option_reply,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::within;

pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
}

/// An option with its payload.
pub(crate) fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.put_u32(option);
    bytes.put_u32(payload.len() as u32);
    bytes.put_slice(payload);
    bytes
}

impl Raw {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = within("connecting", TcpStream::connect(address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream }
    }

    /// Past the greeting, with the usual flags.
    pub(crate) async fn greeted(address: SocketAddr) -> Self {
        let mut raw = Self::connect(address).await;
        assert_eq!(raw.take(18).await, b"NBDMAGICIHAVEOPT\0\x03");
        raw.send(&[0, 0, 0, 3]).await;
        raw
    }

    /// In transmission.
    pub(crate) async fn using(address: SocketAddr, export: &str, structured: bool) -> Self {
        let mut raw = Self::greeted(address).await;
        if structured {
            raw.send(&option_bytes(option::STRUCTURED_REPLY, &[])).await;
            assert_eq!(raw.replies().await, [option_reply::ACK]);
            let mut contexts = Vec::new();
            contexts.put_u32(export.len() as u32);
            contexts.put_slice(export.as_bytes());
            contexts.put_slice(b"\0\0\0\x01\0\0\0\x0fbase:allocation");
            raw.send(&option_bytes(option::SET_META_CONTEXT, &contexts)).await;
            raw.replies().await;
        }
        raw.send(&option_bytes(option::GO, &Self::go_payload(export))).await;
        assert_eq!(raw.replies().await.last(), Some(&option_reply::ACK));
        raw
    }

    pub(crate) fn go_payload(export: &str) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.put_u32(export.len() as u32);
        payload.put_slice(export.as_bytes());
        payload.put_u16(0);
        payload
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        within("sending", self.stream.write_all(bytes)).await.unwrap();
    }

    pub(crate) async fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        within("receiving", self.stream.read_exact(&mut bytes)).await.unwrap();
        bytes
    }

    async fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).await.try_into().unwrap())
    }

    async fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).await.try_into().unwrap())
    }

    async fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).await.try_into().unwrap())
    }

    /// The types of the replies to one option, to the last.
    pub(crate) async fn replies(&mut self) -> Vec<u32> {
        let mut kinds = Vec::new();
        loop {
            assert_eq!(self.take_u64().await, OPTION_REPLY_MAGIC);
            self.take_u32().await;
            let kind = self.take_u32().await;
            let length = self.take_u32().await;
            self.take(length as usize).await;
            kinds.push(kind);
            if kind == option_reply::ACK || kind & option_reply::ERROR_BIT != 0 {
                return kinds;
            }
        }
    }

    pub(crate) async fn request(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u32,
    ) {
        let mut bytes = Vec::new();
        RequestHeader { flags, command, cookie, offset, length }.encode(&mut bytes);
        self.send(&bytes).await;
    }

    /// Error and cookie of a simple reply.
    pub(crate) async fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.take_u32().await, SIMPLE_REPLY_MAGIC);
        (self.take_u32().await, self.take_u64().await)
    }

    /// Flags, type, cookie and payload of a chunk.
    pub(crate) async fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        assert_eq!(self.take_u32().await, CHUNK_MAGIC);
        let (flags, kind) = (self.take_u16().await, self.take_u16().await);
        let cookie = self.take_u64().await;
        let length = self.take_u32().await;
        (flags, kind, cookie, self.take(length as usize).await)
    }

    /// The server closes without another byte.
    pub(crate) async fn assert_closed(&mut self) {
        let mut byte = [0; 1];
        match within("closing", self.stream.read(&mut byte)).await {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("expected the end, got {other:?} {byte:?}"),
        }
    }

    /// Nothing has arrived so far.
    pub(crate) fn assert_silent(&self) {
        let mut byte = [0; 1];
        match self.stream.try_read(&mut byte) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => panic!("expected nothing, got {other:?} {byte:?}"),
        }
    }
}
