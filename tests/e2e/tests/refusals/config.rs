//! Configuration files that cannot be used.

use std::path::Path;
use std::process::Stdio;

use srn_e2e::{Lab, PATIENCE, Ran, tool};
use tokio::process::Command;

use crate::common::{
    CONFLICT, INVALID, MISSING, NOT_FOUND, STORAGE, USAGE, ended, protect, refused, refuses,
};

/// Runs a daemon, which is expected to end at once.
async fn daemon(arguments: &[&str]) -> Ran {
    let mut command = Command::new(srn_e2e::node::binary());
    command.arg("daemon").args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM");
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output.expect("it ends").expect("it starts");
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn write(lab: &Lab, text: &str) -> String {
    let path = lab.path("srn.toml");
    std::fs::write(&path, text).expect("it is written");
    path.to_str().expect("a path in UTF-8").to_owned()
}

#[tokio::test]
async fn mistakes_in_the_file_are_named_with_their_place() {
    let lab = Lab::new();
    let state = lab.path("state");
    let node = format!(
        "[node]\nname = \"a\"\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n",
        state.display(),
        lab.path("run").display()
    );
    let cases: &[(&str, &[&str])] = &[
        // A typo in a key, an unknown section, a key of another section.
        ("[link]\nlistne = \"127.0.0.1:7310\"", &["line 6", "`listne`", "`listen`"]),
        ("[lnk]\nlisten = \"127.0.0.1:7310\"", &["line 5", "`lnk`", "`link`"]),
        ("[log]\nsegment_size = \"64M\"", &["line 6", "`segment_size`", "`level`"]),
        ("listen = \"127.0.0.1:7310\"", &["line 5", "`listen`", "`run_dir`"]),
        // No TOML at all.
        ("[link", &["line 5", "[link"]),
        ("[link]\nlisten = ", &["line 6", "listen ="]),
        ("[link]\nlisten = \"a\"\nlisten = \"b\"", &["line 7", "listen", "duplicate"]),
        ("\u{0}", &["line 5"]),
        // Values of another type.
        ("[link]\nlisten = 7310", &["line 6", "listen", "expected a string"]),
        ("[nbd]\nlisten = \"127.0.0.1:10809\"", &["line 6", "listen", "sequence"]),
        ("[recovery]\ncpus = \"two\"", &["line 6", "cpus", "two"]),
        ("[recovery]\ncpus = -1", &["line 6", "cpus", "-1"]),
        // Values that cannot be.
        ("[link]\nlisten = \"everywhere\"", &["link.listen", "everywhere", "0.0.0.0:7310"]),
        ("[nbd]\nlisten = [\"127.0.0.1\"]", &["nbd.listen", "\"127.0.0.1\"", "127.0.0.1:10809"]),
        ("[nbd]\nallow = [\"10.0.0.0/99\"]", &["nbd.allow", "10.0.0.0/99", "192.0.2.10/32"]),
        (
            "[nbd]\nlisten = [\"0.0.0.0:10809\"]",
            &["nbd.allow", "0.0.0.0:10809", "192.0.2.10/32", "tls = \"required\"", "srn nbd-cert"],
        ),
        ("[nbd]\ntls = \"allowed\"", &["nbd.tls", "\"allowed\"", "required", "middle"]),
        ("[nbd]\nnames = [\"a b\"]", &["nbd.names", "\"a b\"", "host name"]),
        ("[recovery]\ncpus = 0", &["recovery.cpus", "1 to 255"]),
        ("[recovery]\nmemory = \"much\"", &["recovery.memory", "much", "K, M, G or T"]),
        ("[recovery]\nmemory = \"1K\"", &["recovery.memory", "1K", "64 MiB"]),
        ("[recovery]\naccelerator = \"magic\"", &["recovery.accelerator", "magic", "tcg"]),
        ("[store]\nsegment_size = \"1\"", &["store.segment_size", "1 MiB", "1 GiB"]),
        ("[log]\nlevel = \"loud\"", &["log.level", "loud", "debug"]),
    ];
    for (text, words) in cases {
        let path = write(&lab, &format!("{node}{text}\n"));
        let ran = daemon(&["--config", &path]).await;
        refused(text, &ran, INVALID, &[&[path.as_str()], *words].concat());
        assert!(!state.exists(), "{text}: something was made");
    }
    let path = write(&lab, &node.replace("\"a\"", "\"A b\""));
    let ran = daemon(&["--config", &path]).await;
    refused("a name", &ran, INVALID, &[&path, "node.name", "\"A b\"", "a-z"]);
}

#[tokio::test]
async fn a_file_that_cannot_be_read_is_named() {
    let lab = Lab::new();
    let missing = lab.path("nosuch.toml");
    let missing = missing.to_str().expect("a path in UTF-8");
    let ran = daemon(&["--config", missing]).await;
    refused("a missing file", &ran, NOT_FOUND, &[missing, "--config"]);
    let dir = lab.dir().to_str().expect("a path in UTF-8");
    let ran = daemon(&["--config", dir]).await;
    refused("a directory", &ran, INVALID, &[dir, "directory"]);
    let path = lab.path("latin");
    std::fs::write(&path, b"[node]\nname = \"caf\xe9\"\n").expect("it is written");
    let path = path.to_str().expect("a path in UTF-8");
    let ran = daemon(&["--config", path]).await;
    refused("another encoding", &ran, INVALID, &[path, "UTF-8"]);
    // For programs.
    let ran = daemon(&["--json", "--config", missing]).await;
    refused("a missing file", &ran, NOT_FOUND, &[]);
    let failure: serde_json::Value = serde_json::from_str(&ran.err).expect("JSON");
    assert_eq!(failure["kind"], "not-found");
}

#[tokio::test]
async fn what_the_machine_does_not_have_is_named() {
    let lab = Lab::new();
    let mut node = lab.node("a");
    let free = lab.node("b");
    let _udp = std::net::UdpSocket::bind((node.address(), 7310)).expect("the port");
    let link = format!("{}:7310", node.address());
    ended("a taken port", &node.run_to_end().await, CONFLICT, &[&link, "in use", "link.listen"]);
    drop(_udp);
    let _tcp = std::net::TcpListener::bind((node.address(), 10809)).expect("the port");
    let nbd = format!("{}:10809", node.address());
    ended("a taken port", &node.run_to_end().await, CONFLICT, &[&nbd, "in use", "nbd.listen"]);
    drop(_tcp);
    node.configure("[control]\ngroup = \"no-such-group\"");
    let words = ["no-such-group", "groupadd"];
    ended("an unknown group", &node.run_to_end().await, INVALID, &words);
    // An address that this machine does not have, a directory that cannot be made.
    let config = format!(
        "[node]\nname = \"b\"\nstate_dir = \"{0}/state\"\nrun_dir = \"{0}/run\"\n\
         [link]\nlisten = \"192.0.2.1:7310\"\n",
        free.dir().display()
    );
    let path = write(&lab, &config);
    let ran = daemon(&["--config", &path]).await;
    ended("a foreign address", &ran, INVALID, &["192.0.2.1:7310", "link.listen"]);
    std::fs::write(free.dir().join("file"), "").expect("it is written");
    let path =
        write(&lab, &config.replace("/run\"", "/file/run\"").replace("192.0.2.1", "127.0.0.1"));
    let ran = daemon(&["--config", &path]).await;
    ended("no directory", &ran, STORAGE, &["/file/run", "directory"]);
}

#[tokio::test]
async fn wrong_usage_takes_one_line_and_names_the_help() {
    let lab = Lab::new();
    let node = lab.node("none");
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["subcommand", "status", "see srn --help"]),
        (&["statsu"], &["'statsu'", "'status'", "see srn --help"]),
        (&["group"], &["subcommand", "create", "see srn group --help"]),
        (&["group", "create", "web"], &["--keep", "see srn group create --help"]),
        (&["group", "create", "web", "--keep", "all"], &["'all'", "cache, replica", "--help"]),
        (&["disk", "add", "web", "root"], &["--size", "--copy-from", "see srn disk add --help"]),
        (&["disk", "add", "web", "root", "--size", "5x"], &["\"5x\"", "K, M, G or T", "--help"]),
        (&["disk", "add", "web", "root", "--size", "-5"], &["-5", "--help"]),
        (&["disk", "add", "web", "root", "--qmp", "/x"], &["--node", "see srn disk add --help"]),
        (&["disk", "add", "web", "root", "--size", "1", "--sise", "1"], &["'--sise'", "'--size'"]),
        (&["export", "web", "root"], &["--raw", "--nbd", "see srn export --help"]),
    ];
    for (arguments, words) in cases {
        let ran = node.srn(arguments).await;
        refused(&format!("srn {arguments:?}"), &ran, USAGE, words);
        let ran = node.srn(&[*arguments, &["--json"]].concat()).await;
        let failure: serde_json::Value = serde_json::from_str(&ran.err).expect("JSON");
        assert_eq!(failure["kind"], "usage", "srn {arguments:?} --json");
    }
    // Who says nothing at all is shown what can be said.
    let program = srn_e2e::node::binary().display().to_string();
    for (arguments, word) in [(&[][..], "failover"), (&["group"][..], "create")] {
        let ran = tool::run(&program, arguments).await;
        assert!(ran.code == USAGE && ran.out.is_empty(), "{ran:#?}");
        assert!(ran.err.contains("\nUsage: srn") && ran.err.contains(word), "{ran:#?}");
    }
    // Help that was asked for is no failure.
    for arguments in [&["--help"][..], &["help", "group"], &["group", "create", "--help"]] {
        let ran = node.srn(arguments).await.done();
        assert!(ran.out.contains("Usage: srn") && ran.err.is_empty(), "{ran:#?}");
    }
    assert!(!Path::new(&node.state_dir()).exists());
}

#[tokio::test]
async fn a_missing_program_is_named_before_anything_is_done() {
    let lab = Lab::new();
    let mut node = lab.node("recovery");
    node.run_through(["env", "PATH=/nonexistent"].map(str::to_owned).into());
    node.start().await;
    protect(&node, "web", None, "1M").await;
    let words = ["qemu-system-x86"];
    refuses(&node, &["failover", "test", "web"], MISSING, &words).await;
}
