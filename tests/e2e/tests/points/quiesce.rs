//! Application-consistent checkpoints, with programs that freeze and thaw, fail, and hang: what was
//! frozen is thawed always, and a checkpoint that is not application-consistent does not say so.

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use srn_e2e::{Chance, Lab, Node, PATIENCE, Volume, wait_for};

use crate::common::{CONFLICT, INVALID, REFUSED, content, protect, write};

/// A hook that writes down how it was called, and then does this.
fn hook(lab: &Lab, body: &str) -> (PathBuf, PathBuf) {
    let (path, calls) = (lab.path("hook"), lab.path("calls"));
    let text = format!(
        "#!/bin/sh\ncalls={}\necho \"$1 $2\" >>$calls\n{body}\necho \"$1 done\" >>$calls\n",
        calls.display()
    );
    std::fs::write(&path, text).expect("a script");
    set_permissions(&path, Permissions::from_mode(0o755)).expect("its mode");
    (path, calls)
}

fn calls(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A node with a group that has this hook.
async fn node(lab: &Lab, hook: &Path, limit: &str) -> Node {
    let mut node = lab.node("alone");
    node.start().await;
    protect(&node, "web", None, &["root"]).await;
    declare(&node, hook, limit).await;
    node
}

async fn declare(node: &Node, hook: &Path, limit: &str) {
    let hook = hook.to_str().expect("a path");
    let set = ["group", "set", "web", "--quiesce-hook", hook, "--quiesce-limit", limit];
    let _ = node.srn(&set).await.done();
}

/// The checkpoint with this label.
async fn labelled(node: &Node, label: &str) -> Value {
    let listed = node.json(&["checkpoint", "list", "web"]).await;
    let found = listed.as_array().expect("a list").iter().find(|one| one["label"] == label);
    found.unwrap_or_else(|| panic!("no checkpoint {label}: {listed}")).clone()
}

async fn frozen(node: &Node) -> bool {
    !node.group("web").await["quiesce"]["frozen_since"].is_null()
}

const CREATE: [&str; 6] = ["checkpoint", "create", "web", "--app", "--label", "quiet"];

#[tokio::test]
async fn applications_are_frozen_marked_and_thawed() {
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    protect(&production, "web", Some("recovery"), &["root"]).await;
    production.in_step("web").await;
    let none = production.srn(&CREATE).await;
    none.refused(REFUSED, &["no program", "srn group set web --quiesce-hook"]);
    let (path, called) = hook(&lab, "");
    declare(&production, &path, "10s").await;
    let shown = production.srn(&["group", "show", "web"]).await.done();
    assert!(shown.out.contains(&format!("quiesce hook {}, 10s at most", path.display())));
    let client = production.open("web/root").await;
    write(&client, 0, 1).await;
    let made = production.srn(&CREATE).await.done();
    assert!(made.out.contains("application-consistent"), "{made:#?}");
    write(&client, 0, 2).await;
    assert_eq!(calls(&called), ["freeze web", "freeze done", "thaw web", "thaw done"]);
    assert!(!frozen(&production).await);
    production.in_step("web").await;
    wait_for("the label arrives", PATIENCE, async || {
        let listed = recovery.json(&["checkpoint", "list", "web"]).await;
        (listed[0]["label"] == "quiet").then_some(())
    })
    .await;
    for node in [&production, &recovery] {
        assert_eq!(labelled(node, "quiet").await["consistent"], "application");
    }
    let (held, _) = content(&lab, &recovery, "web", "root", "quiet").await;
    assert!(held[..4096].iter().all(|byte| *byte == 1));
    let there = recovery.srn(&["checkpoint", "create", "web", "--app"]).await;
    there.refused(REFUSED, &["at its production node"]);

    // By the calendar too, and never two at a time.
    let add = ["checkpoint", "schedule", "add", "web", "*:*:*", "--app", "--label", "often"];
    let _ = production.srn(&add).await.done();
    wait_for("some are made", PATIENCE, async || {
        let listed = production.json(&["checkpoint", "list", "web"]).await;
        let scheduled = listed
            .as_array()
            .expect("a list")
            .iter()
            .filter(|one| one["kind"] == "scheduled" && one["consistent"] == "application");
        (scheduled.count() >= 2).then_some(())
    })
    .await;
    let _ = production.srn(&["checkpoint", "schedule", "remove", "web", "1"]).await.done();
    wait_for("the last one is thawed", PATIENCE, async || {
        (!frozen(&production).await).then_some(())
    })
    .await;
    for calls in calls(&called).chunks(4) {
        assert_eq!(calls, ["freeze web", "freeze done", "thaw web", "thaw done"]);
    }
}

#[tokio::test]
async fn a_freeze_that_fails_or_hangs_is_thawed_and_the_checkpoint_says_so() {
    let lab = Lab::new();
    let (path, called) = hook(&lab, "[ $1 = thaw ] || { echo no agent >&2; exit 7; }");
    let mut node = node(&lab, &path, "10s").await;
    node.expect_in_log("is crash-consistent only");
    let made = node.srn(&CREATE).await;
    made.refused(REFUSED, &["crash-consistent only", "freeze web failed", "7", "no agent"]);
    assert_eq!(calls(&called), ["freeze web", "thaw web", "thaw done"]);
    assert_eq!(labelled(&node, "quiet").await["consistent"], "crash");
    let told = node.srn(&["events"]).await.done();
    assert!(
        told.out.contains("crash-consistent only") && told.out.contains("no agent"),
        "{told:#?}"
    );

    std::fs::remove_file(&called).expect("what was called");
    // What it has started hangs too, and out of its process group.
    let hangs =
        "[ $1 = thaw ] || { setsid sh -c 'sleep 1000; echo too late >>$0' $calls & sleep 1000; }";
    let (path, called) = hook(&lab, hangs);
    declare(&node, &path, "300ms").await;
    let made =
        node.srn(&["--json", "checkpoint", "create", "web", "--app", "--label", "two"]).await;
    assert_eq!(made.code, REFUSED, "{made:#?}");
    let answer: Value = serde_json::from_str(&made.out).expect("JSON");
    assert_eq!(answer["consistent"], "crash");
    assert!(answer["crash_only"].as_str().is_some_and(|why| why.contains("longer than 300ms")));
    assert_eq!(calls(&called), ["freeze web", "thaw web", "thaw done"]);
    assert_eq!(labelled(&node, "two").await["consistent"], "crash");
    assert!(!frozen(&node).await);
}

#[tokio::test]
async fn what_a_killed_daemon_has_frozen_is_thawed_by_the_next() {
    let lab = Lab::new();
    // Comes to its end just behind the thaw, if it is left alone.
    let hangs = "case $1 in freeze) rm -f $calls.thawed; while [ ! -e $calls.thawed ]; do sleep 0.01; done;; \
                 thaw) touch $calls.thawed;; esac";
    let (path, called) = hook(&lab, hangs);
    let mut node = node(&lab, &path, "600s").await;
    node.expect_in_log("the daemon ended while the applications were being frozen");
    let asked = node.srn_command(&CREATE).spawn().expect("srn starts");
    wait_for("it freezes", PATIENCE, async || (calls(&called) == ["freeze web"]).then_some(()))
        .await;
    assert!(frozen(&node).await);
    // Another one has to wait, and so does whoever would delete it without a thaw.
    let busy = node.srn(&["checkpoint", "create", "web", "--app"]).await;
    busy.refused(CONFLICT, &["is being made already"]);
    node.kill().await;
    drop(asked);
    // The freeze goes on without its daemon, and could end behind the thaw.
    assert_eq!(calls(&called), ["freeze web"]);
    node.start().await;
    wait_for("it is thawed", PATIENCE, async || (!frozen(&node).await).then_some(())).await;
    assert_eq!(calls(&called), ["freeze web", "thaw web", "thaw done"]);
    let told = node.srn(&["events"]).await.done();
    assert!(told.out.contains("the applications are thawed"), "{told:#?}");

    // A daemon that stops in order thaws before it ends.
    let asked = node.srn_command(&CREATE).spawn().expect("srn starts");
    wait_for("it freezes", PATIENCE, async || (calls(&called).len() == 4).then_some(())).await;
    node.stop().await;
    drop(asked);
    assert_eq!(calls(&called)[3..], ["freeze web", "thaw web", "thaw done"]);
    node.start().await;
    assert!(!frozen(&node).await);
    assert_eq!(node.json(&["checkpoint", "list", "web"]).await, serde_json::json!([]));
}

/// Whenever it is killed: what a freeze has begun ends with a thaw, and nothing of it comes behind that.
#[tokio::test]
async fn whenever_a_daemon_is_killed_no_freeze_is_left_without_a_thaw() {
    let lab = Lab::new();
    let mut chance = Chance::from_env("QUIESCE_SEED");
    let (path, called) = hook(&lab, "sleep 0.05");
    let mut node = node(&lab, &path, "60s").await;
    node.expect_in_log("the daemon ended while the applications were being frozen");
    for lap in 0..6 {
        let before = calls(&called).len();
        let asked = node.srn_command(&["checkpoint", "create", "web", "--app"]).spawn();
        let asked = asked.expect("srn starts");
        // After it was told to freeze, had frozen, was told to thaw, or had thawed.
        let until = before + 1 + chance.below(4) as usize;
        wait_for("it has come so far", PATIENCE, async || {
            (calls(&called).len() >= until).then_some(())
        })
        .await;
        node.kill().await;
        drop(asked);
        node.start().await;
        wait_for("it is thawed", PATIENCE, async || (!frozen(&node).await).then_some(())).await;
        let calls = calls(&called);
        let ended = calls.len() > before && calls.last().is_some_and(|last| last == "thaw done");
        assert!(ended, "lap {lap}: {calls:?}");
        let freezes = calls[before..].iter().filter(|call| call.starts_with("freeze w")).count();
        let first_thaw = calls[before..].iter().position(|call| call == "thaw web");
        let last_freeze = calls[before..].iter().rposition(|call| call.starts_with("freeze"));
        assert!(freezes == 1 && last_freeze < first_thaw, "lap {lap}: {calls:?}");
    }
    // What was made is as good as it says.
    let made = node.srn(&CREATE).await.done();
    assert!(made.out.contains("application-consistent"), "{made:#?}");
}

#[tokio::test]
async fn a_checkpoint_whose_thaw_was_cut_off_is_not_called_application_consistent() {
    let lab = Lab::new();
    let (mut production, mut recovery) = lab.pair().await;
    production.expect_in_log("the daemon ended while the applications were being frozen");
    recovery.expect_in_log("group web: disconnected");
    protect(&production, "web", Some("recovery"), &["root"]).await;
    production.in_step("web").await;
    let (path, called) = hook(&lab, "[ $1 = freeze ] || [ -e ${calls}.free ] || sleep 1000");
    declare(&production, &path, "10s").await;
    let asked = production.srn_command(&CREATE).spawn().expect("srn starts");
    wait_for("it thaws", PATIENCE, async || (calls(&called).last()? == "thaw web").then_some(()))
        .await;
    // The mark is durable, and was when the applications were quiet; but who knows.
    production.kill().await;
    drop(asked);
    std::fs::write(lab.path("calls.free"), "").expect("a file");
    production.start().await;
    wait_for("it is thawed", PATIENCE, async || (!frozen(&production).await).then_some(())).await;
    for node in [&production, &recovery] {
        wait_for("the doubt is noted", PATIENCE, async || {
            let listed = node.json(&["checkpoint", "list", "web"]).await;
            (listed[0]["consistent"] == "crash").then_some(())
        })
        .await;
    }
}

/// What an administrator does who freezes the file system that the node itself writes to.
#[tokio::test]
async fn a_mark_that_is_not_durable_in_time_comes_behind_the_thaw_and_is_crash_consistent() {
    if !rustix::process::geteuid().is_root() {
        // Nobody else can mount one that can be frozen.
        return;
    }
    let lab = Lab::new();
    let mut node = lab.node("alone");
    let volume = Volume::ext4(node.state_dir(), &lab.path("image"), 256 << 20).await;
    node.run_through(volume.enter());
    node.expect_in_log("is crash-consistent only");
    node.start().await;
    protect(&node, "web", None, &["root"]).await;
    let state = node.state_dir().display().to_string();
    // It ends by itself too, so that a test that fails leaves nothing frozen behind.
    let body = format!(
        "case $1 in freeze) setsid sh -c 'sleep 20; fsfreeze -u {state}' >/dev/null 2>&1 & \
         fsfreeze -f {state};; thaw) fsfreeze -u {state} || [ ! -e ${{calls}}.frozen ];; esac"
    );
    let (path, called) = hook(&lab, &body);
    declare(&node, &path, "500ms").await;
    let made = node.srn(&CREATE).await;
    made.refused(REFUSED, &["crash-consistent only", "not durable within the limit of 500ms"]);
    assert_eq!(calls(&called), ["freeze web", "freeze done", "thaw web", "thaw done"]);
    assert_eq!(labelled(&node, "quiet").await["consistent"], "crash");
    assert!(!frozen(&node).await);
    // Nothing was lost of it, and what comes behind is in order.
    let client = node.open("web/root").await;
    write(&client, 0, 9).await;
    client.disconnect().await.expect("a goodbye");
    let (held, _) = content(&lab, &node, "web", "root", "quiet").await;
    assert!(held[..4096].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn a_thaw_that_fails_is_an_alert_and_tried_until_it_succeeds() {
    let lab = Lab::new();
    let (path, called) =
        hook(&lab, "[ $1 = freeze ] || [ -e ${calls}.free ] || { echo stuck; exit 1; }");
    let mut node = node(&lab, &path, "10s").await;
    node.expect_in_log("is crash-consistent only");
    node.expect_in_log("applications may still be frozen");
    let made = node.srn(&CREATE).await;
    made.refused(REFUSED, &["crash-consistent only", "thaw web failed", "stuck"]);
    assert_eq!(calls(&called), ["freeze web", "freeze done", "thaw web", "thaw web"]);
    assert_eq!(labelled(&node, "quiet").await["consistent"], "crash");
    assert!(frozen(&node).await);
    let told = node.srn(&["events"]).await.done();
    assert!(told.out.contains("ALERT   group web: applications may still be frozen"), "{told:#?}");
    let again = node.srn(&["checkpoint", "create", "web", "--app"]).await;
    again.refused(CONFLICT, &["are frozen since", "yet to be thawed"]);
    std::fs::write(lab.path("calls.free"), "").expect("a file");
    wait_for("it is thawed", PATIENCE, async || (!frozen(&node).await).then_some(())).await;
    assert_eq!(calls(&called).last().map(String::as_str), Some("thaw done"));
    assert_eq!(labelled(&node, "quiet").await["consistent"], "crash");
}

#[tokio::test]
async fn a_hook_that_others_can_change_is_refused() {
    let lab = Lab::new();
    let (path, called) = hook(&lab, "");
    let mut node = node(&lab, &path, "10s").await;
    node.expect_in_log("a scheduled checkpoint is crash-consistent only");
    let set = async |hook: &str, code, words: &[&str]| {
        node.srn(&["group", "set", "web", "--quiesce-hook", hook]).await.refused(code, words);
    };
    set("hook", INVALID, &["whole path"]).await;
    set("/nowhere/hook", INVALID, &["/nowhere/hook", "No such file"]).await;
    let limit = ["group", "set", "web", "--quiesce-limit", "1h"];
    node.srn(&limit).await.refused(INVALID, &["100ms to 10m"]);
    let file = path.to_str().expect("a path");
    set_permissions(&path, Permissions::from_mode(0o777)).expect("its mode");
    set(file, REFUSED, &["can be written by others", "rights of this daemon"]).await;
    // It was fine when it was declared.
    node.srn(&CREATE).await.refused(REFUSED, &["can be written by others"]);
    let add = ["checkpoint", "schedule", "add", "web", "*:*:*", "--app"];
    let _ = node.srn(&add).await.done();
    wait_for("one is made all the same", PATIENCE, async || {
        let listed = node.json(&["checkpoint", "list", "web"]).await;
        let one = listed.as_array().expect("a list").first().cloned()?;
        assert_eq!(one["consistent"], "crash");
        Some(())
    })
    .await;
    assert_eq!(calls(&called), Vec::<String>::new());
    let _ = node.srn(&["group", "set", "web", "--quiesce-hook", ""]).await.done();
    let none = node.srn(&["checkpoint", "create", "web", "--app"]).await;
    none.refused(REFUSED, &["no program"]);
}
