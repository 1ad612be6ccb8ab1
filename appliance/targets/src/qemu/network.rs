//! The network cards of a machine: what they are joined to, as words and as QEMU's arguments.
//!
//! A machine has no network unless one is named; that is what makes a test failover safe. It
//! refuses to create bridges or taps: they are the administrator's.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// What it is joined to.
    pub network: Network,
    /// The card the guest sees.
    #[serde(default)]
    pub model: NicModel,
    /// Its hardware address; QEMU's default one when absent (the same in every machine, so name
    /// one wherever two machines share a bridge).
    #[serde(default)]
    pub mac: Option<Mac>,
}

/// What a network card is joined to. As text: `user`, `user,restrict`, `bridge:NAME`, `tap:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// QEMU's own address translation, with DHCP, needing no privilege.
    User {
        /// The guest reaches nothing but the forwarded ports: neither this host nor the world.
        restrict: bool,
        /// Ports of this host handed to the guest.
        forwards: Vec<Forward>,
    },
    /// A bridge of this host, joined through QEMU's bridge helper (which asks
    /// `/etc/qemu/bridge.conf` whether it may).
    Bridge(InterfaceName),
    /// A tap interface that exists already and that the daemon may open.
    Tap(InterfaceName),
}

/// A TCP port of this host's loopback (or another named address) handed to a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// The address of this host to listen at.
    pub host_address: Ipv4Addr,
    /// The port of this host.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
}

/// The card a guest sees. Choose the one the lost server had, or a virtio one if its system has
/// the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NicModel {
    /// virtio-net.
    #[default]
    Virtio,
    /// Intel 82540EM: what nearly every system has a driver for.
    E1000,
    /// Intel 82574L.
    E1000e,
    /// VMware's paravirtual card.
    Vmxnet3,
}

/// The name of a network interface of this host: 1 to 15 letters, digits, `.`, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName(String);

/// A hardware address for one card: not a group address, written as six pairs of hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// The operator: a network was named in a way that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Not one of the known kinds.
    #[error("network {0:?} is none of: user, user,restrict, bridge:NAME, tap:NAME")]
    Kind(String),
    /// Not a name Linux would accept, or one that QEMU would read as more than a name.
    #[error("interface name {0:?} is not 1 to 15 letters, digits, '.', '_' or '-'")]
    InterfaceName(String),
    /// Not a hardware address of one card.
    #[error("hardware address {0:?} is not six pairs of hex digits naming one card")]
    Mac(String),
}

impl Nic {
    /// Whether QEMU has to start its bridge helper for this card, which its sandbox must then
    /// allow.
    #[must_use]
    pub fn needs_helper(&self) -> bool {
        matches!(self.network, Network::Bridge(_))
    }

    /// The `-netdev` value and the `-device` object for the card at `index`.
    pub(super) fn arguments(&self, index: usize) -> (String, serde_json::Value) {
        let id = format!("net{index}");
        let netdev = match &self.network {
            Network::User { restrict, forwards } => {
                let restrict = if *restrict { "on" } else { "off" };
                let mut text = format!("user,id={id},restrict={restrict}");
                for Forward { host_address, host_port, guest_port } in forwards {
                    text += &format!(",hostfwd=tcp:{host_address}:{host_port}-:{guest_port}");
                }
                text
            }
            Network::Bridge(name) => format!("bridge,id={id},br={name}"),
            Network::Tap(name) => format!("tap,id={id},ifname={name},script=no,downscript=no"),
        };
        let driver = match self.model {
            NicModel::Virtio => "virtio-net-pci",
            NicModel::E1000 => "e1000",
            NicModel::E1000e => "e1000e",
            NicModel::Vmxnet3 => "vmxnet3",
        };
        // No option ROM: a recovered machine never boots from the network.
        let mut device = serde_json::json!({
            "driver": driver, "id": format!("nic{index}"), "netdev": id, "romfile": "",
        });
        if let Some(mac) = self.mac {
            device["mac"] = mac.to_string().into();
        }
        (netdev, device)
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "user" => Ok(Self::User { restrict: false, forwards: Vec::new() }),
            None if text == "user,restrict" => {
                Ok(Self::User { restrict: true, forwards: Vec::new() })
            }
            Some(("bridge", name)) => Ok(Self::Bridge(name.to_owned().try_into()?)),
            Some(("tap", name)) => Ok(Self::Tap(name.to_owned().try_into()?)),
            _ => Err(NetworkError::Kind(text.to_owned())),
        }
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = NetworkError;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let sound = (1..=15).contains(&name.len()) && name.chars().all(known);
        if sound && name != "." && name != ".." {
            Ok(Self(name))
        } else {
            Err(NetworkError::InterfaceName(name))
        }
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> Self {
        name.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for Mac {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || NetworkError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2).ok_or_else(refused)?;
            // from_str_radix would take a sign.
            if !pair.chars().all(|c| c.is_ascii_hexdigit()) {
                return Err(refused());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| refused())?;
        }
        let group_address = bytes.first().is_some_and(|first| first & 1 == 1);
        if pairs.next().is_some() || group_address || bytes == [0; 6] {
            return Err(refused());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn netdev(text: &str, expected: &str) {
        let nic = Nic { network: text.parse().unwrap(), model: NicModel::Virtio, mac: None };
        assert_eq!(nic.arguments(0).0, expected);
    }

    #[test]
    fn networks_become_arguments() {
        netdev("user", "user,id=net0,restrict=off");
        netdev("user,restrict", "user,id=net0,restrict=on");
        netdev("bridge:br-lan", "bridge,id=net0,br=br-lan");
        netdev("tap:tap0", "tap,id=net0,ifname=tap0,script=no,downscript=no");
    }

    #[test]
    fn a_forward_listens_where_it_was_told() {
        let forward =
            Forward { host_address: Ipv4Addr::LOCALHOST, host_port: 2222, guest_port: 22 };
        let network = Network::User { restrict: true, forwards: vec![forward] };
        let nic = Nic {
            network,
            model: NicModel::E1000,
            mac: Some("52:54:00:aa:0b:0c".parse().unwrap()),
        };
        let (netdev, device) = nic.arguments(1);
        assert_eq!(netdev, "user,id=net1,restrict=on,hostfwd=tcp:127.0.0.1:2222-:22");
        assert_eq!(device["driver"], "e1000");
        assert_eq!(device["mac"], "52:54:00:aa:0b:0c");
    }

    #[test]
    fn names_cannot_smuggle_options() {
        for text in [
            "",
            "none",
            "bridge",
            "bridge:",
            "tap:..",
            "bridge:br0,script=/bin/sh",
            "tap:a b",
            "bridge:sixteen-letters-",
            "user,hostfwd=tcp::22-:22",
        ] {
            assert!(text.parse::<Network>().is_err(), "{text:?}");
        }
        for mac in [
            "",
            "52:54:00:aa:0b",
            "52:54:00:aa:0b:0c:0d",
            "01:00:00:00:00:00",
            "+1:00:00:00:00:02",
            "00:00:00:00:00:00",
            "52540:0:aa:0b:0c:0d",
        ] {
            assert!(mac.parse::<Mac>().is_err(), "{mac:?}");
        }
    }

    #[test]
    fn a_stored_network_is_checked_again() {
        let text = r#"{"network":{"bridge":"br0,x=y"}}"#;
        assert!(serde_json::from_str::<Nic>(text).is_err());
        let text = r#"{"network":{"bridge":"br0"},"mac":"52:54:00:00:00:01"}"#;
        let nic: Nic = serde_json::from_str(text).unwrap();
        assert_eq!(
            serde_json::from_str::<Nic>(&serde_json::to_string(&nic).unwrap()).unwrap(),
            nic
        );
    }
}
