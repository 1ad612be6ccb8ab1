//! Copies of a Debian disk: to the front, and to the far end.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use srn_e2e::{Node, PATIENCE, tool, wait_for};
use tokio::process::Command;
use tokio::time::Instant;

use super::cost::Cost;
use super::peers::{self, Server, free_port};
use super::table::{Comparison, Table, quantile};
use super::{Site, remove, served};

const MIB: f64 = 2048.0;

/// The disk of a Debian server, 2 GiB of which some 40 % are zeros.
pub(crate) async fn image(site: &Site) -> PathBuf {
    let disk = site.lab.path("image.raw");
    if !disk.exists() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/build.sh");
        let built = Command::new(&script).args(["--fill", "800M"]).arg(&disk).status().await;
        assert!(built.is_ok_and(|status| status.success()), "the image could not be built");
        // Read it once, so that nobody pays for it.
        let _ = std::fs::read(&disk).map(|bytes| bytes.len());
    }
    disk
}

pub(crate) async fn nbdcopy(from: &Path, uri: &str) {
    let from = from.display().to_string();
    let _ = tool::run("nbdcopy", &["--flush", from.as_str(), uri]).await.done();
}

async fn seconds(work: impl Future<Output = ()>) -> f64 {
    let began = Instant::now();
    work.await;
    began.elapsed().as_secs_f64()
}

/// Waits until everything is durable at the peer. It asks the daemon itself: starting `srn` again
/// and again would take a twentieth of the machine from what is measured.
pub(crate) async fn in_step(node: &Node, group: &str) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let request =
        format!("GET /v1/groups/{group} HTTP/1.1\r\nHost: srn\r\nConnection: close\r\n\r\n");
    wait_for("everything is at the peer", PATIENCE, async || {
        let mut socket = tokio::net::UnixStream::connect(node.socket()).await.ok()?;
        socket.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        let group: serde_json::Value = serde_json::from_str(body).ok()?;
        (group["state"] == "streaming" && group["lag_bytes"] == 0).then_some(())
    })
    .await;
}

/// `nbdcopy --flush` of the image into the front.
pub(crate) async fn measure_front_copy(site: &Site, pairs: usize, table: &mut Table) {
    let image = image(site).await;
    let target = site.lab.path("copy.raw");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        served(site, "copy", "2G").await;
        let uri = site.production.nbd_uri("copy/disk");
        ours.push(MIB * 1.048_576 / seconds(nbdcopy(&image, &uri)).await);
        remove(site, "copy").await;
        let _ = tool::run("truncate", &["-s", "2G", &target.display().to_string()]).await.done();
        let peer = peers::qemu_nbd(&target, &[]).await;
        theirs.push(MIB * 1.048_576 / seconds(nbdcopy(&image, &peer.uri())).await);
        drop(peer);
        let _ = std::fs::remove_file(&target);
    }
    table.compare(&Comparison {
        what: "nbdcopy --flush of a 2 GiB Debian disk into the front",
        peer: "qemu-nbd",
        unit: "MB/s",
        ours: &ours,
        theirs: &theirs,
        target: "≥ 1.0",
    });
}

/// From the first byte read until everything is durable, encrypted on the way, at the far end.
pub(crate) async fn measure(site: &Site, pairs: usize, table: &mut Table) {
    let image = image(site).await;
    let far = Far::new(site.lab.dir(), &image).await;
    let mut ours = Vec::new();
    let mut theirs: [Vec<f64>; 3] = Default::default();
    let (mut seconds_per_gib, mut written_per_byte) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        served(site, "whole", "2G").await;
        let uri = site.production.nbd_uri("whole/disk");
        let before = Cost::of(site);
        ours.push(
            seconds(async {
                nbdcopy(&image, &uri).await;
                in_step(&site.production, "whole").await;
            })
            .await,
        );
        let cost = Cost::of(site).since(before);
        let group = site.production.group("whole").await;
        let content = group["link"]["content_written"].as_f64().expect("a number");
        seconds_per_gib.push(cost.cpu_s / content * f64::from(1 << 30));
        written_per_byte.push(cost.written / content / 2.0);
        remove(site, "whole").await;
        theirs[0].push(far.tls_nbd().await);
        theirs[1].push(far.zstd_socat().await);
        theirs[2].push(far.rsync_ssh().await);
    }
    let names = ["nbdcopy to qemu-nbd, TLS", "zstd -1 to socat, TLS", "rsync over ssh, zstd"];
    for (name, theirs) in names.iter().zip(&theirs) {
        table.compare(&Comparison {
            what: "whole job, the same disk, durable at the far end",
            peer: name,
            unit: "s",
            ours: &ours,
            theirs,
            target: "",
        });
    }
    let best = theirs
        .iter()
        .min_by(|a, b| quantile(a, 0.5).total_cmp(&quantile(b, 0.5)))
        .expect("there are some");
    table.compare(&Comparison {
        what: "whole job beside the best of these",
        peer: "the best",
        unit: "s",
        ours: &ours,
        theirs: best,
        target: "≤ 0.9",
    });
    let cpu = format!("{:.2} s per GiB of content", quantile(&seconds_per_gib, 0.5));
    table.state("processor time for that, both nodes together", cpu, "");
    let written = format!("{:.2}", quantile(&written_per_byte, 0.5));
    table.state("bytes written to each node's volume per byte of content", written, "");
}

/// What the others need at the far end: certificates, a key, a daemon.
pub(crate) struct Far {
    dir: PathBuf,
    image: PathBuf,
    ssh_port: u16,
    _sshd: Server,
}

impl Far {
    pub(crate) async fn new(dir: &Path, image: &Path) -> Self {
        let dir = dir.join("far");
        std::fs::create_dir_all(&dir).expect("a directory");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin/bench/far.sh");
        let made = Command::new("bash").arg(&script).arg(&dir).status().await;
        assert!(made.is_ok_and(|status| status.success()), "keys could not be made");
        let port = free_port();
        let mut sshd = Command::new("/usr/sbin/sshd");
        sshd.arg("-D").arg("-e").arg("-p").arg(port.to_string());
        sshd.arg("-f").arg(dir.join("sshd_config")).stderr(Stdio::null());
        let sshd = Server::start(sshd, port).await;
        Self { dir, image: image.to_owned(), ssh_port: sshd.port(), _sshd: sshd }
    }

    fn fresh_target(&self) -> PathBuf {
        let target = self.dir.join("target.raw");
        let _ = std::fs::remove_file(&target);
        target
    }

    /// Everything in the file is on disk.
    fn sync(target: &Path) {
        std::fs::File::open(target).and_then(|file| file.sync_all()).expect("a sync");
    }

    async fn tls_nbd(&self) -> f64 {
        let target = self.fresh_target();
        std::fs::File::create(&target).and_then(|file| file.set_len(2 << 30)).expect("a file");
        let tls = format!("tls-creds-x509,id=tls0,endpoint=server,dir={}", self.dir.display());
        let peer = peers::qemu_nbd(&target, &["--object", &tls, "--tls-creds", "tls0"]).await;
        let uri = format!(
            "nbds://127.0.0.1:{}/disk?tls-certificates={}&tls-hostname=localhost",
            peer.port(),
            self.dir.display()
        );
        seconds(nbdcopy(&self.image, &uri)).await
    }

    async fn zstd_socat(&self) -> f64 {
        let (target, port) = (self.fresh_target(), free_port());
        let (dir, image) = (self.dir.display(), self.image.display());
        let receive = format!(
            "socat -u openssl-listen:{port},bind=127.0.0.1,reuseaddr,cert={dir}/server-cert.pem,\
             key={dir}/server-key.pem,cafile={dir}/ca-cert.pem,verify=1 - | zstd -dcq | \
             dd of={} bs=1M conv=sparse,fsync iflag=fullblock status=none && \
             truncate -s 2G {0}",
            target.display()
        );
        let mut receiver = Command::new("bash")
            .args(["-o", "pipefail", "-c", &receive])
            .kill_on_drop(true)
            .spawn()
            .expect("bash");
        peers::listens(port).await;
        let send = format!(
            "zstd -1 -cq {image} | socat -u - openssl-connect:127.0.0.1:{port},\
             cert={dir}/client-cert.pem,key={dir}/client-key.pem,cafile={dir}/ca-cert.pem,\
             commonname=localhost"
        );
        seconds(async {
            let _ = tool::run("bash", &["-o", "pipefail", "-c", &send]).await.done();
            let ended = receiver.wait().await.expect("it ends");
            assert!(ended.success(), "the receiving end: {ended}");
        })
        .await
    }

    fn ssh(&self) -> String {
        format!(
            "ssh -p {} -i {}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             -o LogLevel=ERROR -o IdentitiesOnly=yes",
            self.ssh_port,
            self.dir.display()
        )
    }

    /// The far end has this already.
    pub(crate) fn keep_target(&self, image: &Path) {
        std::fs::copy(image, self.dir.join("target.raw")).expect("a copy");
    }

    /// Brings what the far end has up to date. Seconds, and bytes on the wire.
    pub(crate) async fn rsync_in_place(&self) -> (f64, f64) {
        let target = self.dir.join("target.raw");
        let (ssh, to) = (self.ssh(), format!("127.0.0.1:{}", target.display()));
        let image = self.image.display().to_string();
        let arguments = [
            "--inplace",
            "--no-whole-file",
            "--block-size=4096",
            "--ignore-times",
            "--compress",
            "--compress-choice=zstd",
            "--compress-level=1",
            "--stats",
            "--no-human-readable",
            "-e",
            &ssh,
            &image,
            &to,
        ];
        let began = Instant::now();
        let said = tool::run("rsync", &arguments).await.done();
        Self::sync(&target);
        let seconds = began.elapsed().as_secs_f64();
        let figure = |name: &str| -> f64 {
            let line = said.out.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.trim().parse().ok()).expect("rsync tells")
        };
        (seconds, figure("Total bytes sent:") + figure("Total bytes received:"))
    }

    async fn rsync_ssh(&self) -> f64 {
        let target = self.fresh_target();
        let ssh = self.ssh();
        let to = format!("127.0.0.1:{}", target.display());
        let image = self.image.display().to_string();
        seconds(async {
            let arguments = [
                "-W",
                "--sparse",
                "--compress",
                "--compress-choice=zstd",
                "--compress-level=1",
                "-e",
                &ssh,
                &image,
                &to,
            ];
            let _ = tool::run("rsync", &arguments).await.done();
            Self::sync(&target);
        })
        .await
    }
}
