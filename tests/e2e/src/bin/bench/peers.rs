//! Those beside whom the product is measured.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use srn_e2e::wait_for;
use tokio::process::{Child, Command};

/// A server of somebody else, on loopback. Ended when dropped.
pub(crate) struct Server {
    _child: Child,
    port: u16,
}

impl Server {
    /// Starts `command`, which will listen on `port`.
    pub(crate) async fn start(mut command: Command, port: u16) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        listens(port).await;
        Self { _child: child, port }
    }

    /// The address of its one export.
    pub(crate) fn uri(&self) -> String {
        format!("nbd://127.0.0.1:{}/disk", self.port)
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }
}

/// Waits until somebody listens on `port`. Nobody is called for that: a server that takes one
/// client, or writes of each, is left alone.
pub(crate) async fn listens(port: u16) {
    let entry = format!(":{port:04X} 00000000:0000 0A");
    wait_for("a server listens", Duration::from_secs(10), async || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
        table.contains(&entry).then_some(())
    })
    .await;
}

/// A port that nobody uses now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    listener.local_addr().expect("an address").port()
}

/// qemu-nbd as its manual says it is fastest, past the page cache.
pub(crate) async fn qemu_nbd(file: &Path, more: &[&str]) -> Server {
    let port = free_port();
    let mut command = Command::new("qemu-nbd");
    command
        .args(["-f", "raw", "--cache=none", "--aio=native", "--discard=unmap", "--persistent"])
        .args(["-x", "disk", "-b", "127.0.0.1", "-p", &port.to_string(), "--shared", "16"])
        .args(more)
        .arg(file);
    Server::start(command, port).await
}

/// A file of this size whose blocks are all allocated and written: the kindest to whoever
/// overwrites them.
pub(crate) fn written_file(dir: &Path, name: &str, mib: usize) -> PathBuf {
    let path = dir.join(name);
    let mut file = File::create(&path).expect("a file");
    let block: Vec<u8> = (0..1 << 20).map(|at| (at % 251) as u8).collect();
    for _ in 0..mib {
        file.write_all(&block).expect("room");
    }
    file.sync_all().expect("a sync");
    path
}
