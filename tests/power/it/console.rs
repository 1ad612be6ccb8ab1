//! What the guest says, and what it must not say.

use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::watch;

/// Words of the kernel that mean trouble wherever they stand. (A journal that is replayed after a
/// power cut is none: "EXT4-fs (vda): recovery complete" is not an error.)
const TROUBLE: [&str; 9] = [
    "EXT4-fs error",
    "EXT4-fs warning",
    "JBD2: ",
    "I/O error",
    "Kernel panic",
    "BUG:",
    "Oops",
    "Out of memory",
    "panicked at",
];

/// Warnings of the node that belong to what is done to it here.
const EXPECTED: [&str; 0] = [];

/// Something that lines come from.
pub(crate) type Source = Box<dyn AsyncRead + Unpin + Send>;

/// The lines so far, as they come.
#[derive(Debug, Clone)]
pub(crate) struct Console {
    lines: watch::Receiver<Vec<String>>,
}

impl Console {
    /// Listens until all `sources` end.
    pub(crate) fn listen(sources: impl IntoIterator<Item = Source>) -> Self {
        let (sender, lines) = watch::channel(Vec::new());
        let sender = Arc::new(sender);
        for source in sources {
            tokio::spawn(read_lines(source, sender.clone()));
        }
        Self { lines }
    }

    /// Waits for a line that begins so (true), or for the end (false).
    pub(crate) async fn says(&self, begin: &str) -> bool {
        let said = |lines: &Vec<String>| lines.iter().any(|line| line.starts_with(begin));
        self.lines.clone().wait_for(said).await.is_ok()
    }

    /// Waits until everything was read that was ever written.
    pub(crate) async fn end(&self) {
        let mut lines = self.lines.clone();
        while lines.changed().await.is_ok() {}
    }

    /// The first line that a test has to fail for.
    pub(crate) fn complaint(&self) -> Option<String> {
        self.lines.borrow().iter().find(|line| is_complaint(line)).cloned()
    }

    /// The last lines.
    pub(crate) fn tail(&self, count: usize) -> String {
        let lines = self.lines.borrow();
        lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
    }
}

fn is_complaint(line: &str) -> bool {
    // The node's lines: time, level, who, what.
    let level = line.split_whitespace().nth(1).unwrap_or_default();
    let loud = matches!(level, "WARN" | "ERROR") || TROUBLE.iter().any(|word| line.contains(word));
    loud && !EXPECTED.iter().any(|known: &&str| line.contains(known))
}

async fn read_lines(source: Source, lines: Arc<watch::Sender<Vec<String>>>) {
    let mut source = BufReader::new(source);
    let mut line = Vec::new();
    // A console that cannot be read has ended.
    while source.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        lines.send_modify(|lines| lines.push(text));
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_from_talk() {
        for line in [
            "2026-11-21T04:47:16.689Z ERROR srn_store::io: state volume: writing: no",
            "2026-11-21T04:47:16.689Z WARN  srn::context: group power: the log is full",
            "[    5.1] EXT4-fs error (device vda): ext4_lookup:1855: inode #2",
            "[    5.1] Kernel panic - not syncing: Attempted to kill init!",
            "thread 'log-power' (77) panicked at appliance/store/src/group.rs:1:1:",
        ] {
            assert!(is_complaint(line), "{line}");
        }
        for line in [
            "2026-11-21T04:47:16.689Z INFO  srn::daemon: ready",
            "[    5.1] EXT4-fs (vda): recovery complete",
            "POWER ready",
            "",
        ] {
            assert!(!is_complaint(line), "{line}");
        }
    }
}
