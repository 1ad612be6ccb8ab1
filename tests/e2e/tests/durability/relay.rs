//! Lines between programs that can be cut: UDP between the nodes, TCP between a client and a node.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::sockopt;
use srn_e2e::Chance;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;

/// A free port on the loopback.
const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// The largest datagram.
const DATAGRAM: usize = 1 << 16;

/// Kernel buffers of the relay's sockets: it is to lose what it is told to, and little else.
const SOCKET_BUFFER: usize = 4 << 20;

/// What the line between two nodes is like.
#[derive(Debug, Default)]
struct Weather {
    /// Nothing passes from the node that dials.
    cut_there: AtomicBool,
    /// Nothing passes to it.
    cut_back: AtomicBool,
    /// Datagrams lost of a thousand.
    loss: AtomicU64,
    /// The longest delay; each datagram has its own, so they overtake each other.
    delay_us: AtomicU64,
    /// Bytes that have passed from the node that dials.
    passed: AtomicU64,
    /// The line is cut when so many have.
    cut_at: AtomicU64,
}

impl Weather {
    /// How long a datagram takes; none when it does not arrive.
    fn fate(&self, cut: &AtomicBool, chance: &mut Chance) -> Option<Duration> {
        if cut.load(Ordering::SeqCst) || chance.below(1000) < self.loss.load(Ordering::SeqCst) {
            return None;
        }
        let longest = self.delay_us.load(Ordering::SeqCst);
        Some(Duration::from_micros(chance.below(longest + 1)))
    }

    fn set_cut(&self, there: bool, back: bool) {
        self.cut_there.store(there, Ordering::SeqCst);
        self.cut_back.store(back, Ordering::SeqCst);
    }
}

/// The way towards the recovery node, and who brings its answers back.
struct Upstream {
    socket: Arc<UdpSocket>,
    task: JoinHandle<()>,
}

/// A relay between the node that dials and the one that is dialled.
pub(crate) struct Relay {
    address: SocketAddr,
    front: Arc<UdpSocket>,
    weather: Arc<Weather>,
    upstream: Arc<Mutex<Upstream>>,
    /// Where the node that dials was heard last.
    dialler: Arc<Mutex<Option<SocketAddr>>>,
    task: JoinHandle<()>,
    chance: Chance,
}

async fn udp() -> UdpSocket {
    let socket = UdpSocket::bind(ANY).await.expect("a UDP port");
    // As much as the system allows.
    let _ = sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
    let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
    socket
}

/// Sends a datagram after its delay. That nobody listens is no matter.
async fn pass(socket: &Arc<UdpSocket>, bytes: &[u8], to: SocketAddr, delay: Duration) {
    if delay.is_zero() {
        let _ = socket.send_to(bytes, to).await;
        return;
    }
    let (socket, bytes) = (socket.clone(), bytes.to_vec());
    tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        let _ = socket.send_to(&bytes, to).await;
    });
}

impl Relay {
    /// A relay to `target`.
    pub(crate) async fn start(target: SocketAddr, seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let front = Arc::new(udp().await);
        let address = front.local_addr().expect("an address");
        let weather = Arc::new(Weather { cut_at: AtomicU64::new(u64::MAX), ..Weather::default() });
        let dialler = Arc::default();
        let upstream = Upstream::open(&front, &weather, &dialler, chance.next()).await;
        let upstream = Arc::new(Mutex::new(upstream));
        let task = tokio::spawn(there(
            front.clone(),
            upstream.clone(),
            target,
            weather.clone(),
            dialler.clone(),
            Chance::new(chance.next()),
        ));
        Self { address, front, weather, upstream, dialler, task, chance }
    }

    /// What to dial.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts the line in these directions.
    pub(crate) fn cut(&self, there: bool, back: bool) {
        self.weather.set_cut(there, back);
    }

    /// Cuts the line when `bytes` more have passed from the node that dials.
    pub(crate) fn cut_after(&self, bytes: u64) {
        let passed = self.weather.passed.load(Ordering::SeqCst);
        self.weather.cut_at.store(passed + bytes, Ordering::SeqCst);
    }

    /// Whether nothing passes.
    pub(crate) fn is_cut(&self) -> bool {
        self.weather.cut_there.load(Ordering::SeqCst)
    }

    /// Loses so many datagrams of a thousand, and delays each by up to `delay`.
    pub(crate) fn disturb(&self, loss: u64, delay: Duration) {
        self.weather.loss.store(loss, Ordering::SeqCst);
        self.weather.delay_us.store(delay.as_micros() as u64, Ordering::SeqCst);
    }

    /// A clear line again.
    pub(crate) fn restore(&self) {
        self.weather.cut_at.store(u64::MAX, Ordering::SeqCst);
        self.disturb(0, Duration::ZERO);
        self.weather.set_cut(false, false);
    }

    /// From now on comes from another port, as behind a router that has forgotten.
    pub(crate) async fn rebind(&mut self) {
        let seed = self.chance.next();
        let new = Upstream::open(&self.front, &self.weather, &self.dialler, seed).await;
        let mut upstream = self.upstream.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *upstream, new);
        old.task.abort();
    }
}

impl Upstream {
    async fn open(
        front: &Arc<UdpSocket>,
        weather: &Arc<Weather>,
        dialler: &Arc<Mutex<Option<SocketAddr>>>,
        seed: u64,
    ) -> Self {
        let socket = Arc::new(udp().await);
        let task = tokio::spawn(back(
            socket.clone(),
            front.clone(),
            weather.clone(),
            dialler.clone(),
            Chance::new(seed),
        ));
        Self { socket, task }
    }
}

async fn there(
    front: Arc<UdpSocket>,
    upstream: Arc<Mutex<Upstream>>,
    target: SocketAddr,
    weather: Arc<Weather>,
    dialler: Arc<Mutex<Option<SocketAddr>>>,
    mut chance: Chance,
) {
    let mut buffer = vec![0; DATAGRAM];
    loop {
        // An error tells of an earlier datagram that nobody took.
        let Ok((length, from)) = front.recv_from(&mut buffer).await else { continue };
        *dialler.lock().unwrap_or_else(PoisonError::into_inner) = Some(from);
        let passed = weather.passed.fetch_add(length as u64, Ordering::SeqCst);
        if passed >= weather.cut_at.load(Ordering::SeqCst) {
            weather.set_cut(true, true);
        }
        if let Some(delay) = weather.fate(&weather.cut_there, &mut chance) {
            let socket = {
                let upstream = upstream.lock().unwrap_or_else(PoisonError::into_inner);
                upstream.socket.clone()
            };
            pass(&socket, &buffer[..length], target, delay).await;
        }
    }
}

async fn back(
    socket: Arc<UdpSocket>,
    front: Arc<UdpSocket>,
    weather: Arc<Weather>,
    dialler: Arc<Mutex<Option<SocketAddr>>>,
    mut chance: Chance,
) {
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let Ok((length, _)) = socket.recv_from(&mut buffer).await else { continue };
        let to = *dialler.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(to), Some(delay)) = (to, weather.fate(&weather.cut_back, &mut chance)) {
            pass(&front, &buffer[..length], to, delay).await;
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.upstream.lock().unwrap_or_else(PoisonError::into_inner).task.abort();
    }
}

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
