//! What server and client share between the protocol and the kernel: sockets, buffers, and the
//! queue of bytes to send. Knows nothing of requests or exports.

#![cfg_attr(
    not(feature = "server"),
    expect(dead_code, reason = "a client alone neither corks nor counts")
)]

mod gulp;
mod outbox;
mod pool;
mod queue;
mod socket;
mod tls;

pub(crate) use gulp::Gulp;
pub(crate) use outbox::Outbox;
#[cfg(feature = "client")]
pub(crate) use pool::PayloadBuffer;
pub(crate) use pool::PayloadPool;
#[cfg(feature = "server")]
pub(crate) use queue::Queue;
pub(crate) use socket::{ReadHalf, Stream};
