//! Proof that KVM works here, before a recovery depends on it.
//!
//! That `/dev/kvm` exists and opens proves little: inside some virtual machines it is there and the
//! guest never runs one instruction. So a sector of ours is booted with it, and only when that
//! sector has answered within a deadline is KVM used. A QEMU that hangs is killed; if even that
//! takes long, it is left to a task in the background and the caller goes on.
//!
//! It refuses to remember: the verdict is a value, and the caller decides how long it holds (one
//! boot of the host is a good answer).

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::machine::Accelerator;
use super::process::{Exit, Process};
use super::run::last_words;

/// How long a sector that takes 0.1 s under emulation may take. A host under load starts QEMU
/// slowly; hanging for good is what this is about.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// How long to wait for a killed QEMU before it is left to the background.
const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// What the sector writes to QEMU's debug-exit port.
const ANSWER: u8 = 0x2a;

/// QEMU ends with twice the value plus one.
const ANSWER_EXIT_CODE: i32 = ANSWER as i32 * 2 + 1;

/// The sector, loaded by the BIOS at 0000:7c00 in real mode:
///
/// ```text
/// b0 2a     mov  al, 2ah
/// e6 f4     out  0f4h, al     ; isa-debug-exit: QEMU ends with code 2 * 2ah + 1
/// f4        hlt               ; never reached
/// eb fd     jmp  short -3
/// ```
const CODE: &[u8] = &[0xb0, ANSWER, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];

/// Whether KVM may be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A guest has run with it.
    Kvm,
    /// It cannot be used; machines run by emulation.
    Tcg {
        /// Why, in words for an operator.
        reason: String,
    },
}

impl Verdict {
    /// The accelerator to start machines with.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        match self {
            Self::Kvm => Accelerator::Kvm,
            Self::Tcg { .. } => Accelerator::Tcg,
        }
    }
}

/// Us or the disk: the question could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("{doing} for the kvm probe")]
pub struct ProbeError {
    doing: &'static str,
    #[source]
    source: io::Error,
}

/// Boots the sector with KVM and says whether it answered within `deadline`.
///
/// Returns within about `deadline` plus one second, whatever QEMU and the kernel do.
///
/// # Errors
/// [`ProbeError`] when the scratch files cannot be written or QEMU cannot be started at all.
pub async fn probe(qemu: &Path, deadline: Duration) -> Result<Verdict, ProbeError> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(Verdict::Tcg { reason: format!("/dev/kvm cannot be opened: {error}") });
    }
    let folder =
        tempfile::tempdir().map_err(|source| ProbeError { doing: "make a folder", source })?;
    Ok(match boot_sector(qemu, Accelerator::Kvm, CODE, folder.path(), deadline).await? {
        Ok(()) => Verdict::Kvm,
        Err(why) => Verdict::Tcg { reason: format!("a test guest with kvm {why}") },
    })
}

/// Boots a sector with this code, working in `folder`; the inner error says what it did instead of
/// answering.
async fn boot_sector(
    qemu: &Path,
    accelerator: Accelerator,
    code: &[u8],
    folder: &Path,
    deadline: Duration,
) -> Result<Result<(), String>, ProbeError> {
    let failed = |doing| move |source| ProbeError { doing, source };
    let errors = folder.join("errors");
    write_disk(&folder.join("disk"), code).map_err(failed("write a boot sector"))?;
    let stderr = File::create(&errors).map_err(failed("create a file"))?;
    let child = Command::new(qemu)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-machine", "pc", "-m", "16"])
        .args(["-accel", if accelerator == Accelerator::Kvm { "kvm" } else { "tcg" }])
        .args(["-blockdev", "driver=file,node-name=disk,filename=disk"])
        .args(["-device", "ide-hd,drive=disk,bootindex=0"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(failed("start qemu"))?;
    let process = Process::of_child(child).map_err(failed("watch qemu"))?;
    let exit = match tokio::time::timeout(deadline, process.exit()).await {
        Ok(exit) => exit.map_err(failed("wait for qemu"))?,
        Err(_) => {
            put_down(process).await.map_err(failed("kill qemu"))?;
            return Ok(Err(format!("did not answer within {} s", deadline.as_secs_f32())));
        }
    };
    if exit == Exit::Code(ANSWER_EXIT_CODE) {
        return Ok(Ok(()));
    }
    let words = last_words(&errors);
    let words = words.last().map_or("without a word", String::as_str);
    Ok(Err(format!("ended by {exit:?}: {words}")))
}

/// Kills; what does not die at once is reaped by a task of its own, so that no zombie is left and
/// nobody waits.
async fn put_down(process: Process) -> io::Result<()> {
    if process.kill_and_wait(KILL_PATIENCE).await?.is_none() {
        log::warn!(
            "qemu process {} hangs in the kernel after the kvm probe",
            process.identity().pid
        );
        tokio::spawn(async move { process.exit().await });
    }
    Ok(())
}

/// A disk of 1 MiB, almost all of it a hole: a BIOS is unsure about disks of one sector.
fn write_disk(path: &Path, code: &[u8]) -> io::Result<()> {
    let mut sector = [0_u8; 512];
    for (place, byte) in sector.iter_mut().zip(code) {
        *place = *byte;
    }
    if let Some(signature) = sector.last_chunk_mut() {
        *signature = [0x55, 0xaa];
    }
    let mut disk = File::create(path)?;
    disk.write_all(&sector)?;
    disk.set_len(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::host::Host;
    use crate::qemu::process::working_in;

    fn host() -> Host {
        Host::find().unwrap_or_else(|missing| panic!("{missing}"))
    }

    async fn boot(qemu: &Path, code: &[u8], deadline: Duration) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let answer = boot_sector(qemu, Accelerator::Tcg, code, folder.path(), deadline).await;
        let folder = folder.path().canonicalize().unwrap();
        assert!(working_in(&folder).unwrap().is_empty(), "the child is dead and reaped");
        answer.unwrap()
    }

    #[tokio::test]
    async fn the_sector_answers_under_emulation() {
        assert_eq!(boot(&host().qemu, CODE, Duration::from_secs(60)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_program_that_ends_otherwise_is_no_proof() {
        let answer = boot(Path::new("/bin/false"), CODE, Duration::from_secs(60)).await;
        assert_eq!(answer, Err("ended by Code(1): without a word".to_owned()));
        let wrong_value = [0xb0, ANSWER + 1, 0xe6, 0xf4];
        let answer = boot(&host().qemu, &wrong_value, Duration::from_secs(60)).await;
        assert_eq!(answer, Err("ended by Code(87): without a word".to_owned()));
    }

    #[tokio::test]
    async fn a_guest_that_hangs_is_killed() {
        let hang = [0xeb, 0xfe];
        let answer = boot(&host().qemu, &hang, Duration::from_millis(300)).await;
        assert_eq!(answer, Err("did not answer within 0.3 s".to_owned()));
    }

    /// On a host where KVM works, and on one where it hangs or is missing, the question is answered
    /// in bounded time; with emulation the reason is given.
    #[tokio::test]
    async fn the_question_is_always_answered() {
        let qemu = host().qemu;
        let verdict = tokio::time::timeout(Duration::from_secs(60), probe(&qemu, DEADLINE));
        match verdict.await.expect("never blocks its caller").unwrap() {
            Verdict::Kvm => {}
            Verdict::Tcg { reason } => assert!(reason.contains("kvm"), "{reason}"),
        }
    }

    #[test]
    fn a_verdict_can_be_kept() {
        let verdict = Verdict::Tcg { reason: "no".to_owned() };
        let text = serde_json::to_string(&verdict).unwrap();
        assert_eq!(serde_json::from_str::<Verdict>(&text).unwrap(), verdict);
        assert_eq!(verdict.accelerator(), Accelerator::Tcg);
    }
}
