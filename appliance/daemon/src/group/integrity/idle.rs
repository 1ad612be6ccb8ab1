//! One thread for everything that reads and hashes whole disks: with little priority, one piece at
//! a time, however many groups want something.

use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use tokio::sync::oneshot;

use crate::error::{Failure, Result};

/// Priority given up: servers and replication come first.
const NICE: i32 = 15;

/// Pieces of work that may wait.
const WAITING_MAX: usize = 64;

type Piece = Box<dyn FnOnce() + Send>;

fn worker() -> Result<&'static SyncSender<Piece>> {
    static WORKER: OnceLock<std::result::Result<SyncSender<Piece>, String>> = OnceLock::new();
    let begun = WORKER.get_or_init(|| {
        let (sender, pieces) = sync_channel::<Piece>(WAITING_MAX);
        let thread = std::thread::Builder::new().name("integrity".into());
        let started = thread.spawn(move || {
            crate::supervise::yield_priority(NICE);
            for piece in pieces {
                piece();
            }
        });
        started.map(|_| sender).map_err(|error| error.to_string())
    });
    begun.as_ref().map_err(|error| Failure::internal(format!("starting a thread: {error}")))
}

/// Runs a piece of work on that thread. A piece takes a fraction of a second: others wait for it.
///
/// # Errors
/// When too much waits already.
pub(super) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (done, told) = oneshot::channel();
    let piece: Piece = Box::new(move || {
        // Nobody waits for it any more.
        if done.is_closed() {
            return;
        }
        let _ = done.send(work());
    });
    worker()?.try_send(piece).map_err(|error| match error {
        TrySendError::Full(_) => {
            Failure::conflict("too much is being compared at once; try it again later")
        }
        TrySendError::Disconnected(_) => Failure::internal("a thread ended"),
    })?;
    told.await.map_err(|_| Failure::internal("a piece of work was lost"))
}
