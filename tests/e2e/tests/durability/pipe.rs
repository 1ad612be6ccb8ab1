//! A TCP connection between a client and a node that can be cut.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;

/// A free port on the loopback.
const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// How a TCP connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// As when a process dies.
    Closed,
    /// As when its machine does, or a router's patience.
    Reset,
}

/// Passes TCP connections on, until it is cut.
pub(crate) struct Pipe {
    address: SocketAddr,
    end: broadcast::Sender<Ending>,
    task: JoinHandle<()>,
}

impl Pipe {
    /// A pipe to `target`.
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(ANY).await.expect("a TCP port");
        let address = listener.local_addr().expect("an address");
        let (end, _) = broadcast::channel(1);
        let ends = end.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(target).await.expect("the node listens");
                tokio::spawn(join(client, server, ends.subscribe()));
            }
        });
        Self { address, end, task }
    }

    /// Where to connect.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections, whatever is on its way.
    pub(crate) fn cut(&self, ending: Ending) {
        self.end.send(ending).expect("somebody is connected");
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn join(
    mut client: TcpStream,
    mut server: TcpStream,
    mut ended: broadcast::Receiver<Ending>,
) {
    let ending = tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
        ending = ended.recv() => ending,
    };
    if ending == Ok(Ending::Reset) {
        let _ = sockopt::set_socket_linger(&server, Some(Duration::ZERO));
        let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
    } else {
        let _ = server.shutdown().await;
    }
}
