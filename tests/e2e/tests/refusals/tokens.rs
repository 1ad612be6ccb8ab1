//! Tokens that pair nobody.

use std::net::SocketAddr;

use serde_json::{Value, json};
use srn_core::token::Token;
use srn_e2e::{Lab, Node, PATIENCE, wait_for};
use tokio::net::UdpSocket;

use crate::common::{
    INVALID, UNREACHABLE, UNTRUSTED, USAGE, api, facts, refused, refuses, running,
};

/// A well-formed token that no node has made.
fn unknown(n: u8) -> String {
    Token::new([n; 15]).reveal()
}

/// Tries to pair, in vain: nothing changes at either node.
async fn in_vain(node: &Node, with: &Node, token: &str, code: i32, words: &[&str]) {
    let before = (facts(node).await, facts(with).await["peers"].clone());
    let ran = node.srn_with_input(&["pair", &with.address().to_string()], token).await;
    refused("srn pair", &ran, code, words);
    assert!(!ran.err.contains(token.trim()), "the token is shown: {ran:#?}");
    assert_eq!((facts(node).await, facts(with).await["peers"].clone()), before);
}

/// Where a node would listen, if there was one: whatever is sent there is seen.
async fn decoy(lab: &Lab, name: &str) -> (UdpSocket, String) {
    let address = lab.node(name).address();
    let socket = UdpSocket::bind(SocketAddr::from((address, 7310))).await.expect("the port");
    (socket, address.to_string())
}

#[tokio::test]
async fn a_mistyped_token_is_told_before_anything_is_sent() {
    let lab = Lab::new();
    let node = running(&lab, "production").await;
    let (silent, address) = decoy(&lab, "silent").await;
    let good = unknown(7);
    let mut swapped: Vec<char> = good.chars().collect();
    let other = (1..5).find(|at| swapped[*at] != swapped[0]).expect("not all alike");
    swapped.swap(0, other);
    let wrong = if good.starts_with('0') { '1' } else { '0' };
    let mistyped = [
        String::new(),
        "hello".into(),
        good[1..].to_owned(),
        format!("{good}0"),
        format!("{wrong}{}", &good[1..]),
        swapped.iter().collect(),
        format!("U{}", &good[1..]),
        format!("{good}\u{e4}"),
    ];
    for token in &mistyped {
        let before = facts(&node).await;
        let ran = node.srn_with_input(&["pair", &address], token).await;
        refused(&format!("token {token:?}"), &ran, INVALID, &["mistyped token"]);
        // Neither does the daemon, when a program asks it.
        let body = json!({ "address": address, "token": token }).to_string();
        let (status, answer) = api(&node, "POST", "/v1/peers", &body).await;
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!((status, &answer["kind"]), (400, &json!("invalid")), "{answer}");
        assert!(answer["message"].as_str().is_some_and(|text| text.contains("mistyped token")));
        assert_eq!(facts(&node).await, before);
    }
    // The right number of the right characters goes out at once.
    let (heard, other) = decoy(&lab, "heard").await;
    let mut command = node.srn_command(&["pair", &other]);
    let mut pairing = command.stdin(std::process::Stdio::piped()).spawn().expect("srn starts");
    let mut stdin = pairing.stdin.take().expect("an input");
    tokio::io::AsyncWriteExt::write_all(&mut stdin, good.as_bytes()).await.expect("it reads");
    drop(stdin);
    let mut packet = [0; 2048];
    let came = tokio::time::timeout(PATIENCE, heard.recv_from(&mut packet)).await;
    assert!(came.expect("a packet").expect("a packet").0 > 0);
    let nothing = silent.try_recv_from(&mut packet).expect_err("nothing was sent");
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn a_wrong_token_pairs_nobody_and_costs_nothing() {
    let lab = Lab::new();
    let production = running(&lab, "production").await;
    let mut recovery = running(&lab, "recovery").await;
    recovery.expect_in_log("tried to pair: wrong token");
    let token = recovery.token().await;
    let host = recovery.address().to_string();
    let words = ["wrong token", &host, "srn token new"];
    in_vain(&production, &recovery, &unknown(9), UNTRUSTED, &words).await;
    assert_eq!(facts(&recovery).await["tokens"], 1, "the real one is still good");
    let _ = production.srn_with_input(&["pair", &host], &token).await.done();
}

#[tokio::test]
async fn an_expired_token_pairs_nobody() {
    let lab = Lab::new();
    let production = running(&lab, "production").await;
    let mut recovery = running(&lab, "recovery").await;
    recovery.expect_in_log("tried to pair: expired token");
    let made = recovery.json(&["token", "new", "--ttl", "1s"]).await;
    let token = made["token"].as_str().expect("a token").to_owned();
    wait_for("the token has expired", PATIENCE, async || {
        (facts(&recovery).await["tokens"] == 0).then_some(())
    })
    .await;
    let words = ["expired token", "srn token new"];
    in_vain(&production, &recovery, &token, UNTRUSTED, &words).await;
}

#[tokio::test]
async fn a_token_pairs_one_node_once() {
    let lab = Lab::new();
    let production = running(&lab, "production").await;
    let third = running(&lab, "third").await;
    let mut recovery = running(&lab, "recovery").await;
    recovery.expect_in_log("tried to pair: used token");
    let token = recovery.token().await;
    let host = recovery.address().to_string();
    let _ = production.srn_with_input(&["pair", &host], &token).await.done();
    for node in [&third, &production] {
        in_vain(node, &recovery, &token, UNTRUSTED, &["used token", "srn token new"]).await;
    }
    assert_eq!(facts(&third).await["peers"], json!([]));
}

#[tokio::test]
async fn five_wrong_tries_void_what_is_outstanding() {
    let lab = Lab::new();
    let production = running(&lab, "production").await;
    let mut recovery = running(&lab, "recovery").await;
    recovery.expect_in_log("tried to pair: wrong token");
    recovery.expect_in_log("tried to pair: void token");
    let token = recovery.token().await;
    for n in 0..5 {
        assert_eq!(facts(&recovery).await["tokens"], 1, "after {n} wrong tries");
        in_vain(&production, &recovery, &unknown(n), UNTRUSTED, &["wrong token"]).await;
    }
    assert_eq!(facts(&recovery).await["tokens"], 0);
    in_vain(&production, &recovery, &token, UNTRUSTED, &["void token", "srn token new"]).await;
    // A new one is a new chance.
    production.pair_with(&recovery).await;
}

#[tokio::test]
async fn a_token_lives_a_second_to_a_week() {
    let lab = Lab::new();
    let node = running(&lab, "recovery").await;
    for ttl in ["0s", "500ms", "8days"] {
        refuses(&node, &["token", "new", "--ttl", ttl], INVALID, &["second", "week"]).await;
    }
    refuses(&node, &["token", "new", "--ttl", "soon"], USAGE, &["--ttl", "soon", "90s"]).await;
}

#[tokio::test]
async fn no_token_is_kept_where_it_can_be_read() {
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    let token = recovery.token().await;
    let plain = token.replace('-', "");
    for node in [&production, &recovery] {
        let mut found = 0;
        let mut dirs = vec![node.dir().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).expect("it is readable") {
                let path = entry.expect("it is readable").path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.is_file() {
                    let text = std::fs::read(&path).expect("it is readable");
                    let text = String::from_utf8_lossy(&text);
                    assert!(!text.contains(&token) && !text.contains(&plain), "{path:?}");
                    found += 1;
                }
            }
        }
        assert!(found > 3, "there are files");
    }
}

#[tokio::test]
async fn where_nobody_answers_nobody_is_paired() {
    let lab = Lab::new();
    let mut node = running(&lab, "production").await;
    let token = node.token().await;
    let before = facts(&node).await;
    let (own, nobody) = (node.address().to_string(), lab.node("nobody").address().to_string());
    for (host, code, words) in [
        (nobody.as_str(), UNREACHABLE, &["no connection", &nobody][..]),
        ("127.0.0.1:99999", INVALID, &["127.0.0.1:99999", "resolved"]),
        ("", INVALID, &["resolved"]),
        (&own, INVALID, &[&own, "this node itself"]),
    ] {
        let ran = node.srn_with_input(&["pair", host], &token).await;
        refused(&format!("srn pair {host}"), &ran, code, words);
        assert_eq!(facts(&node).await, before);
    }
    node.stop().await;
}
