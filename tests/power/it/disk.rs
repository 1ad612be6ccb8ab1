//! The state disk as an NBD server for QEMU.
//!
//! When the power goes off, requests are answered no more: QEMU hangs until it is killed.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use srn_nbd::proto::{ExportInfo, ExportSummary, OpenError};
use srn_nbd::server::{
    Backend, ClientInfo, Export, Limits, Listener, PayloadBudget, Reply, Request, Server,
};
use srn_testkit::BlockDisk;
use srn_testkit::disk::PowerOff;
use tokio::sync::Notify;

/// The disk and its server.
pub(crate) struct StateDisk {
    pub(crate) disk: Arc<BlockDisk>,
    went_off: Arc<Notify>,
    // Serves until dropped, with the runtime.
    _server: Server<Shelf>,
}

impl StateDisk {
    /// Serves an empty disk on a unix socket.
    pub(crate) async fn serve(seed: u64, bytes: u64, socket: &Path) -> Self {
        let disk = Arc::new(BlockDisk::new(seed, bytes));
        let went_off = Arc::new(Notify::new());
        let shelf = Shelf { disk: disk.clone(), went_off: went_off.clone() };
        let server = Server::new(Arc::new(shelf), Limits::default(), PayloadBudget::default());
        server.listen(Listener::unix(socket).await.unwrap());
        Self { disk, went_off, _server: server }
    }

    /// Waits until the power goes off.
    pub(crate) async fn off(&self) {
        while !self.disk.is_off() {
            self.went_off.notified().await;
        }
    }
}

/// The one export there is.
struct Shelf {
    disk: Arc<BlockDisk>,
    went_off: Arc<Notify>,
}

impl Shelf {
    fn info(&self) -> ExportInfo {
        ExportInfo { allocation: false, ..ExportInfo::writable(self.disk.bytes()) }
    }
}

impl Backend for Shelf {
    fn list(&self, _: &ClientInfo) -> Vec<ExportSummary> {
        Vec::new()
    }

    fn describe(&self, _: &str, _: &ClientInfo) -> Result<ExportInfo, OpenError> {
        Ok(self.info())
    }

    async fn open(&self, _: &str, _: &ClientInfo) -> Result<Arc<dyn Export>, OpenError> {
        Ok(Arc::new(Opened {
            info: self.info(),
            disk: self.disk.clone(),
            went_off: self.went_off.clone(),
            unanswered: Mutex::default(),
        }))
    }
}

struct Opened {
    info: ExportInfo,
    disk: Arc<BlockDisk>,
    went_off: Arc<Notify>,
    /// Requests that came too late.
    unanswered: Mutex<Vec<Reply>>,
}

/// What came of a request.
enum Answer {
    Done,
    Data(Vec<u8>),
}

impl Opened {
    fn run(&self, request: Request) -> Result<Answer, PowerOff> {
        match request {
            Request::Read { offset, length } => {
                let mut bytes = vec![0; length as usize];
                self.disk.read(offset, &mut bytes)?;
                return Ok(Answer::Data(bytes));
            }
            Request::Write { offset, data, fua } => self.disk.write(offset, &data, fua)?,
            Request::WriteZeroes { offset, length, fua, .. }
            | Request::Trim { offset, length, fua } => {
                self.disk.zero(offset, length.into(), fua)?;
            }
            Request::Flush => self.disk.flush()?,
            other => panic!("{other:?} was not offered"),
        }
        Ok(Answer::Done)
    }
}

impl Export for Opened {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, request: Request, reply: Reply) {
        match self.run(request) {
            Ok(Answer::Done) => reply.ok(),
            Ok(Answer::Data(bytes)) => reply.data(bytes),
            Err(PowerOff) => {
                self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).push(reply);
                self.went_off.notify_one();
            }
        }
    }

    fn closed(&self) {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
