//! The link's congestion control beside others, over one line: 200 Mbit/s, 50 ms, with losses, and
//! beside a TCP; and over the loopback, where it must not cost anything.
//!
//! The line is a program between two network name spaces, so that real TCP goes over it too. That
//! needs root, and Python for the tun devices; without them only the loopback is measured.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use srn_e2e::relay::Way;
use srn_e2e::relay::line::Shape;
use tokio::process::{Child, Command};

use super::flow::{self, Kind};
use super::table::{Comparison, Table, quantile};

/// The line.
const MBIT: u64 = 200;
const TRIP: Duration = Duration::from_millis(50);

/// Time of a flow alone, of which the first part does not count; and of two that share.
const ALONE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(12));
const SHARED: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(40));

/// How much longer the line stays than flows last.
const GRACE: Duration = Duration::from_secs(4);

/// Runs a part of a measurement, if that is what the program was started for.
pub(crate) async fn role(arguments: &[String]) -> Option<ExitCode> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let seconds = |text: &str| Duration::from_secs(text.parse().expect("seconds"));
    let kind = |text: &str| Kind::named(text).expect("a kind");
    match *words.as_slice() {
        ["line", loss, time] => pass(loss.parse().expect("a number"), seconds(time)).await,
        ["send", name, to, certificate, time] => {
            let to = to.parse().expect("an address");
            flow::send(kind(name), to, Path::new(certificate), seconds(time)).await;
        }
        ["receive", name, at, certificate, skip, time] => {
            let at = at.parse().expect("an address");
            let times = (seconds(skip), seconds(time));
            let rate = flow::receive(kind(name), at, Path::new(certificate), times).await;
            println!("{rate}");
        }
        _ => return None,
    }
    Some(ExitCode::SUCCESS)
}

/// Passes packets between standard input and standard output, both of which are tun devices.
async fn pass(loss: u64, time: Duration) {
    let began = Instant::now();
    let (there, back) = (Arc::new(Way::new(1)), Arc::new(Way::new(2)));
    there.shape(Shape { loss, ..Shape::of(MBIT, TRIP) });
    back.shape(Shape::of(MBIT, TRIP));
    for (way, forward) in [(there.clone(), true), (back, false)] {
        let other = way.clone();
        std::thread::spawn(move || {
            let mut packet = vec![0; 1 << 16];
            for number in 0.. {
                let read = if forward {
                    rustix::io::read(std::io::stdin(), &mut packet)
                } else {
                    rustix::io::read(std::io::stdout(), &mut packet)
                };
                let Ok(length) = read else { return };
                way.take(began.elapsed(), number, &packet[..length], 0);
            }
        });
        std::thread::spawn(move || {
            loop {
                let Some(packet) = other.give(began) else { continue };
                let _ = if forward {
                    rustix::io::write(std::io::stdout(), &packet)
                } else {
                    rustix::io::write(std::io::stdin(), &packet)
                };
            }
        });
    }
    tokio::time::sleep(time).await;
    let counts = there.counts();
    let wasted = counts.lost + counts.dropped;
    eprintln!("{}", 100.0 * wasted as f64 / (counts.packets + wasted).max(1) as f64);
}

fn own() -> String {
    std::env::current_exe().expect("this program's path").display().to_string()
}

/// Flows over one line at the same time: what each brought across in Mbit/s, and what was lost of
/// all packets in percent. None where there can be no line.
async fn over_line(
    dir: &Path,
    loss: u64,
    kinds: &[Kind],
    times: (Duration, Duration),
) -> Option<(Vec<f64>, f64)> {
    let spaces = ["a", "b"].map(|end| format!("srn-bench-{}-{end}", std::process::id()));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin/bench/line.py");
    let stay = (times.1 + GRACE).as_secs().to_string();
    let line = Command::new("python3")
        .arg(script)
        .args(&spaces)
        .args([&own(), "line", &loss.to_string(), &stay])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .ok()?;
    let addressed = async || {
        let show = ["-n", &spaces[1], "-4", "addr", "show"];
        let shown = Command::new("ip").args(show).stderr(Stdio::null()).output().await.ok()?;
        String::from_utf8_lossy(&shown.stdout).contains("10.77.0.2").then_some(())
    };
    let deadline = Instant::now() + GRACE;
    while addressed().await.is_none() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut flows = Vec::new();
    for (number, kind) in kinds.iter().enumerate() {
        let to = format!("10.77.0.2:{}", 7400 + number);
        flows.push(start(*kind, &to, dir, times, Some(&spaces)));
    }
    let mut rates = Vec::new();
    for (receiver, _sender) in flows {
        rates.push(finish(receiver).await * 8.0 / 1e6);
    }
    let ended = line.wait_with_output().await.ok()?;
    for space in &spaces {
        let _ = Command::new("ip").args(["netns", "del", space]).status().await;
    }
    let said = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    match said.parse() {
        Ok(wasted) => Some((rates, wasted)),
        Err(_) => {
            eprintln!("there is no line: {said}");
            None
        }
    }
}

/// Starts a receiver and a sender.
fn start(
    kind: Kind,
    to: &str,
    dir: &Path,
    (skip, time): (Duration, Duration),
    spaces: Option<&[String; 2]>,
) -> (Child, Child) {
    let port = to.parse::<SocketAddr>().expect("an address").port();
    let certificate = dir.join(format!("certificate-{port}"));
    let _ = std::fs::remove_file(&certificate);
    let certificate = certificate.display().to_string();
    let (skip, time) = (skip.as_secs().to_string(), time.as_secs().to_string());
    let run = |end: usize, arguments: &[&str]| {
        let mut command = match spaces {
            Some(spaces) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &spaces[end], &own()]);
                command
            }
            None => Command::new(own()),
        };
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        command.spawn().expect("this program")
    };
    let receiver = run(1, &["receive", kind.name(), to, &certificate, &skip, &time]);
    let sender = run(0, &["send", kind.name(), to, &certificate, &time]);
    (receiver, sender)
}

/// What a receiver has received in bytes per second.
async fn finish(receiver: Child) -> f64 {
    // A flow that does not even begin is over, too.
    let patience = SHARED.1 + 4 * GRACE;
    let ended = tokio::time::timeout(patience, receiver.wait_with_output()).await;
    let said = ended.ok().and_then(Result::ok).map(|ended| ended.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said).trim().parse().unwrap_or(0.0)
}

pub(crate) async fn measure(dir: &Path, pairs: usize, table: &mut Table) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let times = (Duration::from_secs(1), Duration::from_secs(4));
    for _ in 0..pairs {
        for (kind, rates) in [(Kind::Ours, &mut ours), (Kind::QuinnCubic, &mut theirs)] {
            let (receiver, _sender) = start(kind, "127.0.0.1:7390", dir, times, None);
            rates.push(finish(receiver).await / 1e6);
        }
    }
    table.compare(&Comparison {
        what: "one QUIC stream over the loopback",
        peer: "Cubic of quinn",
        unit: "MB/s",
        ours: &ours,
        theirs: &theirs,
        target: "≥ 1.0",
    });
    for (loss, percent) in [(0, "0"), (10, "0.1"), (100, "1")] {
        let mut shown = Vec::new();
        for kind in Kind::ALL {
            let Some((rates, wasted)) = over_line(dir, loss, &[kind], ALONE).await else { return };
            shown.push(format!("{:.0} ({wasted:.1} %)", quantile(&rates, 0.5)));
        }
        let [ours, others @ ..] = shown.as_slice() else { return };
        let names = Kind::ALL.iter().skip(1).map(|kind| kind.name());
        let beside: Vec<String> =
            names.zip(others).map(|(name, shown)| format!("{name} {shown}")).collect();
        let what = format!("Mbit/s over {MBIT} Mbit/s, 50 ms, {percent} % loss (packets wasted)");
        table.beside(&what, ours, &beside.join(", "), "≥ 180, ≤ 5 % wasted");
    }
    for kind in [Kind::Ours, Kind::TcpCubic] {
        let both = [kind, Kind::TcpCubic];
        let Some((rates, _)) = over_line(dir, 0, &both, SHARED).await else { return };
        let what = format!("Mbit/s of {} beside a tcp-cubic on that line", kind.name());
        let [ours, theirs] = rates.as_slice() else { return };
        table.beside(&what, &format!("{ours:.0}"), &format!("tcp-cubic {theirs:.0}"), "alike");
    }
}
