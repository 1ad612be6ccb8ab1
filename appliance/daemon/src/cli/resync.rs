//! The command that has a replica compared with the production node's copy.

use super::client::{Client, segment};
use super::commands::Out;
use crate::api::ResyncRequest;
use crate::error::{Failure, Result};
use crate::fleet::SeedRecord;
use crate::group::GroupStatus;

/// Asks for it, or takes that back.
pub(super) async fn resync(
    client: &Client,
    out: &Out,
    name: &str,
    seeds: &[String],
    cancel: bool,
) -> Result<()> {
    let path = format!("/v1/groups/{}/resync", segment(name)?);
    if cancel {
        let group: GroupStatus = client.delete(&path).await?;
        out.show(&group, |group| format!("group {} is replicated as before", group.name));
        return Ok(());
    }
    let seeds = seeds.iter().map(|seed| parse(seed)).collect::<Result<Vec<_>>>()?;
    let group: GroupStatus = client.post(&path, &ResyncRequest { seeds }).await?;
    out.show(&group, told);
    Ok(())
}

fn told(group: &GroupStatus) -> String {
    let name = &group.name;
    let when = match &group.peer {
        Some(peer) if group.paused => {
            format!("when the group is resumed here, and {peer} is connected")
        }
        Some(peer) => format!("as soon as {peer} offers the group, now if it is connected"),
        None => "as soon as the group has a peer".into(),
    };
    format!(
        "the replica of group {name} is compared with the production node's copy {when}; what \
         differs is sent. srn group show {name} tells how far it is; srn group resync {name} --cancel \
         takes it back"
    )
}

/// `[DISK=]FILE|NBD-URI`.
fn parse(text: &str) -> Result<SeedRecord> {
    let (disk, from) = match text.split_once('=') {
        Some((disk, from)) if !disk.contains(['/', ':']) => (Some(disk.to_owned()), from),
        _ => (None, text),
    };
    if from.is_empty() {
        return Err(Failure::invalid(format!("{text}: say [DISK=]FILE or [DISK=]NBD-URI")));
    }
    if from.contains("://") {
        return Ok(SeedRecord { disk, from: from.to_owned() });
    }
    // The daemon has another working directory.
    let path =
        std::path::absolute(from).map_err(|error| Failure::invalid(format!("{from}: {error}")))?;
    let path = path.into_os_string().into_string();
    let from = path.map_err(|_| Failure::invalid(format!("{from}: not UTF-8")))?;
    Ok(SeedRecord { disk, from })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_may_name_its_disk() {
        let parsed = |text: &str| parse(text).map(|seed| (seed.disk, seed.from)).ok();
        let disk = Some("sda".to_owned());
        assert_eq!(parsed("sda=/b/x"), Some((disk.clone(), "/b/x".to_owned())));
        assert_eq!(parsed("/b/a=x"), Some((None, "/b/a=x".to_owned())));
        let uri = "nbd+unix:///disk?socket=/s";
        assert_eq!(parsed(uri), Some((None, uri.to_owned())));
        assert_eq!(parsed(&format!("sda={uri}")), Some((disk, uri.to_owned())));
        assert_eq!(parsed("sda="), None);
    }
}
