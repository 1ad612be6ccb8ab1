//! Small file systems of one's own, for what happens when there is no room left or nothing can be
//! written: mounted in a mount namespace that lasts as long as the value, so that nothing is left
//! behind however a test ends.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A directory that is another file system for whoever enters it.
#[derive(Debug)]
pub struct Volume {
    dir: PathBuf,
    holder: Child,
}

impl Volume {
    /// An empty file system of `bytes` bytes at `dir`.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub async fn small(dir: &Path, bytes: u64) -> Self {
        let size = format!("size={bytes}");
        Self::mount(dir, &["mount", "-t", "tmpfs", "-o", &size, "none"]).await
    }

    /// An empty ext4 of `bytes` bytes at `dir`, kept in the file `image`: one that can be frozen.
    ///
    /// # Panics
    /// When it cannot be made or mounted.
    pub async fn ext4(dir: &Path, image: &Path, bytes: u64) -> Self {
        let file = std::fs::File::create_new(image).expect("a new file");
        file.set_len(bytes).expect("a sparse file");
        let made = Command::new("mkfs.ext4").arg("-q").arg(image).status().await;
        assert!(made.expect("mkfs.ext4, of e2fsprogs").success());
        let image = image.to_str().expect("a path in UTF-8");
        Self::mount(dir, &["mount", "-o", "loop", image]).await
    }

    /// What is in `dir`, read-only.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub async fn read_only(dir: &Path) -> Self {
        let from = dir.to_str().expect("a path in UTF-8");
        Self::mount(dir, &["mount", "--bind", "-o", "ro", from]).await
    }

    async fn mount(dir: &Path, command: &[&str]) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let mut holder = Command::new("unshare");
        holder.arg("--mount");
        if !rustix::process::geteuid().is_root() {
            holder.args(["--user", "--map-root-user"]);
        }
        // Mounted, then told so, then held.
        holder.args(["sh", "-c", r#""$@" && echo held && exec cat"#, "sh"]).args(command).arg(dir);
        holder.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut holder = holder.spawn().expect("unshare, of util-linux");
        let mut said = String::new();
        let out = holder.stdout.take().expect("its output");
        let _ = BufReader::new(out).read_line(&mut said).await.expect("its output");
        assert!(said == "held\n", "{command:?} failed at {}", dir.display());
        Self { dir: dir.to_owned(), holder }
    }

    fn pid(&self) -> u32 {
        self.holder.id().expect("the holder of the mount runs")
    }

    /// What a command begins with that is to run where the file system is mounted.
    #[must_use]
    pub fn enter(&self) -> Vec<String> {
        let pid = self.pid().to_string();
        let mut words = vec!["nsenter".to_owned(), "--target".into(), pid, "--mount".into()];
        if !rustix::process::geteuid().is_root() {
            words.extend(["--user".into(), "--preserve-credentials".into()]);
        }
        words.push("--".into());
        words
    }

    /// Where it can be looked at from outside.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let inside = self.dir.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.pid())).join(inside)
    }

    /// Bytes free.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn free(&self) -> u64 {
        let stat = statvfs(self.path()).expect("a file system");
        stat.f_bavail * stat.f_frsize
    }

    /// Takes all room but `bytes` bytes, while others may be writing.
    ///
    /// # Panics
    /// When there is not so much.
    pub fn fill_but(&self, bytes: u64) {
        let file = std::fs::File::options()
            .create_new(true)
            .write(true)
            .open(self.path().join("filler"))
            .expect("nothing was taken yet");
        let mut taken = 0;
        while let Some(take) = self.free().checked_sub(bytes).filter(|take| *take > 0) {
            match fallocate(&file, FallocateFlags::empty(), taken, take) {
                Ok(()) => taken += take,
                // Somebody else was faster.
                Err(Errno::NOSPC) => {}
                Err(error) => panic!("taking {take} bytes of {}: {error}", self.dir.display()),
            }
        }
        assert!(taken > 0, "more than {bytes} bytes were free");
    }

    /// Gives back what [`Self::fill_but`] took.
    ///
    /// # Panics
    /// When nothing was taken.
    pub fn make_room(&self) {
        std::fs::remove_file(self.path().join("filler")).expect("something was taken");
    }
}
