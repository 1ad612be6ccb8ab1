//! Names that are taken, unknown, or no names.

use serde_json::json;
use srn_e2e::{Lab, Node};

use crate::common::{
    CONFLICT, INVALID, NOT_FOUND, content, facts, refused, refuses, running, write_blocks,
};

/// Texts that are no names, with an argument that keeps the command line from taking them for
/// options.
fn malformed() -> Vec<String> {
    let mut texts: Vec<String> =
        ["", "Web", "a b", "a/b", "../x", "..", "-x", ".x", "\u{e4}", "a\nb", "a%2fb", "a\u{7f}"]
            .map(str::to_owned)
            .into();
    texts.push("x".repeat(64));
    texts.push("x".repeat(5000));
    texts
}

async fn protecting(lab: &Lab) -> Node {
    let node = running(lab, "production").await;
    crate::common::protect(&node, "web", None, "1M").await;
    let _ = node.srn(&["checkpoint", "create", "web", "--label", "before"]).await.done();
    node
}

#[tokio::test]
async fn malformed_names_are_refused_everywhere() {
    let lab = Lab::new();
    let node = protecting(&lab).await;
    for name in malformed() {
        let create = ["group", "create", "--keep", "replica", "--", &name];
        refuses(&node, &create, INVALID, &["malformed name", "a-z"]).await;
        let add = ["disk", "add", "--size", "1M", "--", "web", &name];
        refuses(&node, &add, INVALID, &["malformed name", "a-z"]).await;
        // Where a thing of that name is looked for there is none.
        let missing: [&[&str]; 6] = [
            &["group", "show", "--", &name],
            &["group", "delete", "--yes", "--", &name],
            &["disk", "list", "--", &name],
            &["disk", "remove", "--", "web", &name],
            &["checkpoint", "list", "--", &name],
            &["peer", "remove", "--", &name],
        ];
        for arguments in missing {
            if name.is_empty() {
                refuses(&node, arguments, INVALID, &["an empty name", "srn status"]).await;
            } else {
                refuses(&node, arguments, NOT_FOUND, &[" no ", &format!("{name:?}"), ": "]).await;
            }
        }
    }
}

#[tokio::test]
async fn unknown_names_are_answered_with_the_known_ones() {
    let lab = Lab::new();
    let node = protecting(&lab).await;
    let file = lab.path("never");
    let file = file.to_str().expect("a path in UTF-8");
    let groups: [&[&str]; 14] = [
        &["group", "show", "nosuch"],
        &["group", "set", "nosuch", "--history", "1h"],
        &["group", "pause", "nosuch"],
        &["group", "resume", "nosuch"],
        &["group", "delete", "nosuch", "--yes"],
        &["disk", "list", "nosuch"],
        &["disk", "add", "nosuch", "data", "--size", "1M"],
        &["disk", "remove", "nosuch", "root"],
        &["checkpoint", "list", "nosuch"],
        &["checkpoint", "create", "nosuch"],
        &["failover", "run", "nosuch", "--yes-production-is-off"],
        &["failover", "test", "nosuch"],
        &["export", "nosuch", "root", "--raw", file],
        &["export", "nosuch", "root", "--nbd"],
    ];
    for arguments in groups {
        refuses(&node, arguments, NOT_FOUND, &["no group \"nosuch\"", "web"]).await;
    }
    let disks: [&[&str]; 3] = [
        &["disk", "remove", "web", "nosuch"],
        &["export", "web", "nosuch", "--raw", file],
        &["export", "web", "nosuch", "--nbd"],
    ];
    for arguments in disks {
        refuses(&node, arguments, NOT_FOUND, &["web", "no disk \"nosuch\"", "root"]).await;
    }
    for at in ["nosuch", "999999"] {
        let at = format!("--at={at}");
        let arguments = ["export", "web", "root", &at, "--raw", file];
        refuses(&node, &arguments, NOT_FOUND, &["web", &at[5..], "history"]).await;
    }
    let arguments = ["export", "web", "root", "--at=-1", "--raw", file];
    refuses(&node, &arguments, INVALID, &["\"-1\"", "-90s"]).await;
    let other: [&[&str]; 3] = [
        &["group", "create", "new", "--keep", "replica", "--peer", "nosuch"],
        &["peer", "remove", "nosuch"],
        &["failover", "stop", "nosuch"],
    ];
    for arguments in other {
        refuses(&node, arguments, NOT_FOUND, &["no ", "\"nosuch\""]).await;
    }
    assert!(!std::path::Path::new(file).exists(), "nothing was written");
    // Nothing is served under a name that is not there.
    let listed = srn_e2e::tool::run("nbdinfo", &[&node.nbd_uri("web/nosuch")]).await;
    assert_ne!(listed.code, 0, "{listed:#?}");
}

#[tokio::test]
async fn names_that_are_taken_stay_what_they_are() {
    let lab = Lab::new();
    let node = protecting(&lab).await;
    write_blocks(&node, "web/root", 0, 16, 7).await;
    let before = content(&lab, &node, "web", "root").await;
    let again: [(&[&str], &[&str]); 5] = [
        (&["group", "create", "web", "--keep", "replica"], &["group web", "already", "another"]),
        (&["disk", "add", "web", "root", "--size", "1M"], &["disk root", "already", "another"]),
        // Smaller than what is there, and larger.
        (&["disk", "add", "web", "root", "--size", "512"], &["disk root", "already", "another"]),
        (&["disk", "add", "web", "root", "--size", "2M"], &["disk root", "already", "another"]),
        (
            &["checkpoint", "create", "web", "--label", "before"],
            &["\"before\"", "already", "another"],
        ),
    ];
    for (arguments, words) in again {
        refuses(&node, arguments, CONFLICT, words).await;
    }
    let file = lab.path("there");
    std::fs::write(&file, "mine").expect("a file");
    let path = file.to_str().expect("a path in UTF-8");
    refuses(&node, &["export", "web", "root", "--raw", path], CONFLICT, &[path, "--force"]).await;
    assert_eq!(std::fs::read(&file).expect("it is there"), b"mine");
    assert_eq!(content(&lab, &node, "web", "root").await, before);
}

#[tokio::test]
async fn labels_that_nobody_could_read_are_refused() {
    let lab = Lab::new();
    let node = protecting(&lab).await;
    for label in [String::new(), "x".repeat(513), "a\nb".into(), "\u{1b}[2J".into()] {
        let label = format!("--label={label}");
        let arguments = ["checkpoint", "create", "web", &label];
        refuses(&node, &arguments, INVALID, &["a label has 1 to 512 bytes"]).await;
    }
    // A group without a disk has nothing to make a checkpoint of.
    let _ = node.srn(&["group", "create", "empty", "--keep", "replica"]).await.done();
    let arguments = ["checkpoint", "create", "empty"];
    refuses(&node, &arguments, crate::common::REFUSED, &["empty", "no disk"]).await;
}

#[tokio::test]
async fn settings_that_cannot_be_are_refused() {
    let lab = Lab::new();
    let node = protecting(&lab).await;
    let settings: [(&[&str], &[&str]); 4] = [
        (&["group", "create", "new", "--keep", "cache"], &["peer"]),
        (&["group", "create", "new", "--keep", "replica", "--on-full", "stop"], &["throttle"]),
        (&["group", "set", "web", "--on-full", "stop"], &["throttle"]),
        (&["group", "set", "web", "--fence-hook", "/nosuch/program"], &["/nosuch/program"]),
    ];
    for (arguments, words) in settings {
        refuses(&node, arguments, INVALID, words).await;
    }
}

#[tokio::test]
async fn failures_are_json_for_those_who_ask_for_it() {
    let lab = Lab::new();
    let node = protecting(&lab).await;
    for (arguments, code, kind) in [
        (&["--json", "group", "show", "nosuch"][..], NOT_FOUND, "not-found"),
        (&["group", "create", "web", "--keep", "replica", "--json"], CONFLICT, "conflict"),
        (&["group", "create", "A", "--keep", "replica", "--json"], INVALID, "invalid"),
    ] {
        let before = facts(&node).await;
        let ran = node.srn(arguments).await;
        refused(&format!("srn {arguments:?}"), &ran, code, &[]);
        let failure: serde_json::Value = serde_json::from_str(&ran.err).expect("JSON");
        assert_eq!(failure["kind"], json!(kind));
        assert!(
            failure["message"]
                .as_str()
                .is_some_and(|text| text.contains(arguments[2]) || text.contains(arguments[3]))
        );
        assert_eq!(facts(&node).await, before);
    }
}
