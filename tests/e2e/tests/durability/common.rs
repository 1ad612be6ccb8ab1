//! What these tests share.

use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use srn_e2e::relay::line::Shape;
use srn_e2e::{Chance, Lab, Node, Relay};
use srn_nbd::client::{Client, ClientError, ConnectOptions, Uri};

/// Bytes of one read of a whole disk.
const READ_BYTES: u32 = 1 << 20;

/// The group of every test.
pub(crate) const GROUP: &str = "web";

/// The words by which a node says that its peer is gone, or back and not yet in step.
pub(crate) const LINK_LOST: &str = "disconnected: no connection to the peer";
pub(crate) const LINK_AGREEING: &str = "disconnected: agreeing with the peer";

/// A node whose log segments are small, so that a short test has many of them.
pub(crate) fn small_segments(lab: &Lab, name: &str) -> Node {
    let mut node = lab.node(name);
    node.configure("[store]\nsegment_size = \"1M\"");
    node
}

/// The peer of these nodes will be gone at times.
pub(crate) fn expect_lost_link(nodes: &mut [&mut Node]) {
    for node in nodes {
        node.expect_in_log(LINK_LOST);
        node.expect_in_log(LINK_AGREEING);
    }
}

/// A relay in front of a node.
pub(crate) fn relay_to(recovery: &Node, seed: u64) -> Relay {
    Relay::start(SocketAddr::from((recovery.address(), 7310)), seed)
}

/// A pair of nodes with a relay between them.
pub(crate) async fn pair_through_relay(
    production: &mut Node,
    recovery: &mut Node,
    chance: &mut Chance,
) -> Relay {
    pair_over(production, recovery, Shape::CLEAR, chance).await
}

/// A pair of nodes with a line like this between them.
pub(crate) async fn pair_over(
    production: &mut Node,
    recovery: &mut Node,
    shape: Shape,
    chance: &mut Chance,
) -> Relay {
    expect_lost_link(&mut [&mut *production, &mut *recovery]);
    recovery.start().await;
    production.start().await;
    let relay = relay_to(recovery, chance.next());
    relay.shape(shape);
    let token = recovery.token().await;
    let address = relay.address().to_string();
    let _ = production.srn_with_input(&["pair", &address], &token).await.done();
    relay
}

/// Makes the group at `production`, with a full copy there, and an empty disk of `size` bytes.
pub(crate) async fn protect(production: &Node, disk: &str, size: u64, settings: &[&str]) {
    let create = ["group", "create", GROUP, "--peer", "recovery", "--keep", "replica"];
    let _ = production.srn(&[&create, settings].concat()).await.done();
    add_disk(production, disk, size).await;
}

/// Adds an empty disk of `size` bytes.
pub(crate) async fn add_disk(production: &Node, disk: &str, size: u64) {
    let size = size.to_string();
    let _ = production.srn(&["disk", "add", GROUP, disk, "--size", &size]).await.done();
}

/// A disk of the group as its export is called.
pub(crate) fn export_of(disk: &str) -> String {
    format!("{GROUP}/{disk}")
}

/// Opens an export.
///
/// # Errors
/// When it cannot be opened, which may be expected.
pub(crate) async fn connect(uri: &str) -> Result<Client, ClientError> {
    let uri: Uri = uri.parse()?;
    Client::connect(&uri, &ConnectOptions::default()).await
}

/// Everything that an export shows.
///
/// # Errors
/// When something cannot be read.
pub(crate) async fn read_all(client: &Client) -> Result<Vec<u8>, ClientError> {
    let size = client.export().size;
    let mut content = Vec::with_capacity(size as usize);
    while (content.len() as u64) < size {
        let at = content.len() as u64;
        let length = u64::from(READ_BYTES).min(size - at);
        content.extend_from_slice(&client.read(at, length as u32).await?);
    }
    Ok(content)
}

/// What `srn export --raw` gives of a disk at a point.
pub(crate) async fn exported(node: &Node, disk: &str, at: &str) -> Vec<u8> {
    let file = node.dir().join(format!("{disk}.raw"));
    let path = file.display().to_string();
    let arguments = ["export", GROUP, disk, "--at", at, "--raw", &path, "--force"];
    let _ = node.srn(&arguments).await.done();
    let content = std::fs::read(&file).expect("the file is there");
    std::fs::remove_file(&file).expect("the file is removed");
    content
}

/// Checks that the newest point at the recovery node is, byte by byte, `expected`.
pub(crate) async fn expect_replica(
    production: &Node,
    recovery: &Node,
    disk: &str,
    expected: &[u8],
    after: &str,
) {
    let head = production.in_step(GROUP).await;
    let replica = exported(recovery, disk, "latest").await;
    expect_same(&replica, expected, &format!("the replica at frame {head}, after {after}"));
}

/// Compares without printing megabytes.
#[track_caller]
pub(crate) fn expect_same(got: &[u8], expected: &[u8], what: &str) {
    assert!(got.len() == expected.len(), "{what}: {} bytes, not {}", got.len(), expected.len());
    if let Some(at) = got.iter().zip(expected).position(|(one, other)| one != other) {
        let differing = got.iter().zip(expected).filter(|(one, other)| one != other).count();
        panic!(
            "{what} differs in {differing} bytes, first at {at} (sector {}): {:02x?} instead of \
             {:02x?}",
            at / 512,
            &got[at..got.len().min(at + 16)],
            &expected[at..expected.len().min(at + 16)]
        );
    }
}

/// Reads a whole file.
pub(crate) fn read_file(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `length` bytes of one value.
pub(crate) fn filled(value: u8, length: usize) -> Bytes {
    Bytes::from(vec![value; length])
}
