//! Comparing what the two nodes hold, block by block, at one position, while writes go on.
//!
//! Invariant: both sides read exactly the content behind one frame, which both hold with the same
//! hash. So whatever is written meanwhile, a difference is one of content at rest and never one of
//! time: there are no false alarms. Discarded ranges read as zero on both sides.
//!
//! Leaves of 64 KiB are compared by hash; of those that differ, the sixteen pages. The peer hashes
//! one piece while this node hashes the next.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use srn_core::ids::DiskNo;
use srn_core::limits::SECTOR;
use srn_core::wire::{Grain, HASHES_MAX, HashRange, Integrity as Said, Message, Words};
use srn_store::StoreError;
use srn_store::group::{GrainHash, View};
use srn_store::manifest::{Keep, Role};

use super::answer::READ_MAX;
use super::ask::Unanswered;
use super::{Group, Running, from_runs, idle};
use crate::clock;
use crate::error::{Failure, Kind, Result};
use crate::fleet::Level;

/// Ranges that a result names for each disk; the rest is counted.
const RANGES_MAX: usize = 1000;

/// Times that another position is tried, when the peer has retired the one before.
const TRIES: u32 = 5;

/// What a comparison has found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verified {
    /// The group.
    pub group: String,
    /// The peer's name.
    pub peer: String,
    /// The frame behind which both were compared.
    pub frame: u64,
    /// That frame's time, in RFC 3339.
    pub time: String,
    /// Whether everything is equal and readable.
    pub equal: bool,
    /// Seconds that it took.
    pub seconds: f64,
    /// Its disks.
    pub disks: Vec<DiskVerified>,
}

/// What a comparison has found of one disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskVerified {
    /// Its name.
    pub name: String,
    /// Bytes compared: all of it.
    pub bytes: u64,
    /// Bytes that differ, in whole pages.
    pub differing_bytes: u64,
    /// Bytes that are damaged here.
    pub unreadable_here_bytes: u64,
    /// Bytes that are damaged at the peer.
    pub unreadable_there_bytes: u64,
    /// The first of these ranges.
    pub ranges: Vec<Range>,
}

/// A range of a disk that is not equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Its first byte.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// `differs`, `unreadable here` or `unreadable at the peer`.
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Differs,
    Here,
    There,
}

impl Fault {
    /// What two hashes of the same place say.
    fn of(here: &GrainHash, there: &GrainHash) -> Option<Self> {
        match (here, there) {
            (GrainHash::Unreadable, _) => Some(Self::Here),
            (_, GrainHash::Unreadable) => Some(Self::There),
            (here, there) => (here != there).then_some(Self::Differs),
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::Differs => "differs",
            Self::Here => "unreadable here",
            Self::There => "unreadable at the peer",
        }
    }
}

impl DiskVerified {
    fn is_equal(&self) -> bool {
        self.differing_bytes + self.unreadable_here_bytes + self.unreadable_there_bytes == 0
    }

    fn add(&mut self, fault: Fault, start: u64, length: u64) {
        let bytes = match fault {
            Fault::Differs => &mut self.differing_bytes,
            Fault::Here => &mut self.unreadable_here_bytes,
            Fault::There => &mut self.unreadable_there_bytes,
        };
        *bytes += length;
        let is_full = self.ranges.len() >= RANGES_MAX;
        match self.ranges.last_mut() {
            Some(last) if last.start + last.length == start && last.what == fault.words() => {
                last.length += length;
            }
            _ if is_full => {}
            _ => self.ranges.push(Range { start, length, what: fault.words().into() }),
        }
    }
}

/// A comparison that has been prepared.
#[derive(Debug)]
pub struct Verify {
    running: Running,
    view: Arc<View>,
    disks: Vec<(DiskNo, String, u64)>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Running({})", self.group.id)
    }
}

impl Group {
    /// Prepares a comparison of all disks, or of one, at the newest position that both nodes hold.
    ///
    /// # Errors
    /// When there is nothing to compare with, in words; when something else is under way.
    pub async fn prepare_verify(self: &Arc<Self>, disk: Option<&str>) -> Result<Verify> {
        let name = self.name();
        if self.store.keep() == Keep::Cache {
            return Err(Failure::refused(format!(
                "group {name} keeps a local cache here, which is no copy to compare with; what the \
                 recovery node holds can be verified against its checksums there: srn scrub {name}"
            )));
        }
        if self.awaits_reversal() {
            return Err(Failure::refused(format!(
                "group {name} has failed over: its peer has another history"
            )));
        }
        self.session_to_ask()?;
        let running = Running::begin(self, "verify", 0)?;
        let store = self.store.clone();
        let seq = match self.role() {
            Role::Primary => self.store.acked(),
            Role::Secondary => self.store.head().seq,
        };
        let view = idle::run(move || store.view_at(seq)).await??;
        let catalog = view.catalog();
        let disks: Vec<_> = catalog
            .disks
            .iter()
            .filter(|(_, found)| disk.is_none_or(|disk| found.name == disk))
            .map(|(no, disk)| (*no, disk.name.clone(), disk.sectors))
            .collect();
        if disks.is_empty() {
            // Says which there are.
            disk.map_or(Ok(()), |disk| self.disk(disk).map(drop))?;
            return Err(Failure::refused(format!(
                "group {name} has no disk that both nodes hold yet"
            )));
        }
        if let Some(work) = &mut *self.integrity.work() {
            work.total = disks.iter().map(|(_, _, sectors)| sectors * SECTOR).sum();
        }
        Ok(Verify { running, view: Arc::new(view), disks })
    }
}

impl Verify {
    /// Compares. Dropping it ends the comparison at both nodes.
    ///
    /// # Errors
    /// When the peer is lost, or the log needs the room that this holds on to.
    pub async fn run(self) -> Result<Verified> {
        let group = self.running.group.clone();
        let began = clock::mono();
        let _enough = Enough(group.clone());
        let mut view = self.view;
        let mut done = Vec::new();
        for (no, name, sectors) in &self.disks {
            let mut disk = DiskVerified {
                name: name.clone(),
                bytes: sectors * SECTOR,
                differing_bytes: 0,
                unreadable_here_bytes: 0,
                unreadable_there_bytes: 0,
                ranges: Vec::new(),
            };
            let mut compare =
                Compare { running: &self.running, view: &mut view, no: *no, sectors: *sectors };
            // Once a leaf has been compared both nodes hold the position.
            compare.disk(&mut disk, done.is_empty()).await?;
            done.push(disk);
        }
        let catalog = view.catalog();
        let peer = group.session().map(|session| session.hello().name.to_string());
        let verified = Verified {
            group: group.name(),
            peer: peer.unwrap_or_default(),
            frame: catalog.at.seq.0,
            time: clock::rfc3339(catalog.wall_time),
            equal: done.iter().all(DiskVerified::is_equal),
            seconds: clock::mono().since(began) as f64 / 1e6,
            disks: done,
        };
        group.tell_verified(&verified);
        Ok(verified)
    }
}

/// Tells the peer at the end, however it comes, that it need not hold on any more.
struct Enough(Arc<Group>);

impl Drop for Enough {
    fn drop(&mut self) {
        if let Some(session) = self.0.session() {
            let said = Said { group: self.0.id, number: 0, words: Words::Enough };
            let _ = session.try_send(&Message::Integrity(said));
        }
    }
}

struct Compare<'a> {
    running: &'a Running,
    view: &'a mut Arc<View>,
    no: DiskNo,
    sectors: u64,
}

impl Compare<'_> {
    async fn disk(&mut self, found: &mut DiskVerified, may_move: bool) -> Result<()> {
        let leaf = Grain::Leaf.sectors();
        let leaves = self.sectors.div_ceil(leaf);
        let mut moves = if may_move { TRIES } else { 0 };
        let mut at = 0;
        let mut here = self.here(Grain::Leaf, at, leaves - at).await?;
        while at < leaves {
            let group = &self.running.group;
            if group.log_needs_room() {
                return Err(Failure::refused(format!(
                    "comparing group {} was given up: it holds on to a position of the log, and \
                     the log needs the room",
                    group.name()
                )));
            }
            let behind = at + here.len() as u64;
            // The next piece is read here while the peer reads this one.
            let next = async {
                match leaves - behind {
                    0 => Ok(Vec::new()),
                    rest => self.here(Grain::Leaf, behind, rest).await,
                }
            };
            let (there, next) = tokio::join!(self.there(Grain::Leaf, at, here.len() as u64), next);
            let there = match there {
                Err(Unanswered::NotInHistory(_)) if moves > 0 && at == 0 => {
                    // It was quicker in retiring it. Take a newer one.
                    moves -= 1;
                    self.move_on().await?;
                    here = self.here(Grain::Leaf, at, leaves - at).await?;
                    continue;
                }
                Err(why) => return Err(told(group, why)),
                Ok(there) => there,
            };
            let differing: Vec<u64> = here
                .iter()
                .zip(&there)
                .zip(at..)
                .filter(|((here, there), _)| here != there || **here == GrainHash::Unreadable)
                .map(|(_, leaf)| leaf)
                .collect();
            for leaf in differing {
                self.leaf(leaf, found).await?;
            }
            let sectors = behind.saturating_mul(leaf).min(self.sectors) - at * leaf;
            self.running.done(sectors * SECTOR);
            at = behind;
            here = next?;
        }
        Ok(())
    }

    /// Compares the pages of a leaf that is not equal.
    async fn leaf(&self, leaf: u64, found: &mut DiskVerified) -> Result<()> {
        let page = Grain::Page.sectors();
        let first = leaf * (Grain::Leaf.sectors() / page);
        let end = ((leaf + 1) * Grain::Leaf.sectors()).min(self.sectors).div_ceil(page);
        let (here, there) = tokio::join!(
            self.here(Grain::Page, first, end - first),
            self.there(Grain::Page, first, end - first)
        );
        let there = there.map_err(|why| told(&self.running.group, why))?;
        for ((here, there), number) in here?.iter().zip(&there).zip(first..) {
            if let Some(fault) = Fault::of(here, there) {
                let start = number * page;
                let length = page.min(self.sectors - start) * SECTOR;
                found.add(fault, start * SECTOR, length);
            }
        }
        Ok(())
    }

    /// Hashes of grains here; perhaps fewer than asked for.
    async fn here(&self, grain: Grain, first: u64, count: u64) -> Result<Vec<GrainHash>> {
        let (view, no) = (self.view.clone(), self.no);
        let count = count.min(u64::from(HASHES_MAX));
        let hashes =
            idle::run(move || view.hashes(no, grain.sectors(), first, count, READ_MAX)).await?;
        Ok(hashes?)
    }

    /// Hashes of grains at the peer, all that were asked for.
    async fn there(
        &self,
        grain: Grain,
        first: u64,
        count: u64,
    ) -> std::result::Result<Vec<GrainHash>, Unanswered> {
        let mut hashes = Vec::new();
        while (hashes.len() as u64) < count {
            let first = first + hashes.len() as u64;
            let count = u32::try_from(count - hashes.len() as u64).unwrap_or(HASHES_MAX);
            let range = HashRange { disk: self.no, grain, first, count };
            let question = Words::HashesWanted { at: self.view.catalog().at, range };
            match self.running.group.ask_peer(&question).await? {
                Words::Hashes(runs) => hashes.extend(from_runs(&runs)),
                _ => {
                    return Err(
                        Failure::new(Kind::Untrusted, "the peer answers something else").into()
                    );
                }
            }
        }
        if hashes.len() as u64 > count {
            let text = "the peer answers more than it was asked for";
            return Err(Failure::new(Kind::Untrusted, text).into());
        }
        Ok(hashes)
    }

    /// Takes the newest position that both nodes hold now.
    async fn move_on(&mut self) -> Result<()> {
        let store = self.running.group.store.clone();
        let seq = match self.running.group.role() {
            Role::Primary => store.acked(),
            Role::Secondary => store.head().seq,
        };
        let view = idle::run(move || store.view_at(seq)).await??;
        let same = view.catalog().disks.get(&self.no).map(|disk| disk.sectors);
        if same != Some(self.sectors) {
            return Err(Failure::from(StoreError::NotInHistory(
                "the disk was removed or resized meanwhile".into(),
            )));
        }
        *self.view = Arc::new(view);
        Ok(())
    }
}

fn told(group: &Group, why: Unanswered) -> Failure {
    match why {
        Unanswered::Failed(failure) => failure,
        Unanswered::NoCopy => Failure::refused(format!(
            "the production node of group {0} keeps a local cache, which is no copy to compare \
             with; what this node holds can be verified against its checksums: srn scrub {0}",
            group.name()
        )),
        Unanswered::NotInHistory(text) => Failure::refused(format!(
            "group {} cannot be compared: the peer says: {text}",
            group.name()
        )),
    }
}

impl Group {
    /// Says at both nodes what was found.
    fn tell_verified(self: &Arc<Self>, verified: &Verified) {
        let (frame, peer) = (verified.frame, &verified.peer);
        if verified.equal {
            let text = format!("verified at frame {frame}: what both nodes hold is equal");
            self.tell(Level::Info, &text);
            return self.tell_peer(false, text);
        }
        for disk in verified.disks.iter().filter(|disk| !disk.is_equal()) {
            let places: Vec<String> = disk.ranges.iter().take(3).map(Range::to_string).collect();
            let more = disk.ranges.len().saturating_sub(places.len());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let text = |here: &str, there: &str| {
                format!(
                    "disk {} is not equal at both nodes at frame {frame}: {} bytes differ, {} are \
                     damaged at {here}, {} at {there}; {}{more}",
                    disk.name,
                    disk.differing_bytes,
                    disk.unreadable_here_bytes,
                    disk.unreadable_there_bytes,
                    places.join(", ")
                )
            };
            self.tell(Level::Alert, &text("this node", peer));
            self.tell_peer(true, text(self.context.config().name.as_str(), "this node"));
        }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {} ({})", self.length, self.start, self.what)
    }
}
