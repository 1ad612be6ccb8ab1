//! Requests of a dead client never run later, and an export belongs to one client at a time.
//!
//! Writes are parked by a full log: the smallest there is, whose peer takes nothing. Then their
//! client dies, another comes, looks, sends some of them again, writes over them, and the log is
//! released. What the other has seen must fit what is there afterwards; [`crate::oracle`] judges.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use srn_e2e::{Chance, Lab, Node, PATIENCE, tool, wait_for};
use srn_nbd::client::Client;
use tokio::task::JoinSet;

use crate::common::{
    GROUP, connect, expect_lost_link, export_of, exported, filled, protect, read_all,
    small_segments,
};
use crate::oracle::{Moment, Number, Oracle, SECTOR};
use crate::pipe::{Ending, Pipe};

/// The disk of these tests.
const DISK: &str = "root";
const SIZE: u64 = 8 << 20;

/// The smallest log: three segments.
const LOG: &str = "3M";

/// What a dying client had in flight, and of how many sectors each; together more than the log
/// holds.
const PARKED: usize = 100;
const PARKED_SECTORS: usize = 128;

/// Who keeps the peer from taking frames, and how the client ends.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// Paused; the connection is closed.
    Closed,
    /// Paused; the connection is reset.
    Reset,
    /// The recovery node is stopped; the connection is reset.
    PeerAway,
    /// Paused; the client says goodbye without waiting for its answers, and closes.
    Goodbye,
}

struct Stage {
    production: Node,
    recovery: Node,
    oracle: Arc<Mutex<Oracle>>,
    chance: Chance,
    _lab: Lab,
}

impl Stage {
    async fn new() -> Self {
        let lab = Lab::new();
        let chance = Chance::from_env("SRN_SEED");
        let (mut production, mut recovery) =
            (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
        expect_lost_link(&mut [&mut production, &mut recovery]);
        production.expect_in_log("writes wait until there is room (throttle)");
        // Said of a full log while nothing else is wrong.
        production.expect_in_log("disconnected: the log here has no room");
        recovery.start().await;
        production.start().await;
        production.pair_with(&recovery).await;
        let log = ["--log-size", LOG, "--on-full", "throttle"];
        let settings = [&log[..], &["--history", "0s", "--checkpoint-every", "0s"]].concat();
        protect(&production, DISK, SIZE, &settings).await;
        production.in_step(GROUP).await;
        let mut oracle_chance = chance.clone();
        let oracle = Oracle::new(oracle_chance.next(), vec![SIZE as usize / SECTOR]);
        let oracle = Arc::new(Mutex::new(oracle));
        Self { production, recovery, oracle, chance, _lab: lab }
    }

    fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uri(&self) -> String {
        self.production.nbd_uri(&export_of(DISK))
    }

    /// Sends a write; whoever wants to know its answer looks at the oracle.
    fn send(&self, tasks: &mut JoinSet<()>, client: &Client, number: Number) {
        let (start, content) = {
            let oracle = self.oracle();
            (oracle.start(number), oracle.content(number))
        };
        let (client, oracle) = (client.clone(), self.oracle.clone());
        tasks.spawn(async move {
            if client.write((start * SECTOR) as u64, content, false).await.is_ok() {
                oracle.lock().unwrap_or_else(PoisonError::into_inner).answer(number);
            }
        });
    }

    fn new_write(&mut self) -> Number {
        let all = SIZE as usize / SECTOR - PARKED_SECTORS;
        let start = self.chance.below(all as u64) as usize;
        self.oracle().send(0, start, PARKED_SECTORS).0
    }

    /// Keeps the peer from taking frames.
    async fn block(&mut self, death: Death) {
        if matches!(death, Death::PeerAway) {
            self.recovery.stop().await;
        } else {
            let _ = self.production.srn(&["group", "pause", GROUP]).await.done();
        }
    }

    async fn release(&mut self, death: Death) {
        if matches!(death, Death::PeerAway) {
            self.recovery.start().await;
        } else {
            let _ = self.production.srn(&["group", "resume", GROUP]).await.done();
        }
    }

    /// Reads the disk back and judges it; everything answered must be there.
    async fn look(&self, client: &Client, what: &str) {
        let content = read_all(client).await.expect("the disk is read");
        let mut oracle = self.oracle();
        let state = oracle.read(&[content]).unwrap_or_else(|error| panic!("{what}: {error}"));
        let now = oracle.now();
        let judged = oracle.judge(&state, now, Moment::MAX).and_then(|()| oracle.see(state));
        judged.unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    async fn round(&mut self, death: Death) {
        let address = SocketAddr::from((self.production.address(), 10809));
        let pipe = Pipe::start(address).await;
        let first = connect(&format!("nbd://{}/{}", pipe.address(), export_of(DISK))).await;
        let first = first.expect("the disk is served");
        self.block(death).await;
        let mut tasks = JoinSet::new();
        for _ in 0..PARKED {
            let number = self.new_write();
            self.send(&mut tasks, &first, number);
        }
        let full =
            |group: &Value| group["detail"].as_str().is_some_and(|why| why.contains("at its cap"));
        self.production.group_until(GROUP, "the log is full", full).await;
        // Everything that fits is answered; the rest is parked.
        let mut before = usize::MAX;
        wait_for("the rest is parked", PATIENCE, async || {
            let open = self.oracle().open().len();
            let still = open == before;
            before = open;
            still.then_some(())
        })
        .await;
        let parked = self.oracle().open();
        assert!(parked.len() >= PARKED / 4, "{death:?}: only {} are parked", parked.len());

        match death {
            Death::Closed => pipe.cut(Ending::Closed),
            Death::Reset | Death::PeerAway => pipe.cut(Ending::Reset),
            Death::Goodbye => tasks.abort_all(),
        }
        drop(first);
        while tasks.join_next().await.is_some() {}
        // The next client comes at once.
        let second = connect(&self.uri()).await.expect("the next client is let in");
        let mut again = Vec::new();
        for number in parked {
            if self.chance.below(3) == 0 {
                again.push(number);
            } else {
                self.oracle().abandon(number);
            }
        }
        self.look(&second, &format!("{death:?}: read by the next client")).await;
        for number in &again {
            self.send(&mut tasks, &second, *number);
        }
        for _ in 0..PARKED / 4 {
            let number = self.new_write();
            self.send(&mut tasks, &second, number);
        }
        self.release(death).await;
        while let Some(ended) = tasks.join_next().await {
            ended.expect("no request panics");
        }
        assert!(self.oracle().open().is_empty(), "{death:?}: a released write was not answered");
        self.look(&second, &format!("{death:?}: after the release")).await;
        // Written over in order, so that whatever comes to life shows.
        for _ in 0..PARKED / 4 {
            let number = self.new_write();
            self.send(&mut tasks, &second, number);
            while tasks.join_next().await.is_some() {}
        }
        let now = self.oracle().now();
        self.production.in_step(GROUP).await;
        self.look(&second, &format!("{death:?}: in the end")).await;
        let replica = exported(&self.recovery, DISK, "latest").await;
        let oracle = self.oracle();
        let what = format!("{death:?}: the replica");
        let state = oracle.read(&[replica]).unwrap_or_else(|error| panic!("{what}: {error}"));
        let judged = oracle.judge(&state, now, Moment::MAX);
        judged.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_dead_client_never_run() {
    let mut stage = Stage::new().await;
    for death in [Death::Reset, Death::Closed, Death::PeerAway, Death::Reset] {
        stage.round(death).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_before_a_goodbye_run_before_the_next_client_or_never() {
    let mut stage = Stage::new().await;
    stage.round(Death::Goodbye).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_belongs_to_one_client() {
    let lab = Lab::new();
    let (production, recovery) = lab.pair().await;
    protect(&production, DISK, SIZE, &[]).await;
    let tcp = production.nbd_uri(&export_of(DISK));
    let socket = production.nbd_socket();
    let unix = format!("nbd+unix:///{}?socket={}", export_of(DISK), socket.display());
    let write = ["-f", "raw", "-c", "write -P 7 0 4k"];
    let write = |uri: &str| [&write[..], &[uri]].concat().iter().map(|s| (*s).to_owned()).collect();

    for ending in [Ending::Reset, Ending::Closed] {
        let pipe = Pipe::start(SocketAddr::from((production.address(), 10809))).await;
        let through = format!("nbd://{}/{}", pipe.address(), export_of(DISK));
        // One client may have several connections.
        let holder = connect(&through).await.expect("the first client is let in");
        let second = connect(&tcp).await.expect("its second connection is let in");
        drop(second);
        holder.write(0, filled(5, 4096), false).await.expect("written");

        let arguments: Vec<String> = write(&unix);
        let qemu = tool::run("qemu-io", &arguments).await;
        assert!(qemu.code != 0, "{qemu:#?}");
        for words in ["open for writing by 127.0.0.1", "one client at a time"] {
            assert!(qemu.err.contains(words), "{qemu:#?}");
        }
        let nbdinfo = tool::run("nbdinfo", &["--json", &unix]).await;
        assert!(nbdinfo.code != 0 && nbdinfo.err.contains("nbd_opt_go"), "{nbdinfo:#?}");
        let copy = tool::run("nbdcopy", &[&unix, "null:"]).await;
        assert!(copy.code != 0, "{copy:#?}");
        let found = holder.read(0, 4096).await.expect("the holder goes on");
        assert_eq!(found, filled(5, 4096));

        // A client that vanishes gives its place up.
        pipe.cut(ending);
        wait_for("the place is free", PATIENCE, async || {
            let arguments: Vec<String> = write(&unix);
            (tool::run("qemu-io", &arguments).await.code == 0).then_some(())
        })
        .await;
        let info = tool::run("nbdinfo", &["--json", &unix]).await.done();
        assert_eq!(info.json()["exports"][0]["export-size"], SIZE);
        drop(holder);
    }
    // And the other way round: a process at the unix socket keeps the network out.
    let holder = connect(&unix).await.expect("it is let in");
    let second = connect(&unix).await.expect("its second connection is let in");
    let arguments: Vec<String> = write(&tcp);
    let qemu = tool::run("qemu-io", &arguments).await;
    assert!(qemu.code != 0 && qemu.err.contains("open for writing by process"), "{qemu:#?}");
    drop((holder, second));
    wait_for("the place is free", PATIENCE, async || {
        let arguments: Vec<String> = write(&tcp);
        (tool::run("qemu-io", &arguments).await.code == 0).then_some(())
    })
    .await;
    production.in_step(GROUP).await;
    let replica = exported(&recovery, DISK, "latest").await;
    assert!(replica[..4096].iter().all(|byte| *byte == 7));
}
