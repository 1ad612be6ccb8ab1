//! Serves one export from memory, or from nothing, to try the server and to measure it.
//!
//! ```text
//! nbd-serve null|memory inline|thread tcp:127.0.0.1:10809|unix:/tmp/nbd.sock [bytes] [workers]
//! ```
//! `workers` is the number of runtime threads; 0 is a single-threaded runtime.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "an example run by hand")]

use std::sync::Arc;

use srn_nbd::proto::ExportInfo;
use srn_nbd::server::{Limits, Listener, PayloadBudget, Server};

#[path = "../tests/it/support/backend.rs"]
#[expect(dead_code, reason = "shared with the tests, which use more of it")]
mod backend;

use backend::{Completion, Exports, Medium, Memory, Null};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| {
        arguments.get(index).map_or_else(|| default.to_owned(), Clone::clone)
    };
    let size: u64 = argument(3, "4294967296").parse().unwrap();
    let medium: Arc<dyn Medium> = match argument(0, "memory").as_str() {
        "null" => Arc::new(Null),
        _ => Arc::new(Memory::new(size)),
    };
    let completion = match argument(1, "inline").as_str() {
        "thread" => Completion::Thread,
        _ => Completion::Inline,
    };
    let info = ExportInfo { multi_conn: true, can_fast_zero: true, ..ExportInfo::writable(size) };
    let exports = Arc::new(Exports::default().with("", info, medium, completion));

    let mut builder = match argument(4, "2").parse().unwrap() {
        0 => tokio::runtime::Builder::new_current_thread(),
        workers => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(workers);
            builder
        }
    };
    let runtime = builder.enable_all().build().unwrap();
    runtime.block_on(async {
        let server = Server::new(exports, Limits::default(), PayloadBudget::default());
        let address = argument(2, "tcp:127.0.0.1:10809");
        let listener = match address.split_once(':').unwrap() {
            ("unix", path) => Listener::unix(path).await.unwrap(),
            (_, address) => {
                Listener::tcp(address.parse().unwrap(), Listener::loopback()).await.unwrap()
            }
        };
        println!("serving {size} bytes at {address}");
        server.listen(listener);
        std::future::pending::<()>().await;
    });
}
