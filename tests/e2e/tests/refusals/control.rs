//! Who may talk to the daemon, and what everybody else is told.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;

use srn_e2e::{Lab, Node, Ran};
use tokio::process::Command;

use crate::common::{REFUSED, UNREACHABLE, facts, refused, running};

/// A user that may do nothing, and a system group that every Debian has.
const NOBODY: &str = "65534";
const GROUP: &str = "daemon";

/// Runs `srn` as a user without any rights, a member of these groups.
async fn as_nobody(node: &Node, groups: &[&str], arguments: &[&str]) -> Ran {
    let groups = match groups {
        [] => "--clear-groups".to_owned(),
        some => format!("--groups={}", some.join(",")),
    };
    let user = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), groups];
    let mut command = Command::new("setpriv");
    command.args(user).arg(srn_e2e::node::binary()).args(arguments);
    command.env("SRN_SOCKET", node.socket()).stdin(Stdio::null());
    let output = command.output().await.expect("setpriv, of util-linux");
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Lets everybody as far as to the socket, so that only the socket itself keeps them out.
fn open_the_way(lab: &Lab, node: &Node) {
    for dir in [lab.dir(), node.dir()] {
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir, open).expect("it is ours");
    }
}

#[tokio::test]
async fn without_a_daemon_the_way_out_is_named() {
    let lab = Lab::new();
    let mut node = lab.node("production");
    let socket = node.socket();
    let socket = socket.to_str().expect("a path in UTF-8").to_owned();
    let words = [socket.as_str(), "systemctl start srn", "--socket"];
    let commands: [&[&str]; 6] = [
        &["status"],
        &["token", "new"],
        &["group", "list"],
        &["group", "delete", "web", "--yes"],
        &["failover", "run", "web", "--yes-production-is-off"],
        &["export", "web", "root", "--nbd"],
    ];
    for arguments in commands {
        refused("no socket", &node.srn(arguments).await, UNREACHABLE, &words);
    }
    // A daemon that was killed leaves its socket behind.
    node.start().await;
    node.kill().await;
    assert!(node.socket().exists());
    for arguments in commands {
        refused("a socket left over", &node.srn(arguments).await, UNREACHABLE, &words);
    }
    let ran = node.srn(&["status", "--json"]).await;
    let failure: serde_json::Value = serde_json::from_str(&ran.err).expect("JSON");
    assert_eq!((ran.code, &failure["kind"]), (UNREACHABLE, &"unreachable".into()));
    // It is no obstacle to the next one.
    node.start().await;
    node.stop().await;
    assert!(!node.socket().exists(), "one that was stopped leaves nothing");
}

#[tokio::test]
async fn something_else_at_the_socket_is_not_taken_for_the_daemon() {
    let lab = Lab::new();
    let node = lab.node("production");
    let path = lab.path("other");
    let other = tokio::net::UnixListener::bind(&path).expect("a socket");
    let answering = tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"220 mail ready\r\n").await;
        }
    });
    let path = path.to_str().expect("a path in UTF-8");
    let ran = node.srn(&["--socket", path, "status"]).await;
    refused("a mail server", &ran, UNREACHABLE, &[path]);
    answering.abort();
}

#[tokio::test]
async fn only_root_may_talk_to_the_daemon() {
    if !rustix::process::geteuid().is_root() {
        // Nobody else can become nobody.
        return;
    }
    let lab = Lab::new();
    let node = running(&lab, "production").await;
    open_the_way(&lab, &node);
    for socket in [node.socket(), node.nbd_socket()] {
        let found = std::fs::metadata(&socket).expect("it is there");
        assert_eq!((found.mode() & 0o777, found.uid(), found.gid()), (0o600, 0, 0), "{socket:?}");
    }
    let before = facts(&node).await;
    let ran = as_nobody(&node, &[], &["group", "create", "web", "--keep", "replica"]).await;
    let socket = node.socket();
    let socket = socket.to_str().expect("a path in UTF-8");
    refused("nobody", &ran, REFUSED, &[socket, "control.group", "sudo"]);
    assert_eq!(facts(&node).await, before);
    // What lies in the state directory is nobody's business either.
    for secret in ["node.key", "lock"] {
        let mode = std::fs::metadata(node.state_dir().join(secret)).expect("it is there").mode();
        assert_eq!(mode & 0o077, 0, "{secret} has mode {mode:o}");
    }
}

#[tokio::test]
async fn members_of_the_named_group_may_talk_to_the_daemon() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let lab = Lab::new();
    let mut node = lab.node("production");
    node.configure(&format!("[control]\ngroup = \"{GROUP}\""));
    node.start().await;
    open_the_way(&lab, &node);
    let found = std::fs::metadata(node.socket()).expect("it is there");
    assert_eq!((found.mode() & 0o777, found.uid()), (0o660, 0));
    let _ = as_nobody(&node, &[GROUP], &["status"]).await.done();
    refused("nobody", &as_nobody(&node, &[], &["status"]).await, REFUSED, &["control.group"]);
}
