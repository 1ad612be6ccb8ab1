//! Filling a served disk from an NBD export before it is used: many reads at once, holes skipped.

use std::sync::Arc;

use bytes::Bytes;
use srn_core::bytes::is_zero;
use srn_core::extent::Extent;
use srn_core::ids::DiskNo;
use srn_core::limits::{FRAME_PAYLOAD_MAX, SECTOR};
use srn_nbd::client::{Client, ConnectOptions, Uri};
use srn_store::group::{Change, OwnedRecord, Sums};
use tokio::task::JoinSet;

use crate::error::{Failure, Result};
use crate::group::{CopyProgress, Group};

/// Reads under way at once.
const READS: usize = 16;

/// Bytes of one read.
const READ_BYTES: u64 = FRAME_PAYLOAD_MAX as u64;

/// Bytes of block status asked for at once.
const STATUS_BYTES: u32 = 1 << 30;

/// Connects to an export, and says how large it is.
///
/// # Errors
/// When it cannot be reached or is not what a disk can be.
pub async fn connect(uri: &str) -> Result<(Client, u64)> {
    let parsed: Uri =
        uri.parse().map_err(|error| Failure::invalid(format!("{uri} is no NBD URI: {error}")))?;
    let client = Client::connect(&parsed, &ConnectOptions::default())
        .await
        .map_err(|error| Failure::unreachable(format!("{uri}: {error}")))?;
    let size = client.export().size;
    Ok((client, size))
}

/// Copies all content of `client`'s export into a disk of `group`, whose content until then is
/// marked as a mixture.
///
/// # Errors
/// When reading or appending fails: then the disk stays marked.
pub async fn copy_from(client: Client, group: &Arc<Group>, disk: DiskNo, size: u64) -> Result<()> {
    let mut reads: JoinSet<Result<(u64, Bytes)>> = JoinSet::new();
    let began = std::time::Instant::now();
    let mut done = 0;
    let mut at = 0;
    while at < size {
        let ask = u64::from(STATUS_BYTES).min(size - at);
        for (start, length, empty) in allocation(&client, at, ask).await? {
            let mut start = start;
            let end = start + length;
            while start < end {
                let length = if empty { end - start } else { READ_BYTES.min(end - start) };
                if empty {
                    done += length;
                } else {
                    if reads.len() >= READS {
                        done += take(&mut reads, group, disk).await?;
                    }
                    let client = client.clone();
                    let from = start;
                    reads.spawn(async move { read(&client, from, length).await });
                }
                start += length;
                let seconds = began.elapsed().as_secs_f64().max(0.001);
                let rate = (done as f64 / seconds) as u64;
                group.copy_progress(disk, Some(CopyProgress { done, total: size, rate }));
            }
            at = end;
        }
    }
    while !reads.is_empty() {
        take(&mut reads, group, disk).await?;
    }
    group.copy_progress(disk, None);
    let _ = client.disconnect().await;
    group.end_resync(disk).await
}

/// The spans of a range: start, length, whether it reads as zero.
async fn allocation(client: &Client, at: u64, length: u64) -> Result<Vec<(u64, u64, bool)>> {
    let known = client.contexts().iter().any(|context| context.name == "base:allocation");
    if !known {
        return Ok(vec![(at, length, false)]);
    }
    let asked = u32::try_from(length).unwrap_or(STATUS_BYTES);
    let spans = client
        .allocation(at, asked)
        .await
        .map_err(|error| Failure::unreachable(format!("asking what is allocated: {error}")))?;
    let mut start = at;
    let mut found = Vec::new();
    for span in spans {
        let length = span.length.min(at + length - start);
        if length > 0 {
            found.push((start, length, span.zero));
            start += length;
        }
    }
    if found.is_empty() { Ok(vec![(at, length, false)]) } else { Ok(found) }
}

async fn read(client: &Client, from: u64, length: u64) -> Result<(u64, Bytes)> {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    let data = client
        .read(from, length)
        .await
        .map_err(|error| Failure::unreachable(format!("reading at {from}: {error}")))?;
    Ok((from, data))
}

/// Appends the next read that is done; returns its length.
async fn take(
    reads: &mut JoinSet<Result<(u64, Bytes)>>,
    group: &Arc<Group>,
    disk: DiskNo,
) -> Result<u64> {
    let Some(read) = reads.join_next().await else { return Ok(0) };
    let (from, data) =
        read.map_err(|error| Failure::internal(format!("a task ended: {error}")))??;
    let length = data.len() as u64;
    let change = if is_zero(&data) {
        let extent = Extent::new(from / SECTOR, length / SECTOR);
        Change::Record(OwnedRecord::Zero(disk, extent))
    } else {
        let sums = Sums::of(&data);
        Change::Write { disk, start: from / SECTOR, data, sums }
    };
    group
        .engine()
        .append(vec![change])
        .await
        .map_err(|closed| Failure::refused(closed.to_string()))?;
    Ok(length)
}
