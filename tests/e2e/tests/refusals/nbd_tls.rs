//! NBD off the loopback: who has a certificate of the node gets in, nobody else.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use srn_e2e::{Lab, tool};
use srn_nbd::client::{Client, ConnectOptions, Uri};

use crate::common::{CONFLICT, INVALID, NOT_FOUND, STORAGE, ended, protect, refuses};

#[tokio::test]
async fn nbd_off_the_loopback_takes_certificates_and_nothing_else() {
    let lab = Lab::new();
    let port = TcpListener::bind("0.0.0.0:0").and_then(|free| free.local_addr());
    let port = port.expect("a free port").port();
    let mut node = lab.node("production");
    node.configure_nbd(&format!(
        "listen = [\"0.0.0.0:{port}\"]\ntls = \"required\"\nnames = [\"disks.example.com\"]"
    ));
    node.expect_in_log("dropped: TLS failed");
    node.start().await;
    protect(&node, "web", None, "16M").await;
    let path = |name: &str| lab.path(name).to_str().expect("a path in UTF-8").to_owned();
    let uri = |certificates: &str| {
        let directory = path(certificates);
        format!("nbds://127.0.0.1:{port}/web/root?tls-certificates={directory}")
    };
    let _ = node.srn(&["nbd-cert", "new", "guest", "--out", &path("good")]).await.done();
    let mode = |name: &str| {
        let metadata = std::fs::metadata(lab.path(name)).expect("it is there");
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("good/client-key.pem"), 0o600);
    let kept = std::fs::read_to_string(node.state_dir().join("nbd-ca.json")).expect("it is there");
    assert!(!kept.contains("PRIVATE"), "the client's key is not kept");

    // Foreign clients, and ours.
    let said = tool::run("nbdinfo", &["--size", &uri("good")]).await.done();
    assert_eq!(said.out.trim(), (16 << 20).to_string());
    let object = format!("tls-creds-x509,id=t,endpoint=client,dir={}", path("good"));
    let image = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=web/root,\
         tls-creds=t"
    );
    let io = ["write -P 0x5a 1M 1M", "read -P 0x5a 1M 1M"];
    let io = ["--object", &object, "--image-opts", "-c", io[0], "-c", io[1], &image];
    let said = tool::run("qemu-io", &io).await.done();
    assert!(!said.out.contains("failed"), "{said:#?}");
    let open = async |uri: String| {
        let uri: Uri = uri.parse().expect("a URI");
        Client::connect(&uri, &ConnectOptions::default()).await
    };
    let client = open(uri("good")).await.expect("it is let in");
    assert!(client.read(1 << 20, 4096).await.expect("it is read").iter().all(|b| *b == 0x5a));
    let named = format!("{}&tls-hostname=disks.example.com", uri("good"));
    drop(open(named).await.expect("the name is in the node's certificate"));
    let other = format!("{}&tls-hostname=other.example.com", uri("good"));
    open(other).await.expect_err("that name is not");

    // No certificate, no TLS.
    std::fs::create_dir(lab.path("none")).expect("a directory");
    let ca = |dir: &str| lab.path(dir).join("ca-cert.pem");
    std::fs::copy(ca("good"), ca("none")).expect("it is copied");
    let plain = format!("nbd://127.0.0.1:{port}/web/root");
    for refused in [uri("none"), plain] {
        assert_ne!(tool::run("nbdinfo", &["--size", &refused]).await.code, 0, "{refused}");
        open(refused).await.expect_err("not let in");
    }

    // What is asked for wrongly.
    let twice = path("twice");
    let again = ["nbd-cert", "new", "guest", "--out", &twice];
    refuses(&node, &again, CONFLICT, &["guest", "srn nbd-cert revoke"]).await;
    let there = path("good");
    let there = ["nbd-cert", "new", "other", "--out", &there];
    refuses(&node, &there, CONFLICT, &["ca-cert.pem", "another directory"]).await;
    let days = ["nbd-cert", "new", "other", "--days", "0", "--out", &twice];
    refuses(&node, &days, INVALID, &["1 to 36500"]).await;
    refuses(&node, &["nbd-cert", "revoke", "nobody"], NOT_FOUND, &["nobody"]).await;

    // Revoked: who is in is dropped, and nobody gets in again, also after a restart.
    let said = node.srn(&["nbd-cert", "revoke", "guest"]).await.done();
    assert!(said.out.contains("1 connections were dropped"), "{said:#?}");
    client.read(0, 4096).await.expect_err("it was dropped");
    open(uri("good")).await.expect_err("not let in any more");
    let _ = node.srn(&["nbd-cert", "new", "guest", "--out", &path("new")]).await.done();
    node.stop().await;
    node.start().await;
    open(uri("good")).await.expect_err("not let in after a restart");
    drop(open(uri("new")).await.expect("the new one is let in"));
    let list = node.json(&["nbd-cert", "list"]).await;
    let revoked: Vec<bool> =
        list.as_array().into_iter().flatten().map(|one| !one["revoked_at"].is_null()).collect();
    assert_eq!(revoked, [true, false]);

    // An authority that is damaged is never replaced: every client trusts it.
    node.stop().await;
    let file = node.state_dir().join("nbd-ca.json");
    std::fs::write(&file, &kept[..kept.len() / 2]).expect("it is written");
    let ran = node.run_to_end().await;
    ended("a damaged authority", &ran, STORAGE, &["nbd-ca.json", "restore it from a backup"]);
}
