//! A recovery from a point in which something is known to be damaged: only when a person accepts that, and
//! then it is written down. Nothing is made up: reads of what is damaged fail in the recovered server.

use std::sync::Arc;

use super::Recoveries;
use super::start::RecoveryRequest;
use crate::error::{Failure, Kind, Result};
use crate::fleet::Level;
use crate::group::Group;
use crate::group::integrity::DamageStatus;
use crate::point::Point;

/// Damaged things that one message names.
const NAMED: usize = 20;

impl Recoveries {
    /// What is known to be damaged in the point that is asked for.
    ///
    /// # Errors
    /// When something is and that is not accepted; nothing was done then.
    pub(super) async fn damage_in(
        &self,
        group: &Arc<Group>,
        request: &RecoveryRequest,
    ) -> Result<Vec<DamageStatus>> {
        if group.damage_status().is_empty() {
            return Ok(Vec::new());
        }
        let damage = group.damage_at(self.view_of(group, request)?).await?;
        if damage.is_empty() || request.accept_damage {
            return Ok(damage);
        }
        Err(Failure::new(
            Kind::Storage,
            format!(
                "the point has damage in it, which nobody could repair so far: {}; choose another one \
                 (srn history {}), or go on with --accept-damage: reads of what is damaged fail in the \
                 recovered server",
                words(&damage),
                group.name()
            ),
        ))
    }

    /// Writes down that a point was recovered with damage in it: an event, and a note if it is a
    /// checkpoint.
    pub(super) async fn record_damage(
        &self,
        group: &Arc<Group>,
        point: &Point,
        damage: &[DamageStatus],
        test: bool,
    ) {
        if damage.is_empty() {
            return;
        }
        let name = group.name();
        let what = if test { "test failover" } else { "failover" };
        let text = format!("{what} from {} with accepted damage: {}", point.words, words(damage));
        self.context.event(Level::Alert, Some(&name), &text);
        let (store, seq) = (group.store().clone(), point.seq);
        let noted = tokio::task::spawn_blocking(move || {
            let all = store.checkpoints()?;
            let Some(found) = all.iter().find(|found| found.position.seq == seq) else {
                return Ok(());
            };
            store.change_note(found.mark.id, |note| note.damage_accepted = true)
        });
        match noted.await {
            Ok(Ok(())) => {}
            // The event has it.
            Ok(Err(error)) => log::error!("group {name}: noting accepted damage: {error}"),
            Err(error) => log::error!("group {name}: noting accepted damage: {error}"),
        }
    }
}

fn words(damage: &[DamageStatus]) -> String {
    let named: Vec<&str> = damage.iter().take(NAMED).map(|damage| &*damage.what).collect();
    let more = if damage.len() > NAMED { ", and more" } else { "" };
    format!("{}{more}", named.join(", "))
}
