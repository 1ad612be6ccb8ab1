//! What the end-to-end tests, the demonstration and the measurements share: nodes that are real
//! daemons with directories of their own, the command line as an administrator types it, foreign
//! NBD programs, and a server in QEMU.
//!
//! It knows the product only from outside: its command line, its files' places, NBD and QMP.

pub mod guest;
pub mod node;
pub mod relay;
pub mod tool;
pub mod volume;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

pub use guest::Guest;
pub use node::{Node, Ran};
pub use relay::Relay;
pub use volume::Volume;

/// How long a test waits for something that happens within a second on a quiet machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory for one test, and loopback addresses that nobody else has.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// An empty directory under the system's temporary one (`TMPDIR`).
    ///
    /// # Panics
    /// When there is no room for it.
    #[must_use]
    pub fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    /// An empty directory in `parent`. Unix sockets have short names: keep it short.
    ///
    /// # Panics
    /// When there is no room for it.
    #[must_use]
    pub fn within(parent: &Path) -> Self {
        let mut dir = tempfile::Builder::new().prefix("srn-").tempdir_in(parent).expect("room");
        // For whoever wants to look at it afterwards.
        dir.disable_cleanup(std::env::var_os("SRN_KEEP").is_some());
        Self { dir }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A node that was never started.
    #[must_use]
    pub fn node(&self, name: &str) -> Node {
        Node::new(self.dir(), name, own_address())
    }

    /// A production and a recovery node, running and paired.
    pub async fn pair(&self) -> (Node, Node) {
        let (mut production, mut recovery) = (self.node("production"), self.node("recovery"));
        recovery.start().await;
        production.start().await;
        production.pair_with(&recovery).await;
        (production, recovery)
    }
}

/// A loopback address that no other test of this process or of one that runs beside it uses.
fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    let last = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(last < 255, "more than 254 nodes in one process");
    Ipv4Addr::new(127, 1 + high % 250, low, last)
}

/// Waits until `look` gives something, looking again and again.
///
/// # Panics
/// When it has not within `patience`, naming what was waited for.
pub async fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A seeded source of chance (splitmix64), so that a run can be had again.
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// The seed in the environment variable `name`, else a new one; printed either way.
    ///
    /// # Panics
    /// When the variable holds no number.
    #[must_use]
    #[expect(clippy::print_stderr, reason = "whoever sees the test fail needs the seed")]
    pub fn from_env(name: &str) -> Self {
        let seed = match std::env::var(name) {
            Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
            Err(_) => std::time::SystemTime::UNIX_EPOCH
                .elapsed()
                .map_or(0, |since| since.as_nanos() as u64),
        };
        eprintln!("replay with {name}={seed}");
        Self(seed)
    }

    /// Begins with this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}
