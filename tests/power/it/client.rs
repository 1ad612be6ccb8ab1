//! A client of one disk, that lives on: it writes, is cut off, comes back and reads everything.

use std::future::poll_fn;
use std::task::Poll;

use srn_nbd::client::{Client, ClientError, ConnectOptions, ZeroOptions};
use srn_testkit::Chance;
use tokio::task::JoinSet;

use crate::oracle::{Broken, History, SECTOR};

/// Writes in flight, at most.
const DEPTH_MAX: u64 = 24;

/// Bytes of one read.
const READ: u64 = 1 << 20;

/// A client of one disk.
pub(crate) struct DiskClient {
    export: &'static str,
    chance: Chance,
    history: History,
    client: Option<Client>,
}

/// A request under way: its number, 0 for a flush, and how it ended.
type InFlight = JoinSet<(u64, Result<(), ClientError>)>;

impl DiskClient {
    pub(crate) fn new(seed: u64, export: &'static str, disk: u64, bytes: u64) -> Self {
        Self {
            export,
            chance: Chance::new(seed ^ (disk + 1)),
            history: History::new(seed, disk, bytes / SECTOR),
            client: None,
        }
    }

    /// Connects through a port of this machine. The node is ready; what may fail is its network.
    pub(crate) async fn connect(&mut self, port: u16) -> Result<(), ClientError> {
        let uri = format!("nbd://127.0.0.1:{port}/{}", self.export).parse()?;
        let client = Client::connect(&uri, &ConnectOptions::default()).await?;
        assert_eq!(client.export().size, self.history.sectors() * SECTOR);
        self.client = Some(client);
        Ok(())
    }

    /// The connection is of no use any more.
    pub(crate) fn disconnect(&mut self) {
        self.client = None;
    }

    /// The newest write that must be there.
    pub(crate) const fn answered(&self) -> u64 {
        self.history.answered()
    }

    /// Writes until the connection ends or `count` more writes are answered, and waits for the
    /// answers to all that were sent. An answer that is an error is one.
    pub(crate) async fn write(&mut self, count: u64) -> Result<(), ClientError> {
        let depth = usize::try_from(self.chance.between(1, DEPTH_MAX)).unwrap();
        let enough = self.history.answered().saturating_add(count);
        let mut in_flight = InFlight::new();
        let (mut going, mut refused) = (true, None);
        loop {
            while going && in_flight.len() < depth {
                self.send(&mut in_flight).await;
            }
            match in_flight.join_next().await.map(Result::unwrap) {
                None => return refused.map_or(Ok(()), Err),
                Some((number, Ok(()))) => self.history.answer(number),
                Some((_, Err(error))) => {
                    going = false;
                    if matches!(error, ClientError::Server { .. } | ClientError::Violation(_)) {
                        refused = Some(error);
                    }
                }
            }
            going &= self.history.answered() < enough;
        }
    }

    /// Sends one request, of any kind.
    async fn send(&mut self, in_flight: &mut InFlight) {
        let Some(client) = self.client.clone() else { return };
        let chance = &mut self.chance;
        if chance.percent(2) {
            in_flight.spawn(async move { (0, client.flush().await) });
            return;
        }
        let sectors = match chance.below(20) {
            0..12 => 8,
            12..17 => 8 * chance.between(1, 16),
            _ => chance.between(1, 40),
        };
        // Half of it in few places, so that things are overwritten before they are answered.
        let room = if chance.percent(50) { 512 } else { self.history.sectors() - sectors };
        let start = chance.below(room + 1);
        let start = if sectors % 8 == 0 { start / 8 * 8 } else { start };
        let (zero, trim, fua) = (chance.percent(10), chance.percent(50), chance.percent(20));
        let write = self.history.send(start, sectors, zero);
        let bytes = self.history.bytes(&write);
        let (offset, length) = (start * SECTOR, u32::try_from(sectors * SECTOR).unwrap());
        let mut request = Box::pin(async move {
            let answer = match (zero, trim) {
                (false, _) => client.write(offset, bytes, fua).await,
                (true, true) => client.trim(offset, length, fua).await,
                (true, false) => {
                    let options = ZeroOptions { fua, ..ZeroOptions::default() };
                    client.write_zeroes(offset, length, options).await
                }
            };
            (write.number, answer)
        });
        // It leaves when it is polled for the first time: now, in the order of the numbers.
        match poll_fn(|context| Poll::Ready(request.as_mut().poll(context))).await {
            Poll::Ready(ended) => drop(in_flight.spawn(std::future::ready(ended))),
            Poll::Pending => drop(in_flight.spawn(request)),
        }
    }

    /// Reads the whole disk and asks the oracle. Returns how many unanswered writes are there.
    pub(crate) async fn check(&mut self) -> Result<Result<usize, Broken>, ClientError> {
        let client = self.client.clone().ok_or(ClientError::Closed)?;
        let mut found = Vec::new();
        while (found.len() as u64) < self.history.sectors() {
            let start = found.len() as u64;
            let length = READ.min((self.history.sectors() - start) * SECTOR);
            let read = client.read(start * SECTOR, u32::try_from(length).unwrap()).await?;
            found.extend(self.history.identify(start, &read));
        }
        Ok(self.history.check(&found))
    }
}
