//! Who may open a socket: root, and the members of one system group.

use std::path::Path;

use rustix::fs::{Gid, Mode};

use crate::error::{Failure, Kind, Result};

/// Lets only root, and the members of `group` if one is named, open the socket at `path`.
///
/// # Errors
/// When there is no such group, or permissions cannot be set.
pub fn restrict(path: &Path, group: Option<&str>) -> Result<()> {
    let failed = |error: rustix::io::Errno| {
        Failure::new(Kind::Internal, format!("permissions of {}: {error}", path.display()))
    };
    let mode = match group {
        None => Mode::RUSR | Mode::WUSR,
        Some(name) => {
            let gid = gid_of(name)?;
            rustix::fs::chown(path, None, Some(gid)).map_err(failed)?;
            Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP
        }
    };
    rustix::fs::chmod(path, mode).map_err(failed)
}

/// The number of a system group.
///
/// # Errors
/// When there is none of that name.
pub fn gid_of(name: &str) -> Result<Gid> {
    let file = std::fs::read_to_string("/etc/group")
        .map_err(|error| Failure::internal(format!("reading /etc/group: {error}")))?;
    let number = file.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == name;
        let number = fields.nth(1)?.parse::<u32>().ok()?;
        found.then_some(number)
    });
    number.map(Gid::from_raw).ok_or_else(|| {
        Failure::invalid(format!("there is no system group {name}; make it with: groupadd {name}"))
    })
}
