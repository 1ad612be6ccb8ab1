//! The vocabulary of the tests.

pub(crate) mod authority;
pub(crate) mod backend;
pub(crate) mod logs;
mod random;
mod raw;
mod tools;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use srn_nbd::client::{Address, Client, ConnectOptions, Uri};
use srn_nbd::proto::{ExportInfo, OpenError};
use srn_nbd::server::{Limits, Listener, PayloadBudget, Server};
use tempfile::TempDir;

use backend::{Completion, Exports, Held, Memory, Null};

pub(crate) use random::Random;
pub(crate) use raw::{Raw, option_bytes};
pub(crate) use tools::{Process, python_nbd, tool, tool_fails};

/// Bytes of the exports in memory.
pub(crate) const SIZE: u64 = 64 << 20;

/// No wait in a test is longer; one that is, fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a test as a whole may take, which is more than any of its waits and any tool.
const TEST_PATIENCE: Duration = Duration::from_secs(240);

/// Ends the whole run when the test that holds this hangs, rather than leave it hanging.
pub(crate) struct Deadline {
    _test: std::sync::mpsc::Sender<()>,
}

impl Deadline {
    pub(crate) fn start() -> Self {
        let (test, ended) = std::sync::mpsc::channel();
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            let timeout = std::sync::mpsc::RecvTimeoutError::Timeout;
            if ended.recv_timeout(TEST_PATIENCE) == Err(timeout) {
                println!("{name} hangs");
                std::process::abort();
            }
        });
        Self { _test: test }
    }
}

/// A running server with exports to test with:
///
/// | name | what it is |
/// |---|---|
/// | `disk` and the default | memory, answering inline |
/// | `threaded` | the same memory, answering from a thread |
/// | `reader` | the same memory, read-only |
/// | `plain` | the same memory, without any ability that has a flag |
/// | `held` | answers when the test does |
/// | `huge` | a tebibyte of nothing |
/// | `secret` | refused by policy |
pub(crate) struct Fixture {
    pub(crate) server: Server<Exports>,
    pub(crate) exports: Arc<Exports>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) held: Arc<Held>,
    pub(crate) budget: PayloadBudget,
    pub(crate) tcp: SocketAddr,
    directory: TempDir,
    _deadline: Deadline,
}

impl Fixture {
    pub(crate) async fn start() -> Self {
        Self::with_limits(Limits::default()).await
    }

    pub(crate) async fn with_limits(limits: Limits) -> Self {
        Self::with(limits, PayloadBudget::default()).await
    }

    pub(crate) async fn with(limits: Limits, budget: PayloadBudget) -> Self {
        logs::collect();
        let memory = Arc::new(Memory::new(SIZE));
        let held = Arc::new(Held::default());
        let info = ExportInfo {
            multi_conn: true,
            can_fast_zero: true,
            can_cache: true,
            description: "memory to test with".to_owned(),
            ..ExportInfo::writable(SIZE)
        };
        let reader = ExportInfo { read_only: true, ..info.clone() };
        let plain = ExportInfo {
            can_flush: false,
            can_fua: false,
            can_trim: false,
            can_write_zeroes: false,
            can_fast_zero: false,
            can_cache: false,
            multi_conn: false,
            allocation: false,
            ..info.clone()
        };
        let huge = ExportInfo { size: 1 << 40, ..info.clone() };
        let exports = Exports::default()
            .with("", info.clone(), memory.clone(), Completion::Inline)
            .with("disk", info.clone(), memory.clone(), Completion::Inline)
            .with("threaded", info.clone(), memory.clone(), Completion::Thread)
            .with("reader", reader, memory.clone(), Completion::Inline)
            .with("plain", plain, memory.clone(), Completion::Inline)
            .with("huge", huge, Arc::new(Null), Completion::Inline)
            .with_held("held", info, &held)
            .with_refused("secret", OpenError::Policy("not yours".to_owned()));
        let exports = Arc::new(exports);
        let server = Server::new(Arc::clone(&exports), limits, budget.clone());

        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let tcp_listener = Listener::tcp(local, Listener::loopback()).await.unwrap();
        let tcp = tcp_listener.tcp_address().unwrap();
        server.listen(tcp_listener);
        let directory = tempfile::tempdir().unwrap();
        server.listen(Listener::unix(directory.path().join("nbd.sock")).await.unwrap());
        let _deadline = Deadline::start();
        Self { server, exports, memory, held, budget, tcp, directory, _deadline }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub(crate) fn tcp_uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.tcp)
    }

    pub(crate) fn unix_uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) async fn client(&self, export: &str) -> Client {
        self.client_with(export, &ConnectOptions::default()).await
    }

    pub(crate) async fn client_with(&self, export: &str, options: &ConnectOptions) -> Client {
        let address = Address::Tcp { host: self.tcp.ip().to_string(), port: self.tcp.port() };
        let uri = Uri { address, export: export.to_owned(), tls: None };
        within("connecting", Client::connect(&uri, options)).await.unwrap()
    }

    pub(crate) async fn raw(&self) -> Raw {
        Raw::connect(self.tcp).await
    }

    /// The connections there are, as the log names them.
    pub(crate) fn clients(&self) -> Vec<String> {
        self.server.connections().iter().map(|status| status.client.to_string()).collect()
    }

    pub(crate) fn opened(&self) -> usize {
        self.exports.opened.load(Ordering::SeqCst)
    }

    pub(crate) fn closed(&self) -> usize {
        self.exports.closed.load(Ordering::SeqCst)
    }

    /// The server still serves: a client connects, writes, and reads it back.
    pub(crate) async fn assert_healthy(&self) {
        let client = self.client("disk").await;
        let data = backend::pattern(99, 0, 8192);
        within("writing", client.write(SIZE - 8192, data.clone(), false)).await.unwrap();
        assert_eq!(within("reading", client.read(SIZE - 8192, 8192)).await.unwrap(), data);
        client.disconnect().await.unwrap();
    }
}

/// Parses what a test wrote.
pub(crate) fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

/// The result of something that must not take long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(result) => result,
        Err(_) => panic!("{what} took longer than {PATIENCE:?}"),
    }
}

/// Waits for a condition that is brought about elsewhere.
pub(crate) async fn until(what: &str, mut met: impl FnMut() -> bool) {
    within(what, async {
        while !met() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Runs what blocks without holding up the server.
pub(crate) async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(act).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
