//! What is known to be damaged, as one point in time sees it.

use std::sync::Arc;

use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_store::StoreError;
use srn_store::group::View;
use srn_store::group::damage::{Damage, DamagedPart};

use super::{Group, idle};
use crate::error::Result;
use crate::group::integrity::DamageStatus;

/// Sectors read at once.
const STEP: u64 = 128;

/// Extents that are looked at for one stretch of damaged frames.
const EXTENTS_MAX: usize = 10_000;

impl Group {
    /// What is known to be damaged and cannot be read at a point. What is damaged elsewhere in the history,
    /// or was written again before the point, is not.
    ///
    /// # Errors
    /// As the volume says.
    pub async fn damage_at(self: &Arc<Self>, view: View) -> Result<Vec<DamageStatus>> {
        let known = self.integrity.damage().clone();
        if known.is_empty() {
            return Ok(Vec::new());
        }
        let this = self.clone();
        idle::run(move || {
            let mut seen = Vec::new();
            for damage in known {
                if this.is_seen(&damage, &view)? {
                    seen.push(this.describe(&damage, true));
                }
            }
            Ok(seen)
        })
        .await?
    }

    fn is_seen(&self, damage: &Damage, view: &View) -> Result<bool> {
        let extents = match damage.part {
            DamagedPart::Base { disk, extent } | DamagedPart::Layer { disk, extent, .. } => {
                vec![(disk, extent)]
            }
            DamagedPart::Frames { epoch, first, last } => {
                match self.store.sectors_in(epoch, first, last, EXTENTS_MAX) {
                    Ok(extents) if extents.len() < EXTENTS_MAX => extents,
                    _ => return Ok(true),
                }
            }
            // Nobody knows what is where.
            DamagedPart::Index { .. } => return Ok(true),
        };
        for (disk, extent) in extents {
            if !reads(view, disk, extent)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether all of an extent that is on the disk at that point can be read.
fn reads(view: &View, disk: DiskNo, extent: Extent) -> Result<bool> {
    let sectors = view.catalog().disks.get(&disk).map_or(0, |disk| disk.sectors);
    let Some(extent) = extent.intersect(&Extent::new(0, sectors)) else { return Ok(true) };
    let mut content = vec![0; usize::try_from(Extent::new(0, STEP).bytes()).unwrap_or(0)];
    let mut at = extent.start;
    while at < extent.end() {
        let part = Extent::new(at, STEP.min(extent.end() - at));
        let out = content.get_mut(..usize::try_from(part.bytes()).unwrap_or(0)).unwrap_or_default();
        match view.read(disk, part, out) {
            Ok(()) => at = part.end(),
            Err(StoreError::Corrupt(_)) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}
