//! The C implementations, as processes. One that is not installed fails the test by name.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// No tool may run longer, in seconds.
const TOOL_SECONDS: &str = "100";

/// The full path of a tool of a Debian package.
pub(crate) fn tool_path(name: &str, package: &str) -> PathBuf {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&directories)
        .chain(["/usr/sbin".into(), "/usr/bin".into()])
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed: install the package {package}"))
}

/// Runs a tool that must succeed, and returns what it printed.
pub(crate) fn tool(name: &str, package: &str, arguments: &[&str]) -> String {
    let output = run(&tool_path(name, package), arguments);
    let asked: String = format!("{arguments:?}").chars().take(1000).collect();
    assert!(output.status.success(), "{name} {asked}: {}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a tool that must fail, and returns what it complained.
pub(crate) fn tool_fails(name: &str, package: &str, arguments: &[&str]) -> String {
    let output = run(&tool_path(name, package), arguments);
    let code = output.status.code();
    assert!(code.is_some_and(|code| code != 0 && code != 124), "{name}: {}", said(&output));
    said(&output)
}

/// Runs a Python script that uses libnbd; its arguments are in `sys.argv[1:]`.
pub(crate) fn python_nbd(script: &str, arguments: &[&str]) -> String {
    // The package belongs to the interpreter of the system, whatever comes first in the path.
    let python = Path::new("/usr/bin/python3");
    let known = run(python, &["-c", "import nbd"]).status.success();
    assert!(known, "libnbd for Python is not installed: install the package python3-libnbd");
    let mut all = vec!["-c", script];
    all.extend_from_slice(arguments);
    let output = run(python, &all);
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn run(path: &Path, arguments: &[&str]) -> Output {
    // The tool's own idea of a seat for itself: a clean one.
    Command::new("timeout")
        .args(["--kill-after=5", TOOL_SECONDS])
        .arg(path)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// A server process that is ended with the test.
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts a server and waits until its unix socket takes connections.
    pub(crate) fn serving(name: &str, package: &str, arguments: &[&str], socket: &Path) -> Self {
        Self::until(name, package, arguments, || is_listening(socket))
    }

    /// Starts a server and waits until the port of this machine takes connections.
    pub(crate) fn serving_tcp(name: &str, package: &str, arguments: &[&str], port: u16) -> Self {
        Self::until(name, package, arguments, || is_listening_tcp(port))
    }

    fn until(name: &str, package: &str, arguments: &[&str], met: impl Fn() -> bool) -> Self {
        let mut child = Command::new(tool_path(name, package))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        // Connecting might count as a client of a server that takes one only.
        while !met() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{name} {arguments:?} ended with {status}");
            }
            assert!(Instant::now() < deadline, "{name} does not listen");
            std::thread::yield_now();
        }
        Self { child }
    }
}

/// Whether the kernel knows a listening socket of this path.
fn is_listening(socket: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    // Flag __SO_ACCEPTCON is what marks a listening socket.
    table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some("00010000") && fields.next_back() == Some(path)
    })
}

/// Whether the kernel knows a listening socket of this port.
fn is_listening_tcp(port: u16) -> bool {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let end = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        // State 0A is LISTEN.
        fields.nth(1).is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some("0A")
    })
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
