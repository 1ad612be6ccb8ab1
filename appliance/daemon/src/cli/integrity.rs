//! Commands that look at whether what is held is what it should be.

use std::io::{IsTerminal, Write};

use super::client::{Client, segment};
use super::commands::Out;
use super::{render, say_error};
use crate::api::{Said, ScrubRequest, VerifyRequest};
use crate::config::Size;
use crate::error::{Failure, Kind, Result};
use crate::group::integrity::{Scrubbed, Verified, WorkStatus};

/// Compares what the two nodes hold. Ctrl-C ends it at both.
pub(super) async fn verify(
    client: &Client,
    out: &Out,
    group: String,
    disk: Option<String>,
) -> Result<()> {
    let path = format!("/v1/groups/{}/verify", segment(&group)?);
    let request = VerifyRequest { disk };
    let mut shown = Shown { terminal: std::io::stderr().is_terminal() && !out.json, any: false };
    let compare = client.lines(&path, &request, |said: Said<Verified>| match said {
        Said::Progress(work) => {
            shown.show(&work);
            None
        }
        Said::Done(verified) => Some(Ok(verified)),
        Said::Failed(failure) => Some(Err(failure)),
    });
    let verified = tokio::select! {
        verified = compare => verified.flatten(),
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::refused("the comparison was ended before its end; nothing is known"))
        }
    };
    shown.end();
    let verified = verified?;
    out.show(&verified, self::verified);
    if verified.equal {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Storage,
        format!("group {group} is not equal at both nodes at frame {}", verified.frame),
    ))
}

/// Reads everything that this node holds. Ctrl-C ends it.
pub(super) async fn scrub(client: &Client, out: &Out, group: String) -> Result<()> {
    let path = format!("/v1/groups/{}/scrub", segment(&group)?);
    let mut shown = Shown { terminal: std::io::stderr().is_terminal() && !out.json, any: false };
    let request = ScrubRequest {};
    let reading = client.lines(&path, &request, |said: Said<Scrubbed>| match said {
        Said::Progress(work) => {
            shown.show(&work);
            None
        }
        Said::Done(scrubbed) => Some(Ok(scrubbed)),
        Said::Failed(failure) => Some(Err(failure)),
    });
    let scrubbed = tokio::select! {
        scrubbed = reading => scrubbed.flatten(),
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::refused("the scrub was ended before its end"))
        }
    };
    shown.end();
    let scrubbed = scrubbed?;
    out.show(&scrubbed, self::scrubbed);
    match scrubbed.damaged.first() {
        None => Ok(()),
        Some(first) => Err(Failure::new(
            Kind::Storage,
            format!("group {group} is damaged here: {}; srn events says why", first.what),
        )),
    }
}

fn scrubbed(scrubbed: &Scrubbed) -> String {
    let mut out = vec![format!(
        "group {}: {} read in {:.1} s, {} repaired, {} damaged still",
        scrubbed.group,
        Size(scrubbed.bytes),
        scrubbed.seconds,
        scrubbed.repaired.len(),
        scrubbed.damaged.len()
    )];
    out.extend(scrubbed.repaired.iter().map(|damage| format!("  repaired: {}", damage.what)));
    for damage in &scrubbed.damaged {
        out.push(format!("  DAMAGED since {}: {}", damage.since, damage.what));
        let places = damage.extents.iter();
        out.extend(places.map(|(disk, at, len)| format!("    {len} bytes of {disk} at {at}")));
    }
    out.join("\n")
}

/// Progress on a terminal, in one line.
struct Shown {
    terminal: bool,
    any: bool,
}

impl Shown {
    fn show(&mut self, work: &WorkStatus) {
        if self.terminal {
            self.any = true;
            let bar = render::bar(work.done, work.total, 30);
            let text = render::progress(work.done, work.total, work.rate);
            let _ = write!(std::io::stderr(), "\r\x1b[K{bar} {text}");
        }
    }

    fn end(&self) {
        if self.any {
            say_error("");
        }
    }
}

fn verified(verified: &Verified) -> String {
    let bytes: u64 = verified.disks.iter().map(|disk| disk.bytes).sum();
    let mut out = vec![format!(
        "group {} was compared with {} at frame {} of {}: {} in {:.1} s, {}",
        verified.group,
        verified.peer,
        verified.frame,
        verified.time,
        Size(bytes),
        verified.seconds,
        if verified.equal { "all equal" } else { "NOT EQUAL" }
    )];
    for disk in &verified.disks {
        if disk.ranges.is_empty() {
            continue;
        }
        out.push(format!(
            "disk {}: {} differ, {} are damaged here, {} at the peer",
            disk.name,
            Size(disk.differing_bytes),
            Size(disk.unreadable_here_bytes),
            Size(disk.unreadable_there_bytes)
        ));
        out.extend(disk.ranges.iter().map(|range| format!("  {range}")));
    }
    out.join("\n")
}
