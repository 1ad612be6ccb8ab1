//! What this host offers to run a machine with: QEMU and the UEFI firmware.
//!
//! It refuses to install anything: a missing tool is an error that names the Debian package.

use std::env;
use std::path::{Path, PathBuf};

/// The name QEMU is looked for under in `PATH`.
const QEMU: &str = "qemu-system-x86_64";

/// Where Debian's package `ovmf` puts the firmware (the 4 MiB build: Debian 12 and later carry
/// variables stores in this size only).
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// The programs and firmware of this host, as paths that existed when it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The program `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// The UEFI firmware, where it is installed; a BIOS machine needs none.
    pub ovmf: Option<Ovmf>,
}

/// The two files of a UEFI firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ovmf {
    /// The code, shared read-only by every machine.
    pub code: PathBuf,
    /// The empty store of variables, copied afresh for each machine.
    pub variables: PathBuf,
}

/// The operator: something is not installed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is missing: install the Debian package {package}")]
pub struct Missing {
    /// What was looked for.
    pub what: String,
    /// The Debian package that holds it.
    pub package: &'static str,
}

impl Host {
    /// Looks for QEMU in `PATH` and for the UEFI firmware where Debian puts it.
    ///
    /// # Errors
    /// [`Missing`] without QEMU. A missing firmware is an error only once it is asked for.
    pub fn find() -> Result<Self, Missing> {
        let path = env::var_os("PATH").unwrap_or_default();
        let qemu = env::split_paths(&path).map(|folder| folder.join(QEMU)).find(|p| p.is_file());
        let qemu =
            qemu.ok_or_else(|| Missing { what: QEMU.to_owned(), package: "qemu-system-x86" })?;
        Ok(Self { qemu, ovmf: Ovmf::at(OVMF_CODE.as_ref(), OVMF_VARIABLES.as_ref()).ok() })
    }

    /// The UEFI firmware.
    ///
    /// # Errors
    /// [`Missing`] when it is not installed.
    pub fn ovmf(&self) -> Result<&Ovmf, Missing> {
        self.ovmf.as_ref().ok_or_else(|| missing_ovmf(OVMF_CODE.as_ref()))
    }
}

impl Ovmf {
    /// The firmware at these two paths.
    ///
    /// # Errors
    /// [`Missing`] when one of them is not a file.
    pub fn at(code: &Path, variables: &Path) -> Result<Self, Missing> {
        for file in [code, variables] {
            if !file.is_file() {
                return Err(missing_ovmf(file));
            }
        }
        Ok(Self { code: code.to_owned(), variables: variables.to_owned() })
    }
}

fn missing_ovmf(file: &Path) -> Missing {
    Missing { what: format!("the UEFI firmware {}", file.display()), package: "ovmf" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_firmware_names_its_package() {
        let host = Host { qemu: PathBuf::from("/bin/true"), ovmf: None };
        let said = host.ovmf().unwrap_err().to_string();
        assert_eq!(
            said,
            "the UEFI firmware /usr/share/OVMF/OVMF_CODE_4M.fd is missing: \
             install the Debian package ovmf"
        );
        let nowhere = Path::new("/nonexistent/vars.fd");
        assert_eq!(Ovmf::at(Path::new("/etc/passwd"), nowhere), Err(missing_ovmf(nowhere)));
    }
}
