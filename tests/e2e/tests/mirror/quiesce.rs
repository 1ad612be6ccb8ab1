//! What a mirrored server wrote before it was frozen is in its application-consistent checkpoint; where
//! that cannot be known the checkpoint is none.

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use srn_e2e::{Lab, PATIENCE, wait_for};

use super::{GROUP, Server, differs_nowhere, protect};

#[tokio::test]
async fn what_was_written_before_the_freeze_was_done_is_in_the_checkpoint() {
    let lab = Lab::new();
    let server = Server::start(&lab).await;
    let (mut production, recovery) = lab.pair().await;
    protect(&production, &server, &[]).await;
    // As an agent does that has a server write down what it holds in memory.
    let (hook, asks, go) = (lab.path("hook"), lab.path("asks"), lab.path("go"));
    let text = format!(
        "#!/bin/sh\n[ $1 = freeze ] || exit 0\ntouch {}\nwhile [ ! -e {} ]; do sleep 0.01; done\n",
        asks.display(),
        go.display()
    );
    std::fs::write(&hook, text).expect("a script");
    set_permissions(&hook, Permissions::from_mode(0o755)).expect("its mode");
    let path = hook.to_str().expect("a path");
    let set = ["group", "set", GROUP, "--quiesce-hook", path, "--quiesce-limit", "60s"];
    let _ = production.srn(&set).await.done();

    let create = ["checkpoint", "create", GROUP, "--app", "--label", "quiet", "--wait"];
    let made = async { production.srn(&create).await.done() };
    let writes = async {
        wait_for("it freezes", PATIENCE, async || asks.exists().then_some(())).await;
        server.write(5, 3 << 20, 128 << 10).await;
        let then = server.content().await;
        std::fs::write(&go, "").expect("a file");
        then
    };
    let (made, then) = tokio::join!(made, writes);
    assert!(made.out.contains("application-consistent"), "{made:#?}");
    server.write(6, 3 << 20, 128 << 10).await;
    production.in_step(GROUP).await;
    let file = lab.path("quiet.raw");
    let path = file.display().to_string();
    let _ = recovery.srn(&["export", GROUP, "root", "--at", "quiet", "--raw", &path]).await.done();
    differs_nowhere(&file, &then);

    // A server that does not say what it has written: nobody waits for longer than the limit.
    production.expect_in_log("is crash-consistent only");
    let set = ["group", "set", GROUP, "--quiesce-limit", "1s"];
    let _ = production.srn(&set).await.done();
    server.freeze(true);
    let made = production.srn(&["--json", "checkpoint", "create", GROUP, "--app"]).await;
    server.freeze(false);
    assert_eq!(made.code, 6, "{made:#?}");
    let made: Value = serde_json::from_str(&made.out).expect("JSON");
    assert_eq!(made["consistent"], "crash", "{made}");
    let why = made["crash_only"].as_str().expect("a reason");
    assert!(why.contains("not all that the servers had written"), "{why}");
    server.write(7, 3 << 20, 4096).await;
    production.in_step(GROUP).await;
}
