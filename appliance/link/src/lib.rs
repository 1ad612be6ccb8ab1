//! The link between two paired nodes.
//!
//! One QUIC connection (TLS 1.3, one UDP port) carries everything: a control stream with messages
//! both ways, and one stream of frames for each group. Nodes know each other by the SHA-256 of
//! their public keys and by nothing else; certificates are wrappers whose names and dates nobody
//! looks at, so a wrong clock does not matter.
//!
//! What this crate refuses to know: what is in a frame, where frames are kept, which group is in
//! which state. It hands typed messages and streams to its caller, who drives the machines of
//! `srn-core` with them.

mod changes;
pub mod congestion;
pub mod diagnose;
pub mod dial;
pub mod endpoint;
pub mod error;
pub mod identity;
pub mod pairing;
pub mod session;
mod shaping;
mod tls;

pub use changes::{Changes, ChangesReader};
pub use endpoint::{Accepted, Endpoint, EndpointConfig};
pub use error::LinkError;
pub use identity::Identity;
pub use session::{FrameReader, FrameWriter, InFrame, Path, Session, SessionEvent};
pub use shaping::Traffic;

/// Counts what decoders allocate, for the fuzzing tests.
#[cfg(test)]
#[global_allocator]
static COUNTING: srn_testkit::fuzz::Counting = srn_testkit::fuzz::Counting;
