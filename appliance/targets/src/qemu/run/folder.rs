//! A run directory and the process started in it: what is made, found and taken away again.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{QEMU_LOG, RunError, file_error, record};
use crate::qemu::host::{Missing, Ovmf};
use crate::qemu::machine::{
    MachineSpec, QMP_SOCKET, SERIAL_LOG, SOCKET_PATH_BYTES_MAX, SpecError, UEFI_VARIABLES,
};
use crate::qemu::process::{Process, working_in};

/// How many lines, and bytes, of a program's last words are kept.
const LAST_WORDS_LINES: usize = 20;
const LAST_WORDS_BYTES: u64 = 4096;

/// Makes the directory if need be, ours alone, and gives its real path.
pub(super) fn make_folder(folder: &Path) -> Result<PathBuf, RunError> {
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(file_error("make the run directory", folder)(error));
        }
        _ => {}
    }
    let folder = folder.canonicalize().map_err(file_error("find", folder))?;
    // Whoever reaches the control socket owns the machine.
    fs::set_permissions(&folder, Permissions::from_mode(0o700))
        .map_err(file_error("protect", &folder))?;
    let socket = folder.join(QMP_SOCKET);
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(SpecError::SocketPathTooLong(socket).into());
    }
    Ok(folder)
}

/// Writes the files QEMU will look for.
pub(super) fn prepare(
    spec: &MachineSpec,
    ovmf: Option<&Ovmf>,
    folder: &Path,
) -> Result<(), RunError> {
    // A socket left by an earlier machine would be taken for this one's.
    match fs::remove_file(folder.join(QMP_SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(file_error("remove", &folder.join(QMP_SOCKET))(error));
        }
        _ => {}
    }
    for (index, string) in spec.smbios_strings.iter().enumerate() {
        write_new(&folder.join(MachineSpec::smbios_file(index)), string.as_bytes())?;
    }
    for log in [SERIAL_LOG, QEMU_LOG] {
        write_new(&folder.join(log), b"")?;
    }
    if let Some(ovmf) = ovmf {
        // Always fresh: a store in which an earlier boot failed begins with the firmware's shell.
        let variables = fs::read(&ovmf.variables).map_err(file_error("read", &ovmf.variables))?;
        write_new(&folder.join(UEFI_VARIABLES), &variables)?;
    }
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    let options = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = options.and_then(|mut file| file.write_all(bytes));
    written.map_err(file_error("write", path))
}

/// Starts QEMU so that nothing of it depends on us: its own process group (a terminal's signals
/// pass by), no descriptors and no environment of ours (which may hold credentials).
pub(super) fn spawn(
    qemu: &Path,
    arguments: &[OsString],
    folder: &Path,
) -> Result<Process, RunError> {
    let path = folder.join(QEMU_LOG);
    let log = OpenOptions::new().append(true).open(&path).map_err(file_error("open", &path))?;
    let stdout = log.try_clone().map_err(file_error("open", &path))?;
    let child = Command::new(qemu)
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(log)
        .process_group(0)
        .spawn();
    let child = child.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            Missing { what: qemu.display().to_string(), package: "qemu-system-x86" }.into()
        }
        _ => RunError::Process { doing: "start", source },
    })?;
    Process::of_child(child).map_err(|source| RunError::Process { doing: "watch", source })
}

/// The QEMU that works in this run directory, if there is one.
pub(super) fn find_unrecorded(folder: &Path) -> io::Result<Option<Process>> {
    for pid in working_in(folder)? {
        // An administrator's shell may stand in the directory too.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let ours = format!("socket,id=qmp,path={QMP_SOCKET},server=on,wait=off");
        if line.split(|byte| *byte == 0).any(|argument| argument == ours.as_bytes()) {
            return match Process::open(pid) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map(Some),
            };
        }
    }
    Ok(None)
}

/// Takes our files out of the directory of a machine that did not start, and the directory with
/// them if it is empty then (the daemon may keep its sockets in it).
pub(super) fn forget(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = [QMP_SOCKET, SERIAL_LOG, QEMU_LOG, UEFI_VARIABLES, record::FILE];
        if ours.contains(&name.as_ref()) || name.starts_with("smbios-") {
            drop(fs::remove_file(entry.path()));
        }
    }
    drop(fs::remove_dir(folder));
}

/// The end of what a program wrote, at most 20 lines and 4 KiB; nothing if it cannot be read.
pub(in crate::qemu) fn last_words(log: &Path) -> Vec<String> {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LAST_WORDS_BYTES).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(LAST_WORDS_LINES);
    lines.into_iter().skip(from).map(str::to_owned).collect()
}
