//! A node: a real daemon, and the command line that talks to it.

use std::ffi::OsString;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use srn_nbd::client::{Client, ConnectOptions, Uri};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::{PATIENCE, wait_for};

/// A node with its own directory and address.
///
/// When it is dropped the daemon ends, and the test fails if the daemon has logged a warning or an
/// error that the test did not expect.
#[derive(Debug)]
pub struct Node {
    name: String,
    dir: PathBuf,
    address: Ipv4Addr,
    child: Option<Child>,
    extra: String,
    /// What its configuration says of NBD, if not the usual.
    nbd: Option<String>,
    state_dir: PathBuf,
    expected: Vec<String>,
    /// What the command that runs its daemon begins with.
    through: Vec<String>,
}

/// What a command said.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Its exit code; -1 when it was killed.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained about.
    pub err: String,
}

impl Ran {
    /// It has done what it should.
    ///
    /// # Panics
    /// When it has not.
    #[must_use]
    #[track_caller]
    pub fn done(self) -> Self {
        assert!(self.code == 0, "{self:#?}");
        self
    }

    /// It has refused with this code and one line that holds all of `words`; nothing else.
    ///
    /// # Panics
    /// When it has not.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert!(self.code == code, "expected exit code {code}: {self:#?}");
        for word in words {
            assert!(self.err.contains(word), "nothing is said of {word:?}: {self:#?}");
        }
        let lines = self.err.trim_end().lines().count();
        assert!(lines == 1, "{lines} lines instead of one: {self:#?}");
    }

    /// What it printed, as JSON.
    ///
    /// # Panics
    /// When that is none.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// The product's binary: `$SRN`, or what was built beside this program.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("SRN") {
        return std::path::absolute(path).expect("$SRN is a path");
    }
    let own = std::env::current_exe().expect("this program's path");
    let found =
        own.ancestors().skip(1).take(2).map(|dir| dir.join("srn")).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("no srn beside {}: build it first, with cargo build -p srn", own.display())
    })
}

impl Node {
    pub(crate) fn new(lab: &Path, name: &str, address: Ipv4Addr) -> Self {
        let dir = lab.join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        let state_dir = dir.join("state");
        Self {
            name: name.into(),
            dir,
            address,
            child: None,
            extra: String::new(),
            nbd: None,
            state_dir,
            expected: Vec::new(),
            through: Vec::new(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its link and its NBD server listen.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its state directory.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Its state directory as its daemon sees it, where that is on a file system of its own.
    #[must_use]
    pub fn state_dir_inside(&self) -> PathBuf {
        match (self.pid(), self.state_dir.strip_prefix("/")) {
            (Some(pid), Ok(path)) => PathBuf::from(format!("/proc/{pid}/root")).join(path),
            _ => self.state_dir.clone(),
        }
    }

    /// Puts its state elsewhere, before it is started.
    pub fn set_state_dir(&mut self, path: PathBuf) {
        self.state_dir = path;
    }

    /// Adds lines to its configuration, from the next start on: whole sections.
    pub fn configure(&mut self, toml: &str) {
        self.extra.push_str(toml);
        self.extra.push('\n');
    }

    /// Replaces what its configuration says of NBD, from the next start on.
    pub fn configure_nbd(&mut self, toml: &str) {
        self.nbd = Some(toml.into());
    }

    /// Puts these words before the command that runs its daemon, from the next start on: a program
    /// that becomes the daemon, and its arguments.
    pub fn run_through(&mut self, words: Vec<String>) {
        self.through = words;
    }

    /// From now on warnings and errors in its log that contain `text` are no failure.
    pub fn expect_in_log(&mut self, text: &str) {
        self.expected.push(text.into());
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/control.sock")
    }

    /// The unix socket of its NBD server.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("run/nbd.sock")
    }

    /// The address of an export over TCP.
    #[must_use]
    pub fn nbd_uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.address)
    }

    /// The address of an export over the unix socket.
    #[must_use]
    pub fn nbd_unix_uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd_socket().display())
    }

    /// The file with everything it has logged.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Everything it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Writes its configuration and gives the file's path.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn write_config(&self) -> PathBuf {
        let Self { name, address, extra, .. } = self;
        let accelerator = std::env::var("SRN_DEMO_ACCELERATOR").unwrap_or_else(|_| "tcg".into());
        let (state, run) = (self.state_dir.display(), self.dir.join("run"));
        let usual = || format!("listen = [\"{address}:10809\"]");
        let nbd = self.nbd.clone().unwrap_or_else(usual);
        let text = format!(
            "[node]\nname = \"{name}\"\nstate_dir = \"{state}\"\nrun_dir = \"{}\"\n\
             [link]\nlisten = \"{address}:7310\"\n[nbd]\n{nbd}\n\
             [recovery]\naccelerator = \"{accelerator}\"\n{extra}",
            run.display()
        );
        let path = self.dir.join("config.toml");
        std::fs::write(&path, text).expect("the configuration is written");
        path
    }

    /// The command that runs its daemon.
    #[must_use]
    pub fn daemon_command(&self) -> Command {
        let mut words: Vec<OsString> = self.through.iter().map(OsString::from).collect();
        words.push(binary().into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("daemon").arg("--config").arg(self.write_config());
        command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM").kill_on_drop(true);
        command
    }

    /// Starts its daemon and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    pub async fn start(&mut self) {
        self.launch();
        wait_for(&format!("node {} answers", self.name), PATIENCE, async || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "node {} ended: {ended:?}\n{}", self.name, self.log());
            (self.srn(&["status", "--json"]).await.code == 0).then_some(())
        })
        .await;
    }

    /// Starts its daemon.
    ///
    /// # Panics
    /// When there is no process to be had.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "node {} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.log_path());
        let log = log.expect("a log file");
        let mut command = self.daemon_command();
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        self.child = Some(command.spawn().expect("the daemon starts"));
    }

    /// Runs its daemon to the end, which is expected to come soon.
    ///
    /// # Panics
    /// When it goes on.
    pub async fn run_to_end(&self) -> Ran {
        let mut command = self.daemon_command();
        let output = command.stdin(Stdio::null()).output();
        let output = tokio::time::timeout(PATIENCE, output).await;
        let output = output.unwrap_or_else(|_| panic!("node {} runs and runs", self.name));
        ran(&output.expect("the daemon starts"))
    }

    /// The daemon's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Sends its daemon a signal.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, signal: Signal) {
        let pid = self.pid().and_then(|pid| Pid::from_raw(pid as i32)).expect("it runs");
        kill_process(pid, signal).expect("the signal is sent");
    }

    /// kill -9, and waits until it is gone.
    ///
    /// # Panics
    /// When it was gone already.
    pub async fn kill(&mut self) {
        self.signal(Signal::KILL);
        let mut child = self.child.take().expect("it runs");
        child.wait().await.expect("it ends");
    }

    /// Stops it in order.
    ///
    /// # Panics
    /// When it does not end, or not in order.
    pub async fn stop(&mut self) {
        self.signal(Signal::TERM);
        let mut child = self.child.take().expect("it runs");
        let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
        let status = ended.expect("it ends in time").expect("it ends");
        assert!(status.success(), "node {}: {status}\n{}", self.name, self.log());
    }

    /// The command line, talking to this node.
    #[must_use]
    pub fn srn_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("SRN_SOCKET", self.socket()).kill_on_drop(true);
        command
    }

    /// Runs `srn` with these arguments.
    ///
    /// # Panics
    /// When it cannot be run or does not end.
    pub async fn srn(&self, arguments: &[&str]) -> Ran {
        self.srn_with_input(arguments, "").await
    }

    /// Runs `srn` with these arguments and `input` to read.
    ///
    /// # Panics
    /// When it cannot be run or does not end.
    pub async fn srn_with_input(&self, arguments: &[&str], input: &str) -> Ran {
        let mut command = self.srn_command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("srn starts");
        let mut stdin = child.stdin.take().expect("an input");
        // It may end without reading.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = tokio::time::timeout(10 * PATIENCE, child.wait_with_output()).await;
        let output = output.unwrap_or_else(|_| panic!("srn {arguments:?} goes on and on"));
        ran(&output.expect("srn ends"))
    }

    /// Runs `srn` with these arguments and `--json`, and gives what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub async fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        self.srn(&arguments).await.done().json()
    }

    /// A new token of this node.
    ///
    /// # Panics
    /// When there is none to be had.
    pub async fn token(&self) -> String {
        let made = self.json(&["token", "new"]).await;
        made["token"].as_str().expect("a token").to_owned()
    }

    /// Pairs with another node, which makes the token.
    ///
    /// # Panics
    /// When they do not pair.
    pub async fn pair_with(&self, other: &Self) {
        let token = other.token().await;
        let host = other.address.to_string();
        let _ = self.srn_with_input(&["pair", &host], &token).await.done();
    }

    /// What `srn group show` says.
    ///
    /// # Panics
    /// When there is no such group.
    pub async fn group(&self, name: &str) -> Value {
        self.json(&["group", "show", name]).await
    }

    /// Waits until the group is as `is` says.
    ///
    /// # Panics
    /// When that takes longer than [`PATIENCE`].
    pub async fn group_until(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let last = std::cell::RefCell::new(Value::Null);
        let found = async || {
            let shown = self.srn(&["group", "show", name, "--json"]).await;
            let group = serde_json::from_str(&shown.out).unwrap_or(Value::Null);
            let is_so = !group.is_null() && is(&group);
            last.replace(group.clone());
            is_so.then_some(group)
        };
        let waited = tokio::time::timeout(PATIENCE, wait_for(what, 2 * PATIENCE, found)).await;
        waited.unwrap_or_else(|_| {
            panic!("group {name} at {}: waited in vain for {what}: {:#}", self.name, last.borrow())
        })
    }

    /// Waits until everything that was written is durable at the peer. Returns the newest frame.
    ///
    /// # Panics
    /// When that takes longer than [`PATIENCE`].
    pub async fn in_step(&self, group: &str) -> u64 {
        let is = |group: &Value| group["state"] == "streaming" && group["lag_bytes"] == 0;
        let group = self.group_until(group, "everything is at the peer", is).await;
        group["head"].as_u64().expect("a number")
    }

    /// Opens an export as a client.
    ///
    /// # Panics
    /// When it cannot be opened.
    pub async fn open(&self, export: &str) -> Client {
        let uri: Uri = self.nbd_uri(export).parse().expect("a URI");
        let options = ConnectOptions::default();
        let opened = Client::connect(&uri, &options).await;
        opened.unwrap_or_else(|error| panic!("{uri:?}: {error}"))
    }

    /// Warnings and errors in its log that nobody expected.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let log = self.log();
        log.lines()
            .filter(|line| {
                let bad = line.contains(" WARN ") || line.contains(" ERROR ");
                bad || line.contains("panicked at")
            })
            .filter(|line| !self.expected.iter().any(|text| line.contains(text)))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Ends the daemon, if it runs.
        drop(self.child.take());
        if !std::thread::panicking() {
            let complaints = self.complaints();
            assert!(
                complaints.is_empty(),
                "node {} has logged what nobody expected:\n{}",
                self.name,
                complaints.join("\n")
            );
        }
    }
}

fn ran(output: &std::process::Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// How long a foreign program may take.
pub const TOOL_PATIENCE: Duration = Duration::from_secs(300);
