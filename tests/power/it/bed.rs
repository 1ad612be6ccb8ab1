//! The test bed: a state disk, a guest on it while there is power, and two clients.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use srn_testkit::disk::Toll;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

use crate::client::DiskClient;
use crate::console::Console;
use crate::disk::StateDisk;
use crate::guest::{Guest, Images};
use crate::oracle::Broken;

/// Bytes of the state disk.
const STATE_DISK: u64 = 1 << 30;

/// Bytes of each protected disk, as `init` makes them.
const DISK: u64 = 16 << 20;

/// No step takes longer, on however busy a machine; most take a few seconds.
const PATIENCE: Duration = Duration::from_secs(180);

/// Lines of the console that a failure shows.
const TAIL: usize = 60;

/// The test bed.
pub(crate) struct Bed {
    seed: u64,
    folder: TempDir,
    images: Images,
    state: StateDisk,
    formatted: bool,
    set_up: bool,
    guest: Option<Guest>,
    /// What the guest before this one said.
    before: Option<Console>,
    clients: [DiskClient; 2],
}

impl Bed {
    pub(crate) async fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let images = Images::make(folder.path());
        let state = StateDisk::serve(seed, STATE_DISK, &folder.path().join("state.sock")).await;
        let client = |export, disk| DiskClient::new(seed, export, disk, DISK);
        Self {
            seed,
            images,
            state,
            folder,
            formatted: false,
            set_up: false,
            guest: None,
            before: None,
            clients: [client("power/one", 0), client("power/two", 1)],
        }
    }

    /// Ends the test, with everything that helps to find out why.
    pub(crate) fn fail(&self, why: &str) -> ! {
        if let Some(path) = std::env::var_os("POWER_KEEP") {
            self.keep_disk(Path::new(&path));
        }
        let console = self.guest.as_ref().map(|guest| &guest.console);
        let tail = |console: Option<&Console>| {
            console.map_or_else(|| "none".to_owned(), |console| console.tail(TAIL))
        };
        panic!(
            "seed {}: {why}\n--- console before:\n{}\n--- console:\n{}\n---",
            self.seed,
            tail(self.before.as_ref()),
            tail(console)
        );
    }

    /// Writes the state disk to a file, sparsely.
    fn keep_disk(&self, path: &Path) {
        let file = std::fs::File::create(path).unwrap();
        file.set_len(STATE_DISK).unwrap();
        // The next guest would see it so.
        if self.state.disk.is_off() {
            self.state.disk.power_on(Toll::Drawn);
        }
        let mut bytes = vec![0; 1 << 20];
        for offset in (0..STATE_DISK).step_by(bytes.len()) {
            self.state.disk.read(offset, &mut bytes).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes, offset).unwrap();
            }
        }
        println!("kept the state disk in {}", path.display());
    }

    fn guest(&self) -> &Guest {
        self.guest.as_ref().unwrap_or_else(|| self.fail("there is no guest"))
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("state.sock")
    }

    /// Boots the guest; the first one makes the file system, the first that gets so far the group.
    fn boot(&mut self) {
        assert!(self.guest.is_none(), "one guest at a time");
        let mut settings = Vec::new();
        if !self.formatted {
            settings.push("srn.format");
        }
        if !self.set_up {
            settings.push("srn.setup");
        }
        self.guest = Some(Guest::start(&self.images, &self.socket(), &settings.join(" ")));
    }

    /// Waits until the guest says this.
    async fn hear(&self, line: &str) -> Result<(), String> {
        let console = &self.guest().console;
        let said = timeout(PATIENCE, async {
            tokio::select! {
                said = console.says(line) => said,
                true = console.says("POWER failed") => false,
            }
        });
        match said.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("the guest failed before it said {line}")),
            Err(_) => Err(format!("the guest did not say {line} in time")),
        }
    }

    /// Boots the guest, waits until the node is ready, and connects both clients. Says why that
    /// cannot be, or what the guest has to complain about.
    pub(crate) async fn try_start(&mut self) -> Result<(), String> {
        let began = Instant::now();
        self.boot();
        self.hear("POWER ready").await?;
        self.formatted = true;
        self.set_up = true;
        self.check_console()?;
        println!("  ready after {:.1} s", began.elapsed().as_secs_f64());
        let port = self.guest().port;
        for client in &mut self.clients {
            client.connect(port).await.map_err(|error| format!("connecting: {error}"))?;
        }
        Ok(())
    }

    /// As [`Bed::try_start`], where it must succeed.
    pub(crate) async fn start(&mut self) {
        self.try_start().await.unwrap_or_else(|why| self.fail(&why));
    }

    /// Boots the guest for the first time, and cuts the power while the node makes its group.
    pub(crate) async fn cut_during_set_up(&mut self, after: u64) {
        self.boot();
        self.hear("POWER mounted").await.unwrap_or_else(|why| self.fail(&why));
        self.formatted = true;
        self.cut_before_ready(after).await;
        println!("cut during set-up, after {after} requests");
        self.lose_power(Toll::Drawn).await;
    }

    /// Boots the guest, and cuts the power before or when the node is ready.
    pub(crate) async fn cut_during_start(&mut self, after: u64) {
        self.boot();
        self.cut_before_ready(after).await;
        println!("cut during start, after {after} requests");
        self.lose_power(Toll::Drawn).await;
    }

    async fn cut_before_ready(&mut self, after: u64) {
        self.state.disk.cut_after(after);
        tokio::select! {
            () = self.state.off() => {}
            ready = self.hear("POWER ready") => {
                ready.unwrap_or_else(|why| self.fail(&why));
                self.state.disk.cut();
            }
        }
    }

    /// Both clients write until the power goes off, after so many requests to the disk.
    pub(crate) async fn write_until_cut(&mut self, after: u64) {
        self.state.disk.cut_after(after);
        self.write(u64::MAX).await;
        if !self.state.disk.is_off() {
            self.fail("the connections ended before the power went off");
        }
    }

    /// Each client writes until so many more writes are answered.
    pub(crate) async fn write_until_answered(&mut self, count: u64) {
        self.write(count).await;
        println!("  wrote: answered {:?}", self.answered());
    }

    async fn write(&mut self, count: u64) {
        let mut guest = self.guest.take();
        let mut killed = None;
        let [one, two] = &mut self.clients;
        let work = async {
            let mut writing =
                std::pin::pin!(async { tokio::join!(one.write(count), two.write(count)) });
            tokio::select! {
                wrote = &mut writing => wrote,
                () = self.state.off() => {
                    // The connections live until the guest is gone.
                    if let Some(guest) = guest.take() {
                        killed = Some(guest.kill().await);
                    }
                    writing.await
                }
            }
        };
        let wrote = timeout(PATIENCE, work).await;
        self.guest = guest;
        if killed.is_some() {
            self.before = killed;
        }
        match wrote {
            Ok((Ok(()), Ok(()))) => {}
            Ok((Err(error), _) | (_, Err(error))) => self.fail(&format!("writing: {error}")),
            Err(_) => self.fail("writing took too long"),
        }
    }

    /// From now on the disk makes nothing durable, whatever it says.
    pub(crate) fn lie(&self) {
        self.state.disk.ignore_flushes();
    }

    /// The power is off, or goes off now: the guest is gone, and what was not flushed as well.
    pub(crate) async fn lose_power(&mut self, toll: Toll) {
        self.state.disk.cut();
        if let Some(guest) = self.guest.take() {
            self.before = Some(guest.kill().await);
        }
        self.clients.iter_mut().for_each(DiskClient::disconnect);
        self.check_console().unwrap_or_else(|why| self.fail(&why));
        let cut = self.state.disk.power_on(toll);
        println!("  answered {:?}, {cut:?}", self.answered());
    }

    /// Checks both disks against the oracle.
    pub(crate) async fn check(&mut self) -> Result<(), Broken> {
        let mut survived = Vec::new();
        for index in 0..self.clients.len() {
            match timeout(PATIENCE, self.clients[index].check()).await {
                Ok(Ok(result)) => survived.push(result?),
                Ok(Err(error)) => self.fail(&format!("reading: {error}")),
                Err(_) => self.fail("reading took too long"),
            }
        }
        println!("  all answered writes are there, and {survived:?} that were not answered");
        Ok(())
    }

    /// The node lives on after the last cut, and has had nothing to complain about.
    pub(crate) async fn finish(mut self) {
        self.write_until_answered(20).await;
        if let Err(broken) = self.check().await {
            self.fail(&format!("without a cut: {broken}"));
        }
        self.lose_power(Toll::Drawn).await;
    }

    fn answered(&self) -> [u64; 2] {
        [self.clients[0].answered(), self.clients[1].answered()]
    }

    fn check_console(&self) -> Result<(), String> {
        let console = self.guest.as_ref().map(|guest| &guest.console).or(self.before.as_ref());
        match console.and_then(Console::complaint) {
            Some(complaint) => Err(format!("unexpected on the console: {complaint}")),
            None => Ok(()),
        }
    }
}
