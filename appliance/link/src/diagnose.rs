//! Why nobody answers: asked with packets that every QUIC server answers, before anything is agreed.
//!
//! A long header with a version that does not exist is answered with a list of those that do (RFC
//! 9000, 6.1), if the packet has 1,200 bytes, the least that QUIC needs a path to take. So an answer
//! tells that the way is open, and a refusal by the system there that nobody listens. Silence is
//! asked once more with packets that may be cut into pieces: where those pass and whole ones do not,
//! the path takes only smaller ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

/// The least that a QUIC path takes, in bytes of UDP payload.
const PACKET: usize = 1200;

/// A version that is reserved for asking which there are.
const NO_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];

/// Packets that are sent before it counts as silence, and the wait for an answer to each.
const TRIES: usize = 3;
const WAIT: Duration = Duration::from_millis(400);

/// What was found out about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// A QUIC server answers.
    Answers,
    /// A machine answers that nothing listens on that port.
    Refused,
    /// The system knows no way there, or a router said so.
    NoRoute(String),
    /// Packets pass when they may be cut into pieces, and not whole.
    PacketsTooLarge,
    /// Nothing came back.
    Silent,
}

impl Reach {
    /// What it means, and the way out.
    #[must_use]
    pub fn words(&self, addr: SocketAddr) -> String {
        let port = addr.port();
        match self {
            Self::Answers => "a node answers there, but the handshake does not complete: most \
                 packets are lost on the way, or something on it filters QUIC"
                .to_owned(),
            Self::Refused => format!(
                "nothing listens on UDP port {port} there: start srn on that node, or look at its \
                 link.listen"
            ),
            Self::NoRoute(why) => {
                format!("there is no way there ({why}): check the address and the network")
            }
            Self::PacketsTooLarge => format!(
                "the path takes no packets of {} bytes, which QUIC needs: raise the MTU of the \
                 tunnel or line on the way to 1280 at least",
                PACKET + headers(addr.ip())
            ),
            Self::Silent => format!(
                "no answer: the node is off, the address is wrong, or UDP is blocked by a firewall; \
                 allow UDP port {port} to that node, and the answers back"
            ),
        }
    }
}

const fn headers(ip: IpAddr) -> usize {
    match ip {
        IpAddr::V4(_) => 28,
        IpAddr::V6(_) => 48,
    }
}

/// Asks an address what answers there.
pub async fn probe(addr: SocketAddr) -> Reach {
    match ask(addr, Whole::Yes).await {
        Reach::Silent | Reach::PacketsTooLarge => match ask(addr, Whole::No).await {
            Reach::Answers => Reach::PacketsTooLarge,
            other => other,
        },
        other => other,
    }
}

/// Whether a packet may be cut into pieces on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whole {
    Yes,
    No,
}

async fn ask(addr: SocketAddr, whole: Whole) -> Reach {
    let socket = match open(addr, whole).await {
        Ok(socket) => socket,
        Err(error) => return failed(&error).unwrap_or_else(|| Reach::NoRoute(error.to_string())),
    };
    let mut ours = [0; 8];
    if getrandom::fill(&mut ours).is_err() {
        return Reach::Silent;
    }
    let question = question(ours);
    let mut answer = [0; PACKET];
    for _ in 0..TRIES {
        if let Err(error) = socket.send(&question).await
            && let Some(reach) = failed(&error)
        {
            return reach;
        }
        match tokio::time::timeout(WAIT, socket.recv(&mut answer)).await {
            Ok(Ok(length)) if answers(answer.get(..length).unwrap_or_default(), ours) => {
                return Reach::Answers;
            }
            Ok(Ok(_)) | Err(_) => {}
            Ok(Err(error)) => {
                if let Some(reach) = failed(&error) {
                    return reach;
                }
            }
        }
    }
    Reach::Silent
}

async fn open(addr: SocketAddr, whole: Whole) -> std::io::Result<tokio::net::UdpSocket> {
    let any: IpAddr = match addr {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    match (addr, whole) {
        (SocketAddr::V4(_), Whole::Yes) => {
            sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?;
        }
        (SocketAddr::V4(_), Whole::No) => {
            sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?;
        }
        (SocketAddr::V6(_), Whole::Yes) => {
            sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?;
        }
        (SocketAddr::V6(_), Whole::No) => {
            sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DONT)?;
        }
    }
    socket.set_nonblocking(true)?;
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    // The system tells a connected socket what routers and the other machine say.
    socket.connect(addr).await?;
    Ok(socket)
}

/// What an error of the socket says about the way; nothing when it says nothing.
fn failed(error: &std::io::Error) -> Option<Reach> {
    use std::io::ErrorKind;
    /// EMSGSIZE: the packet is too large for the first line already.
    const TOO_LARGE: i32 = 90;
    if error.raw_os_error() == Some(TOO_LARGE) {
        return Some(Reach::PacketsTooLarge);
    }
    match error.kind() {
        ErrorKind::ConnectionRefused => Some(Reach::Refused),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
            Some(Reach::NoRoute(error.to_string()))
        }
        _ => None,
    }
}

/// A packet of a version that does not exist, with our id.
fn question(ours: [u8; 8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(PACKET);
    packet.push(0xc0);
    packet.extend_from_slice(&NO_VERSION);
    for _ in 0..2 {
        packet.push(8);
        packet.extend_from_slice(&ours);
    }
    packet.resize(PACKET, 0);
    packet
}

/// Whether this is a list of versions for us.
fn answers(packet: &[u8], ours: [u8; 8]) -> bool {
    packet.first().is_some_and(|first| first & 0x80 != 0)
        && packet.get(1..5) == Some(&[0; 4])
        && packet.get(5) == Some(&8)
        && packet.get(6..14) == Some(&ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_names_the_way_out() {
        let addr: SocketAddr = "192.0.2.7:7310".parse().unwrap();
        for (reach, words) in [
            (Reach::Refused, ["7310", "start srn"]),
            (Reach::NoRoute("no route to host".into()), ["no route", "check the address"]),
            (Reach::PacketsTooLarge, ["1228", "MTU"]),
            (Reach::Silent, ["firewall", "allow UDP port 7310"]),
            (Reach::Answers, ["handshake", "lost"]),
        ] {
            let text = reach.words(addr);
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn only_an_answer_to_us_is_one() {
        let ours = [7; 8];
        let mut packet = vec![0x80, 0, 0, 0, 0, 8];
        packet.extend_from_slice(&ours);
        assert!(answers(&packet, ours) && !answers(&packet, [8; 8]));
        assert!(!answers(&question(ours), ours), "an echo is no answer");
        for length in 0..packet.len() {
            assert!(!answers(&packet[..length], ours));
        }
    }

    /// Somebody who hears whole packets no more than the first three: as behind a tunnel.
    #[tokio::test]
    async fn a_path_that_cuts_packets_is_told_from_silence() {
        let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let addr = server.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut packet = [0; PACKET];
            for heard in 0.. {
                let (length, from) = server.recv_from(&mut packet).await.unwrap();
                assert_eq!(length, PACKET);
                if heard >= TRIES {
                    packet[0] = 0x80;
                    packet[1..5].fill(0);
                    server.send_to(&packet[..14], from).await.unwrap();
                }
            }
        });
        assert_eq!(probe(addr).await, Reach::PacketsTooLarge);
        task.abort();
    }

    #[tokio::test]
    async fn a_port_where_nothing_listens_is_named() {
        let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = gone.local_addr().unwrap();
        drop(gone);
        assert_eq!(probe(addr).await, Reach::Refused);
    }
}
