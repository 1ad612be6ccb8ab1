//! Reading everything that is held, on a schedule or when somebody asks, or when a read has met
//! damage; writing down what is damaged before anything is done about it; repairing it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use srn_core::limits::SECTOR;
use srn_core::time::Mono;
use srn_store::group::Scrub;
use srn_store::group::damage::{Damage, DamagedPart};

use super::{Group, Running, idle};
use crate::clock;
use crate::error::Result;
use crate::fleet::Level;

/// Between two attempts to repair what is known, or to look where a read has met damage, in
/// microseconds.
const AGAIN_US: u64 = 60_000_000;

/// Extents of lost content that are named.
const EXTENTS_MAX: usize = 100;

/// What a scrub has found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scrubbed {
    /// The group.
    pub group: String,
    /// Bytes looked at.
    pub bytes: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// What was found and has been repaired.
    pub repaired: Vec<DamageStatus>,
    /// What is damaged still.
    pub damaged: Vec<DamageStatus>,
}

/// Something damaged, as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageStatus {
    /// What, in words.
    pub what: String,
    /// The disk's name, where it is one disk's.
    pub disk: Option<String>,
    /// The parts of disks whose content is there, first byte and length, as far as that is known.
    pub extents: Vec<(String, u64, u64)>,
    /// Since when it is known, in RFC 3339.
    pub since: String,
}

/// A scrub that has been prepared.
#[derive(Debug)]
pub struct ScrubRun {
    running: Running,
    scrub: Scrub,
}

impl Group {
    /// Prepares to read everything that is held here.
    ///
    /// # Errors
    /// When something else is under way; storage failures.
    pub async fn prepare_scrub(self: &Arc<Self>) -> Result<ScrubRun> {
        let running = Running::begin(self, "scrub", 0)?;
        let store = self.store.clone();
        let scrub = idle::run(move || store.scrub()).await??;
        if let Some(work) = &mut *self.integrity.work() {
            work.total = scrub.total();
        }
        Ok(ScrubRun { running, scrub })
    }

    /// What is known to be damaged here.
    #[must_use]
    pub fn damage_status(&self) -> Vec<DamageStatus> {
        let damage = self.integrity.damage().clone();
        damage.iter().map(|damage| self.describe(damage, false)).collect()
    }

    /// Something damaged, in words; `exactly` also names the content that is lost, for which an index
    /// has to be read.
    pub(super) fn describe(&self, damage: &Damage, exactly: bool) -> DamageStatus {
        let catalog = self.catalog();
        let name_of = |no| {
            let disk = catalog.disks.get(&no);
            disk.map_or_else(|| format!("number {no}"), |disk| disk.name.clone())
        };
        let (what, disk, extents) = match damage.part {
            DamagedPart::Base { disk, extent } => {
                let name = name_of(disk);
                let (start, length) = (extent.start * SECTOR, extent.bytes());
                let what = format!("{length} bytes of disk {name} at {start}");
                (what, Some(name.clone()), vec![(name, start, length)])
            }
            DamagedPart::Frames { epoch, first, last } => {
                let found = if exactly {
                    self.store.sectors_in(epoch, first, last, EXTENTS_MAX).unwrap_or_default()
                } else {
                    Vec::new()
                };
                let extents = found
                    .into_iter()
                    .map(|(disk, extent)| (name_of(disk), extent.start * SECTOR, extent.bytes()));
                (format!("frames {first} to {last} of the log"), None, extents.collect())
            }
            DamagedPart::Layer { file, disk, extent } => {
                let name = name_of(disk);
                let (start, length) = (extent.start * SECTOR, extent.bytes());
                let what = format!("{length} bytes of disk {name} at {start} in layer file {file}");
                (what, Some(name.clone()), vec![(name, start, length)])
            }
            DamagedPart::Index { file } => (format!("index file {file}"), None, Vec::new()),
        };
        DamageStatus { what, disk, extents, since: clock::rfc3339(damage.since) }
    }

    /// Once a second: a scrub that is due, a repair that may be possible now.
    pub(in crate::group) fn look_after_integrity(self: &Arc<Self>) {
        self.tidy_integrity();
        let now = clock::mono();
        let tried = *self.tried();
        let rested = tried.is_none_or(|tried| now.since(tried) > AGAIN_US);
        if !rested || self.integrity.running.try_lock().is_err() {
            return;
        }
        let met = self.store.take_damage_seen();
        let known = !self.integrity.damage().is_empty() && self.session().is_some();
        if !(met || known || self.scrub_is_due()) {
            return;
        }
        *self.tried() = Some(now);
        let this = self.clone();
        tokio::spawn(async move {
            if met {
                this.tell(Level::Alert, "a read has met damage; everything is looked at now");
            }
            let done =
                if known && !met { this.repair_known().await } else { this.scrub_now().await };
            if let Err(error) = done {
                log::warn!("group {}: looking for damage: {error}", this.name());
            }
        });
    }

    fn tried(&self) -> std::sync::MutexGuard<'_, Option<Mono>> {
        self.integrity.tried.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn scrub_is_due(&self) -> bool {
        let record = self.settings();
        if record.scrub_every_s == 0 {
            return false;
        }
        let now = clock::wall().0;
        let Some(last) = record.scrubbed_at else {
            // What was just made was just written: it is due after a whole period.
            if let Err(error) = self.change_settings(|record| record.scrubbed_at = Some(now)) {
                log::warn!("group {}: keeping the time of a scrub: {error}", self.name());
            }
            return false;
        };
        let every = i64::try_from(record.scrub_every_s.saturating_mul(1_000_000));
        now.saturating_sub(last) >= every.unwrap_or(i64::MAX)
    }

    async fn scrub_now(self: &Arc<Self>) -> Result<()> {
        self.prepare_scrub().await?.run().await.map(drop)
    }

    /// Tries again to repair what is known to be damaged.
    async fn repair_known(self: &Arc<Self>) -> Result<()> {
        let _running = Running::begin(self, "repair", 0)?;
        let known = self.integrity.damage().clone();
        self.repair_and_tell(known).await.map(drop)
    }

    /// Writes down what is damaged, repairs what can be repaired, says both at both nodes. Gives what
    /// was repaired and what was not.
    async fn repair_and_tell(
        self: &Arc<Self>,
        damage: Vec<Damage>,
    ) -> Result<(Vec<DamageStatus>, Vec<DamageStatus>)> {
        let before = self.integrity.damage().clone();
        // First: whatever becomes of the repair, it stays known.
        self.keep_damage(&damage).await?;
        let mut repaired = Vec::new();
        let mut left = Vec::new();
        for damage in damage {
            let is_news = !before.iter().any(|known| known.part.covers(&damage.part));
            let status = self.described(damage).await?;
            match self.repair(damage.part).await {
                Ok(from) => {
                    let text = format!("{} was damaged and is repaired{from}", status.what);
                    self.tell(Level::Warning, &text);
                    self.tell_peer(false, text);
                    repaired.push(status);
                }
                Err(why) => {
                    if is_news {
                        let text = format!(
                            "{} is damaged: {why}; what is damaged cannot be recovered from here \
                             until it is repaired (with it: --accept-damage)",
                            status.what
                        );
                        self.tell(Level::Alert, &text);
                        self.tell_peer(true, text);
                    }
                    left.push((damage, status));
                }
            }
        }
        let (still, statuses): (Vec<Damage>, Vec<DamageStatus>) = left.into_iter().unzip();
        self.keep_damage(&still).await?;
        *self.looked() = Some(clock::mono());
        self.maintainer.wake();
        self.changed.notify_waiters();
        Ok((repaired, statuses))
    }

    fn looked(&self) -> std::sync::MutexGuard<'_, Option<Mono>> {
        self.integrity.looked.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Whether everything was looked at, or repairs were tried, since then, and something is damaged still:
    /// what maintenance meets of it is known, and nobody has it now.
    pub(in crate::group) fn is_damaged_for_good(&self, since: Mono) -> bool {
        let looked = *self.looked();
        looked.is_some_and(|looked| looked > since) && !self.integrity.damage().is_empty()
    }

    async fn described(self: &Arc<Self>, damage: Damage) -> Result<DamageStatus> {
        let this = self.clone();
        idle::run(move || this.describe(&damage, true)).await
    }

    async fn keep_damage(self: &Arc<Self>, damage: &[Damage]) -> Result<()> {
        if *self.integrity.damage() == damage {
            return Ok(());
        }
        let (store, list) = (self.store.clone(), damage.to_vec());
        *self.integrity.damage() = list.clone();
        idle::run(move || store.set_damage(&list)).await??;
        Ok(())
    }
}

impl ScrubRun {
    /// Reads everything, repairs what can be repaired. Dropping it ends it.
    ///
    /// # Errors
    /// Storage failures. Damage is no error.
    pub async fn run(self) -> Result<Scrubbed> {
        let Self { running, mut scrub } = self;
        let group = running.group.clone();
        let began = clock::mono();
        let mut bytes = 0;
        let mut parts: Vec<DamagedPart> = Vec::new();
        loop {
            let (back, step) = idle::run(move || {
                let step = scrub.step();
                (scrub, step)
            })
            .await?;
            scrub = back;
            let Some(step) = step? else { break };
            bytes += step.bytes;
            running.done(step.bytes);
            parts.extend(step.damaged);
        }
        let known = group.integrity.damage().clone();
        let since = |part: &DamagedPart| {
            let before = known.iter().find(|known| known.part.covers(part));
            before.map_or_else(clock::wall, |known| known.since)
        };
        parts.truncate(srn_store::group::damage::DAMAGE_MAX);
        let damage: Vec<Damage> =
            parts.into_iter().map(|part| Damage { part, since: since(&part) }).collect();
        let (repaired, damaged) = group.repair_and_tell(damage).await?;
        group.change_settings(|record| record.scrubbed_at = Some(clock::wall().0))?;
        let seconds = clock::mono().since(began) as f64 / 1e6;
        let text = format!(
            "scrubbed: {} looked at in {seconds:.0} s; {} repaired, {} damaged still",
            crate::config::Size(bytes),
            repaired.len(),
            damaged.len()
        );
        group.tell(Level::Info, &text);
        Ok(Scrubbed { group: group.name(), bytes, seconds, repaired, damaged })
    }
}
