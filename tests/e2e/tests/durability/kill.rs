//! Both nodes are killed again and again while a client writes, lives on and reconnects.
//!
//! After each death of the production node the client reads its disks back (P1: answered is kept);
//! at the recovery node the newest point and checkpoints made in the middle are exported and judged
//! (P2: a prefix, over both disks together). What counts as right is said in [`crate::oracle`].

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use srn_e2e::{Chance, Lab, Node, PATIENCE, wait_for};
use srn_nbd::client::Client;
use tokio::runtime::Handle;

use crate::common::{
    GROUP, add_disk, connect, expect_lost_link, export_of, exported, protect, read_all,
    small_segments,
};
use crate::oracle::{ATOMIC_SECTORS, Moment, Number, Oracle, SECTOR, State};

/// Names and sizes of the disks. They are small, so that writes often overlap.
const DISKS: [(&str, u64); 2] = [("root", 4 << 20), ("data", 2 << 20)];

/// Connections to each disk, all of one client.
const CONNECTIONS: usize = 2;

/// Writes in flight in each connection.
const LANES: usize = 4;

/// Laps unless `SRN_LAPS` says otherwise.
const LAPS: usize = 12;

/// Writes answered before something is killed: between these two numbers.
const ANSWERED: (u64, u64) = (50, 700);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_die_and_no_answered_write_is_lost() {
    let mut chance = Chance::from_env("SRN_SEED");
    let laps = std::env::var("SRN_LAPS").map_or(LAPS, |laps| laps.parse().expect("a number"));
    let lab = Lab::new();
    let (production, recovery) =
        (small_segments(&lab, "production"), small_segments(&lab, "recovery"));
    let mut trial = Trial::begin(production, recovery, &mut chance).await;
    for lap in 0..laps {
        trial.lap(lap, &mut chance).await;
    }
    let summary = trial.finish().await;
    println!("{summary}");
}

/// Everything that one run has.
struct Trial {
    production: Node,
    recovery: Node,
    writer: Arc<Writer>,
    task: tokio::task::JoinHandle<()>,
    /// Labels, and the moments between which they were made.
    checkpoints: Vec<(String, Moment, Moment)>,
    production_kills: usize,
    recovery_kills: usize,
    prefixes: usize,
}

impl Trial {
    async fn begin(mut production: Node, mut recovery: Node, chance: &mut Chance) -> Self {
        expect_lost_link(&mut [&mut production, &mut recovery]);
        recovery.start().await;
        production.start().await;
        production.pair_with(&recovery).await;
        // The production node retires what is a second old, so that its base is in use as well.
        let settings = ["--checkpoint-every", "1s", "--history", "1s"];
        protect(&production, DISKS[0].0, DISKS[0].1, &settings).await;
        add_disk(&production, DISKS[1].0, DISKS[1].1).await;
        // From here on every prefix has both disks.
        production.in_step(GROUP).await;
        let writer = Arc::new(Writer::new(&production, chance.next()));
        let (client, runtime) = (writer.clone(), Handle::current());
        let task = tokio::task::spawn_blocking(move || runtime.block_on(client.live()));
        Self {
            production,
            recovery,
            writer,
            task,
            checkpoints: Vec::new(),
            production_kills: 0,
            recovery_kills: 0,
            prefixes: 0,
        }
    }

    /// Waits until so many more writes are answered.
    async fn progress(&self, more: u64) {
        let target = self.writer.oracle().answered() as u64 + more;
        wait_for(&format!("{target} writes are answered"), PATIENCE, async || {
            assert!(!self.task.is_finished(), "the client has ended, see above");
            (self.writer.oracle().answered() as u64 >= target).then_some(())
        })
        .await;
    }

    async fn lap(&mut self, lap: usize, chance: &mut Chance) {
        self.progress(ANSWERED.0 + chance.below(ANSWERED.1 - ANSWERED.0)).await;
        if chance.below(2) == 0 {
            self.checkpoint(lap).await;
            self.progress(chance.below(100)).await;
        }
        match chance.below(3) {
            0 => {
                self.kill_production().await;
                self.judge_replica("latest with production dead").await;
                self.production.start().await;
            }
            1 => {
                self.kill_recovery().await;
                self.progress(chance.below(200)).await;
                self.recovery.start().await;
                self.judge_replica("latest after the recovery node's death").await;
            }
            _ => {
                // The second dies while the first is coming up again, or not.
                self.kill_production().await;
                if chance.below(2) == 0 {
                    self.production.launch();
                }
                self.kill_recovery().await;
                if self.production.pid().is_some() {
                    self.kill_production().await;
                }
                self.recovery.start().await;
                self.judge_replica("latest after both died").await;
                self.production.start().await;
            }
        }
    }

    async fn checkpoint(&mut self, lap: usize) {
        let label = format!("lap-{lap}");
        let from = self.writer.oracle().now();
        let create = ["checkpoint", "create", GROUP, "--label", &label];
        let _ = self.production.srn(&create).await.done();
        let until = self.writer.oracle().now();
        self.checkpoints.push((label, from, until));
    }

    async fn kill_production(&mut self) {
        self.production.kill().await;
        self.production_kills += 1;
    }

    async fn kill_recovery(&mut self) {
        self.recovery.kill().await;
        self.recovery_kills += 1;
    }

    /// Judges what the recovery node has now: it must be a prefix, whichever.
    async fn judge_replica(&mut self, what: &str) {
        let head = self.recovery.group(GROUP).await["head"].as_u64().expect("a number");
        let state = self.state(&head.to_string(), what).await;
        self.judge(&state, 0, Moment::MAX, what);
        self.prefixes += 1;
    }

    async fn state(&self, at: &str, what: &str) -> State {
        let mut disks = Vec::new();
        for (disk, _) in DISKS {
            disks.push(exported(&self.recovery, disk, at).await);
        }
        let read = self.writer.oracle().read(&disks);
        read.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    fn judge(&self, state: &State, holds: Moment, before: Moment, what: &str) {
        let judged = self.writer.oracle().judge(state, holds, before);
        judged.unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    async fn finish(mut self) -> String {
        self.progress(50).await;
        self.writer.stop.store(true, Ordering::SeqCst);
        (&mut self.task).await.expect("the client ends well");
        let now = self.writer.oracle().now();
        self.production.in_step(GROUP).await;
        let what = "latest at the end";
        let state = self.state("latest", what).await;
        self.judge(&state, now, Moment::MAX, what);
        for (label, from, until) in &self.checkpoints {
            let what = format!("checkpoint {label}, made between {from} and {until}");
            let state = self.state(label, &what).await;
            self.judge(&state, *from, *until, &what);
        }
        // Nothing but our kills has interrupted the client.
        let lives = self.writer.lives.load(Ordering::SeqCst);
        assert!(lives <= self.production_kills + 1, "{lives} connections of the client");
        let (sent, answered) = {
            let oracle = self.writer.oracle();
            (oracle.sent(), oracle.answered())
        };
        format!(
            "{sent} writes, {answered} answered; production died {} times, recovery {}; {} prefixes and {} \
             checkpoints judged",
            self.production_kills,
            self.recovery_kills,
            self.prefixes + 1,
            self.checkpoints.len()
        )
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // A client that goes on would keep the test's runtime from ending.
        self.writer.stop.store(true, Ordering::SeqCst);
    }
}

/// A client that writes, and comes back when its connections break.
struct Writer {
    oracle: Mutex<Oracle>,
    chance: Mutex<Chance>,
    uris: Vec<String>,
    /// Someone asks it to end.
    stop: AtomicBool,
    /// A connection broke.
    broken: AtomicBool,
    /// How often it has connected.
    lives: AtomicUsize,
}

impl Writer {
    fn new(production: &Node, seed: u64) -> Self {
        let sectors = DISKS.iter().map(|(_, size)| *size as usize / SECTOR).collect();
        Self {
            oracle: Mutex::new(Oracle::new(seed, sectors)),
            chance: Mutex::new(Chance::new(seed)),
            uris: DISKS.iter().map(|(disk, _)| production.nbd_uri(&export_of(disk))).collect(),
            stop: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            lives: AtomicUsize::new(0),
        }
    }

    fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chance(&self) -> MutexGuard<'_, Chance> {
        self.chance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn live(self: Arc<Self>) {
        while !self.stop.load(Ordering::SeqCst) {
            let Some(connections) = self.connect().await else { return };
            self.lives.fetch_add(1, Ordering::SeqCst);
            // The node may die again at any moment of this.
            if self.look(&connections).await && self.send_again(&connections).await {
                self.write(&connections).await;
            }
        }
    }

    /// All connections, of each disk; none when asked to stop.
    async fn connect(&self) -> Option<Vec<Vec<Client>>> {
        wait_for("production serves its disks", PATIENCE, async || {
            if self.stop.load(Ordering::SeqCst) {
                return Some(None);
            }
            let mut all = Vec::new();
            for uri in &self.uris {
                let mut connections = Vec::new();
                for _ in 0..CONNECTIONS {
                    connections.push(connect(uri).await.ok()?);
                }
                all.push(connections);
            }
            Some(Some(all))
        })
        .await
    }

    /// Gives up some of the writes that were not answered, reads everything back and judges it.
    async fn look(&self, connections: &[Vec<Client>]) -> bool {
        let open = self.oracle().open();
        for number in open {
            if self.chance().below(2) == 0 {
                self.oracle().abandon(number);
            }
        }
        let mut disks = Vec::new();
        for of_disk in connections {
            let any = self.chance().below(CONNECTIONS as u64) as usize;
            match read_all(&of_disk[any]).await {
                Ok(content) => disks.push(content),
                Err(_) => return false,
            }
        }
        let mut oracle = self.oracle();
        let state = oracle.read(&disks).unwrap_or_else(|error| panic!("read back: {error}"));
        let now = oracle.now();
        let judged = oracle.judge(&state, now, Moment::MAX).and_then(|()| oracle.see(state));
        judged.unwrap_or_else(|error| panic!("read back after a reconnect: {error}"));
        true
    }

    /// Sends the rest of those again, as a driver does that was not answered.
    async fn send_again(&self, connections: &[Vec<Client>]) -> bool {
        let open = self.oracle().open();
        for number in open {
            if !self.send(number, connections, 0).await {
                return false;
            }
        }
        true
    }

    async fn send(&self, number: Number, connections: &[Vec<Client>], connection: usize) -> bool {
        let (disk, start, content) = {
            let oracle = self.oracle();
            let write = oracle.write(number);
            (write.disk, write.start, oracle.content(number))
        };
        let fua = self.chance().below(8) == 0;
        let client = &connections[disk][connection];
        let answered = client.write((start * SECTOR) as u64, content, fua).await.is_ok();
        if answered {
            self.oracle().answer(number);
        }
        answered
    }

    /// Writes until a connection breaks.
    async fn write(self: &Arc<Self>, connections: &[Vec<Client>]) {
        self.broken.store(false, Ordering::SeqCst);
        let mut lanes = tokio::task::JoinSet::new();
        for disk in 0..DISKS.len() {
            for connection in 0..CONNECTIONS {
                for _ in 0..LANES {
                    let (this, connections) = (self.clone(), connections.to_vec());
                    lanes.spawn(async move { this.lane(disk, connection, &connections).await });
                }
            }
        }
        while let Some(ended) = lanes.join_next().await {
            ended.expect("no lane panics");
        }
    }

    async fn lane(&self, disk: usize, connection: usize, connections: &[Vec<Client>]) {
        while !self.stop.load(Ordering::SeqCst) && !self.broken.load(Ordering::SeqCst) {
            let (start, sectors) = {
                let mut chance = self.chance();
                let all = DISKS[disk].1 as usize / SECTOR;
                // Mostly small ones, and now and then the largest that is one frame.
                let longest = match chance.below(16) {
                    0 => ATOMIC_SECTORS,
                    1..=3 => 128,
                    _ => 32,
                };
                let sectors = 1 + chance.below(longest as u64) as usize;
                (chance.below((all - sectors + 1) as u64) as usize, sectors)
            };
            let (number, _) = self.oracle().send(disk, start, sectors);
            if !self.send(number, connections, connection).await {
                self.broken.store(true, Ordering::SeqCst);
            }
        }
    }
}
