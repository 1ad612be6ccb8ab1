//! Replacing a file so that after a crash there is the old one or the new one, whole.
//!
//! The order is the point: the content is durable before the name points to it, and the name is
//! durable before anyone is told.

use std::io::IoSlice;
use std::path::Path;

use srn_core::mutants::{self, Mutant};

use crate::error::{Doing, Result};
use crate::io::{Access, Fs, Volume};

/// Makes `dir/name` hold `bytes`, durably, replacing what was there.
///
/// # Errors
/// As the volume says; on a full disk nothing has changed.
pub fn replace(volume: &Volume, dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let temporary = dir.join(format!("{name}.tmp"));
    let written = write_new(volume, &temporary, bytes);
    if written.is_err() {
        let _ = volume.remove(&temporary);
    }
    written?;
    let doing = || format!("replacing {}", dir.join(name).display());
    volume.rename(&temporary, &dir.join(name)).doing(doing)?;
    if mutants::is(Mutant::ManifestDirectoryNotSynced) {
        return Ok(());
    }
    volume.sync_dir(dir).doing(doing)
}

fn write_new(volume: &Volume, path: &Path, bytes: &[u8]) -> Result<()> {
    let doing = || format!("writing {}", path.display());
    // Left behind by a crash.
    let _ = volume.remove(path);
    let file = volume.create(path, Access::Buffered).doing(doing)?;
    file.write_at(&[IoSlice::new(bytes)], 0, false).doing(doing)?;
    if mutants::is(Mutant::ManifestNotSynced) {
        return Ok(());
    }
    file.sync().doing(doing)
}

/// Reads all of a file of at most `max` bytes.
///
/// # Errors
/// As the volume says; an `Io` error of kind `FileTooLarge` beyond `max`.
pub fn read(volume: &Volume, path: &Path, max: u64) -> Result<Vec<u8>> {
    let doing = || format!("reading {}", path.display());
    let file = volume.open(path, Access::Buffered).doing(doing)?;
    let len = file.size().doing(doing)?;
    if len > max {
        return Err(std::io::Error::from(std::io::ErrorKind::FileTooLarge)).doing(doing);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let read = file.read_at(&mut bytes, 0).doing(doing)?;
    bytes.truncate(read);
    Ok(bytes)
}
