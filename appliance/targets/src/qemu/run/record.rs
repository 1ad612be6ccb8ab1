//! What is written down about a machine: `machine.json` in its run directory.
//!
//! It need not survive a power cut (the machine does not either), so nothing is synced; it must
//! survive the daemon's death at any instant, so it is only ever put in place whole.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{RunError, file_error};
use crate::qemu::machine::MachineSpec;
use crate::qemu::process::{Exit, Identity};

/// The file's name.
pub(super) const FILE: &str = "machine.json";

/// The version of its form.
const VERSION: u32 = 1;

/// The longest record that is read, in bytes: far more than the largest spec needs.
const BYTES_MAX: u64 = 1 << 20;

/// What is written down about a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// What was asked for.
    pub spec: MachineSpec,
    /// When.
    pub started_at: SystemTime,
    /// The process; absent when the daemon died before it could write that down.
    pub process: Option<Identity>,
    /// Its end, once one was seen.
    pub ended: Option<Ended>,
}

/// The end of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// How.
    pub exit: Exit,
    /// When it was seen; the end itself may have been earlier.
    pub seen_at: SystemTime,
}

impl Record {
    /// A machine about to be started.
    pub(super) fn new(spec: MachineSpec) -> Self {
        let started_at = SystemTime::now();
        Self { version: VERSION, spec, started_at, process: None, ended: None }
    }

    /// The same, with the process that it became.
    pub(super) fn started_as(self, process: Identity) -> Self {
        Self { process: Some(process), ..self }
    }

    /// Puts it where there is none yet.
    pub(super) fn create(&self, folder: &Path) -> Result<(), RunError> {
        let path = folder.join(FILE);
        let file = self.write_beside(folder)?;
        match file.persist_noclobber(&path) {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                Err(RunError::Taken(folder.to_owned()))
            }
            Err(error) => Err(file_error("create", &path)(error.error)),
        }
    }

    /// Puts it in the place of the one before.
    pub(super) fn replace(&self, folder: &Path) -> Result<(), RunError> {
        let path = folder.join(FILE);
        let replaced = self.write_beside(folder)?.persist(&path);
        replaced.map(drop).map_err(|error| file_error("replace", &path)(error.error))
    }

    fn write_beside(&self, folder: &Path) -> Result<tempfile::NamedTempFile, RunError> {
        let path = folder.join(FILE);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| RunError::Record { path: path.clone(), reason: error.to_string() })?;
        let mut file =
            tempfile::NamedTempFile::new_in(folder).map_err(file_error("write", &path))?;
        file.write_all(&text).map_err(file_error("write", &path))?;
        Ok(file)
    }

    pub(super) fn read(folder: &Path) -> Result<Self, RunError> {
        let path = folder.join(FILE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RunError::NoMachine(folder.to_owned()));
            }
            other => other.map_err(file_error("open", &path))?,
        };
        let mut text = Vec::new();
        file.take(BYTES_MAX + 1).read_to_end(&mut text).map_err(file_error("read", &path))?;
        let refused = |reason: String| RunError::Record { path: path.clone(), reason };
        if text.len() as u64 > BYTES_MAX {
            return Err(refused("it is longer than any record".to_owned()));
        }
        let record: Self =
            serde_json::from_slice(&text).map_err(|error| refused(error.to_string()))?;
        if record.version != VERSION {
            return Err(refused(format!("its version is {}", record.version)));
        }
        Ok(record)
    }
}
