//! Receiving what changed in a group, in place of its frames.
//!
//! It refuses to know what the items mean.

use std::net::SocketAddr;

use srn_core::wire::{ChangesHeader, Item, ItemHead};

use crate::endpoint::refine;
use crate::error::LinkError;

/// What begins a stream of changes.
#[derive(Debug)]
pub struct Changes {
    /// Its header.
    pub header: ChangesHeader,
    /// The catalog behind it, as it came.
    pub catalog: Vec<u8>,
    /// What follows.
    pub reader: ChangesReader,
}

/// Receives what changed, in order.
#[derive(Debug)]
pub struct ChangesReader {
    pub(crate) receive: quinn::RecvStream,
    pub(crate) addr: SocketAddr,
}

impl ChangesReader {
    /// The next item, and its length on the wire in bytes.
    ///
    /// # Errors
    /// [`LinkError::Misbehaved`], [`LinkError::Unreachable`]; the stream does not end before
    /// [`Item::End`].
    pub async fn next(&mut self) -> Result<(Item, u64), LinkError> {
        let mut head = [0; ItemHead::LEN];
        self.read(&mut head).await?;
        let head = ItemHead::decode(&head)?;
        let mut body = vec![0; head.body_len()];
        self.read(&mut body).await?;
        Ok((Item::decode(&head, &body)?, (ItemHead::LEN + body.len()) as u64))
    }

    pub(crate) async fn read(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        self.receive.read_exact(into).await.map_err(|error| match error {
            quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => {
                refine(self.addr, &error)
            }
            // Given up by the sender, who offers the group anew.
            other => LinkError::gone(&self.addr, &other),
        })
    }
}
