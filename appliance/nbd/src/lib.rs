//! The NBD protocol: sans-I/O machines, a tokio server and a tokio client.
//!
//! * [`proto`] is the protocol without a socket: handshake machines, requests, replies. Pure.
//! * [`server`] (feature `server`) serves exports of a [`server::Backend`] to many clients.
//! * [`client`] (feature `client`) uses an export of any server.
//!
//! * [`tls`] is certificates, for both.
//!
//! Spoken are fixed newstyle, structured replies, TLS by certificates over TCP and `base:allocation`;
//! the client understands `qemu:dirty-bitmap` too; not spoken are oldstyle and the experimental extensions (extended headers, resize). The source for
//! all of it is `doc/proto.md` of the NetworkBlockDevice/nbd repository.
//!
//! This crate knows nothing of replication, of files or of devices.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//!
//! use srn_nbd::client::{Client, ConnectOptions};
//! use srn_nbd::proto::{ErrorCode, ExportInfo, ExportSummary, OpenError};
//! use srn_nbd::server::{
//!     Backend, ClientInfo, Export, Limits, Listener, PayloadBudget, Reply, Request, Server,
//! };
//!
//! /// One disk in memory, whoever asks for it by whatever name.
//! #[derive(Clone)]
//! struct Disk(Arc<Mutex<Vec<u8>>>);
//!
//! impl Backend for Disk {
//!     fn list(&self, _: &ClientInfo) -> Vec<ExportSummary> {
//!         Vec::new()
//!     }
//!
//!     fn describe(&self, _: &str, _: &ClientInfo) -> Result<ExportInfo, OpenError> {
//!         Ok(self.info())
//!     }
//!
//!     async fn open(&self, _: &str, _: &ClientInfo) -> Result<Arc<dyn Export>, OpenError> {
//!         Ok(Arc::new(self.clone()))
//!     }
//! }
//!
//! impl Export for Disk {
//!     fn info(&self) -> ExportInfo {
//!         ExportInfo::writable(1 << 20)
//!     }
//!
//!     fn submit(&self, request: Request, reply: Reply) {
//!         let mut disk = self.0.lock().unwrap();
//!         match request {
//!             Request::Read { offset, length } => {
//!                 reply.data(disk[offset as usize..][..length as usize].to_vec());
//!             }
//!             Request::Write { offset, data, .. } => {
//!                 disk[offset as usize..][..data.len()].copy_from_slice(&data);
//!                 reply.ok();
//!             }
//!             Request::Flush => reply.ok(),
//!             _ => reply.error(ErrorCode::Invalid, "too simple a disk"),
//!         }
//!     }
//!
//!     fn closed(&self) {}
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = Arc::new(Disk(Arc::new(Mutex::new(vec![0; 1 << 20]))));
//! let server = Server::new(disk, Limits::default(), PayloadBudget::default());
//! let listener = Listener::tcp(([127, 0, 0, 1], 0).into(), Listener::loopback()).await?;
//! let address = listener.tcp_address().ok_or("no address")?;
//! server.listen(listener);
//!
//! let uri = format!("nbd://{address}/disk").parse()?;
//! let client = Client::connect(&uri, &ConnectOptions::default()).await?;
//! client.write(4096, vec![7; 512].into(), true).await?;
//! assert_eq!(client.read(4096, 512).await?, vec![7; 512]);
//! client.disconnect().await?;
//! server.shutdown(std::time::Duration::from_secs(1)).await;
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "client")]
pub mod client;
pub mod proto;
#[cfg(feature = "server")]
pub mod server;
#[cfg(any(feature = "server", feature = "client"))]
pub mod tls;
#[cfg(any(feature = "server", feature = "client"))]
mod transport;
