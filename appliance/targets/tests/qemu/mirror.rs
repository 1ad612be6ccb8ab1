//! Protecting a disk by QEMU's own mirror, as the daemon does it in an administrator's QEMU.

use std::fs;

use serde_json::Value;
use srn_targets::qemu::qmp::block::{NbdAddress, NbdNode};
use srn_targets::qemu::qmp::event::{Events, Kind};
use srn_targets::qemu::qmp::mirror::{MirrorEnd, MirrorJob, OnError};
use srn_targets::qemu::qmp::{Qmp, QmpError};
use tokio::net::{TcpListener, UnixStream};

use crate::support::{Guarded, Lab, NbdServer, PATIENCE, until};

/// A writing guest, its monitor, and an empty target of the same size added to its QEMU.
struct Bench {
    lab: Lab,
    machine: Guarded,
    qmp: Qmp,
    events: Events,
    target: NbdServer,
    _source: NbdServer,
}

impl Bench {
    async fn new() -> Self {
        let lab = Lab::new();
        let (source, spec) = lab.guest(true);
        let machine = lab.start(&spec).await;
        machine.writes_on().await;
        fs::write(lab.path("copy.raw"), vec![0; 4 << 20]).unwrap();
        let target = NbdServer::start(&lab.path("copy.raw"), lab.path("copy.sock"), "copy");
        let qmp = machine.monitor().await.unwrap();
        let events = qmp.events();
        let bench = Self { lab, machine, qmp, events, target, _source: source };
        bench.add_target(NbdAddress::Unix(bench.target.socket().to_owned())).await;
        bench
    }

    async fn add_target(&self, address: NbdAddress) {
        let node = NbdNode {
            discards: true,
            node_name: "copy".to_owned(),
            address,
            export: "copy".to_owned(),
            reconnect_delay_seconds: 0,
            tls_credentials: None,
        };
        self.qmp.blockdev_add_nbd(&node).await.unwrap();
    }

    async fn until(&mut self, wanted: impl FnMut(&Kind) -> bool) -> Kind {
        match self.events.wait_for(PATIENCE, wanted).await {
            Ok(event) => event.kind(),
            Err(error) => {
                let ended = tokio::time::timeout(PATIENCE, self.machine.ended()).await;
                panic!("{error}; the machine: {ended:?}")
            }
        }
    }

    /// Ends the target's server; what it holds stays in its file.
    fn lose_target(&mut self) {
        let elsewhere = self.lab.path("elsewhere.sock");
        self.target = NbdServer::start(&self.lab.path("copy.raw"), elsewhere, "unused");
    }

    /// Ends the mirror in order while the guest stands still, and compares both sides.
    async fn compare(&mut self) {
        self.qmp.execute("stop", Value::Null).await.unwrap();
        self.until(|kind| *kind == Kind::Stop).await;
        assert_eq!(self.qmp.end_mirror("protect", "copy").await.unwrap(), MirrorEnd::Orderly);
        let end = self.until(is_end).await;
        assert_eq!(end, Kind::JobCompleted { job: "protect".to_owned(), error: None });
        assert!(self.qmp.jobs().await.unwrap().is_empty());
        self.qmp.blockdev_del("copy").await.unwrap();

        let source = fs::read(self.lab.path("disk.raw")).unwrap();
        let copy = fs::read(self.lab.path("copy.raw")).unwrap();
        assert!(source[512..].iter().any(|byte| *byte != 0), "the guest has written");
        assert!(source == copy, "the copy differs");

        self.machine.resume().await.unwrap();
        self.until(|kind| *kind == Kind::Resume).await;
        self.machine.writes_on().await;
    }

    async fn follow(&mut self) {
        let source = self.qmp.find_disk("dev0").await.unwrap().unwrap();
        let job = MirrorJob::follow("protect", &source.node_name, "copy");
        self.qmp.blockdev_mirror(&job).await.unwrap();
        self.until(|kind| *kind == Kind::JobReady { job: "protect".to_owned() }).await;
    }
}

fn is_end(kind: &Kind) -> bool {
    matches!(kind, Kind::JobCompleted { .. } | Kind::JobCancelled { .. })
}

#[tokio::test]
async fn a_mirror_follows_a_writing_guest_to_the_byte() {
    let mut bench = Bench::new().await;
    bench.follow().await;
    let jobs = bench.qmp.jobs().await.unwrap();
    assert_eq!((jobs[0].id.as_str(), jobs[0].status.as_str()), ("protect", "ready"));
    let block_jobs = bench.qmp.block_jobs().await.unwrap();
    assert!(block_jobs[0].ready && block_jobs[0].len >= 4 << 20);
    bench.machine.writes_on().await;

    bench.compare().await;
}

#[tokio::test]
async fn a_target_that_comes_back_is_brought_up_to_date_and_not_copied_again() {
    let mut bench = Bench::new().await;
    bench.follow().await;
    bench.machine.writes_on().await;
    bench.lose_target();
    bench.until(|kind| matches!(kind, Kind::JobError { action, .. } if action == "stop")).await;
    bench.machine.writes_on().await;
    let paused = &bench.qmp.block_jobs().await.unwrap()[0];
    assert!(paused.paused && paused.io_status == "failed" && !paused.is_in_sync());

    bench.target =
        NbdServer::start(&bench.lab.path("copy.raw"), bench.lab.path("copy.sock"), "copy");
    // QEMU reconnects in its own time; until then the job pauses again.
    let in_sync = until(async || {
        let job = &bench.qmp.block_jobs().await.unwrap()[0];
        if job.paused {
            bench.qmp.block_job_resume("protect").await.unwrap();
        }
        job.is_in_sync()
    });
    assert!(in_sync.await);
    bench.machine.writes_on().await;
    bench.compare().await;
}

#[tokio::test]
async fn a_target_is_reached_over_tcp() {
    let mut bench = Bench::new().await;
    bench.qmp.blockdev_del("copy").await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let socket = bench.target.socket().to_owned();
    tokio::spawn(async move {
        let (mut outside, _) = listener.accept().await.unwrap();
        let mut inside = UnixStream::connect(socket).await.unwrap();
        drop(tokio::io::copy_bidirectional(&mut outside, &mut inside).await);
    });
    bench.add_target(NbdAddress::Tcp(address.ip(), address.port())).await;
    bench.follow().await;
}

#[tokio::test]
async fn a_job_that_failed_says_why_until_it_is_dismissed() {
    let mut bench = Bench::new().await;
    let mut job = MirrorJob::follow("protect", "disk0", "copy");
    job.on_target_error = OnError::Report;
    bench.qmp.blockdev_mirror(&job).await.unwrap();
    bench.until(|kind| matches!(kind, Kind::JobReady { .. })).await;
    bench.lose_target();
    let end = bench.until(is_end).await;
    let Kind::JobCompleted { error: Some(error), .. } = end else { panic!("{end:?}") };
    bench.machine.writes_on().await;
    let ended = bench.qmp.jobs().await.unwrap();
    assert_eq!(ended[0].error.as_deref(), Some(error.as_str()));
    let end = bench.qmp.end_mirror("protect", "copy").await.unwrap();
    assert_eq!(end, MirrorEnd::Already);
    assert!(bench.qmp.jobs().await.unwrap().is_empty());
    bench.qmp.blockdev_del("copy").await.unwrap();
}

#[tokio::test]
async fn a_mirror_is_slowed_and_broken_off_again_and_again() {
    let mut bench = Bench::new().await;
    let mut job = MirrorJob::follow("protect", "disk0", "copy");
    job.speed = 64 << 10;
    // QEMU crashes at one in fourteen when a mirror is broken off while the guest runs.
    for round in 0..40 {
        job.auto_dismiss = round % 2 == 0;
        bench.qmp.blockdev_mirror(&job).await.unwrap();
        bench.qmp.block_job_set_speed("protect", 32 << 10).await.unwrap();
        let running = bench.qmp.block_jobs().await.unwrap();
        assert!(!running[0].ready && running[0].speed == 32 << 10 && running[0].io_status == "ok");
        let end = bench.qmp.end_mirror("protect", "copy").await.unwrap();
        assert_eq!(end, MirrorEnd::BrokenOff);
        let end = bench.until(is_end).await;
        assert_eq!(end, Kind::JobCancelled { job: "protect".to_owned() });
        assert!(bench.qmp.jobs().await.unwrap().is_empty());
        assert!(bench.qmp.query_status().await.unwrap().running, "it stood still only meanwhile");
        bench.qmp.blockdev_del("copy").await.unwrap();
        bench.add_target(NbdAddress::Unix(bench.target.socket().to_owned())).await;
    }
    bench.machine.writes_on().await;
}

#[tokio::test]
async fn a_mirror_ends_in_order_under_a_writing_guest_again_and_again() {
    let mut bench = Bench::new().await;
    for _ in 0..20 {
        bench.follow().await;
        assert_eq!(bench.qmp.end_mirror("protect", "copy").await.unwrap(), MirrorEnd::Orderly);
        let end = bench.until(is_end).await;
        assert_eq!(end, Kind::JobCompleted { job: "protect".to_owned(), error: None });
    }
    bench.machine.writes_on().await;
}

#[tokio::test]
async fn a_mirror_whose_target_is_gone_is_broken_off_too() {
    let mut bench = Bench::new().await;
    bench.follow().await;
    bench.lose_target();
    bench.until(|kind| matches!(kind, Kind::JobError { .. })).await;
    let end = bench.qmp.end_mirror("protect", "copy").await.unwrap();
    assert_eq!(end, MirrorEnd::BrokenOff);
    bench.qmp.blockdev_del("copy").await.unwrap();
    bench.machine.writes_on().await;
}

#[tokio::test]
async fn a_machine_that_stood_still_does_so_afterwards() {
    let mut bench = Bench::new().await;
    bench.qmp.execute("stop", Value::Null).await.unwrap();
    let mut job = MirrorJob::follow("protect", "disk0", "copy");
    job.speed = 64 << 10;
    bench.qmp.blockdev_mirror(&job).await.unwrap();
    bench.qmp.end_mirror("protect", "copy").await.unwrap();
    assert!(!bench.qmp.query_status().await.unwrap().running);
    bench.machine.resume().await.unwrap();
    bench.until(|kind| *kind == Kind::Resume).await;
}

#[tokio::test]
async fn what_cannot_be_mirrored_is_refused_in_qemus_words() {
    let bench = Bench::new().await;
    let refused = |job: MirrorJob| {
        let qmp = bench.qmp.clone();
        async move { qmp.blockdev_mirror(&job).await.unwrap_err().to_string() }
    };
    let no_target = refused(MirrorJob::follow("protect", "disk0", "nowhere")).await;
    assert!(no_target.contains("nowhere"), "{no_target}");
    let no_source = refused(MirrorJob::follow("protect", "nowhere", "copy")).await;
    assert!(no_source.contains("nowhere"), "{no_source}");
    let onto_itself = refused(MirrorJob::follow("protect", "disk0", "disk0")).await;
    assert!(onto_itself.contains("itself"), "{onto_itself}");
    let unknown = bench.qmp.block_job_cancel("nowhere", false).await.unwrap_err();
    assert!(matches!(unknown, QmpError::Refused { .. }), "{unknown}");
}
