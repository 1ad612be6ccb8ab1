//! The directory that is looked at: which groups it holds, and that no daemon writes to it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;
use srn_core::ids::EpochId;
use srn_store::group::LineInfo;
use srn_store::inspect::{self, Files, Looked};
use srn_store::io::{Fs, OsReadFs};
use srn_store::manifest::Manifest;

use crate::clock;
use crate::error::{Failure, Kind, Result};

/// A directory, held so that no daemon takes it meanwhile.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
    groups: Vec<PathBuf>,
    _lock: Option<File>,
}

/// One group's directory.
#[derive(Debug, Clone)]
pub(super) struct GroupDir {
    pub(super) path: PathBuf,
    /// The directory's name, which is the group's id.
    pub(super) id: String,
}

fn fs() -> Arc<dyn Fs> {
    Arc::new(OsReadFs)
}

fn failed(dir: &Path, doing: &str, error: &std::io::Error) -> Failure {
    let kind = match error.kind() {
        std::io::ErrorKind::NotFound => Kind::NotFound,
        _ => Kind::Storage,
    };
    Failure::new(kind, format!("{}: {doing}: {error}", dir.display()))
}

impl Place {
    /// A state directory, or one group's.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let names = fs().list(dir).map_err(|error| failed(dir, "listing it", &error))?;
        // Whose lock it is: of a group's directory that of the state directory around it.
        let whole = std::path::absolute(dir).map_err(|error| failed(dir, "finding it", &error))?;
        let (state, groups) = if names.iter().any(|name| name == "groups") {
            (Some(whole), group_dirs(&dir.join("groups"))?)
        } else if names.iter().any(|name| name.starts_with("manifest-")) {
            let parent = whole.parent().filter(|dir| dir.ends_with("groups"));
            (parent.and_then(Path::parent).map(Path::to_owned), vec![dir.to_owned()])
        } else {
            return Err(Failure::not_found(format!(
                "{} is neither a state directory (it has no groups/) nor a group's (it has no \
                 manifest)",
                dir.display()
            )));
        };
        let lock = state.map(|state| hold(&state)).transpose()?.flatten();
        Ok(Self { dir: dir.to_owned(), groups, _lock: lock })
    }

    /// All groups.
    pub(super) fn groups(&self) -> Result<Vec<GroupDir>> {
        let id = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(self.groups.iter().map(|path| GroupDir { path: path.clone(), id: id(path) }).collect())
    }

    /// The group of this name or id, or whose id begins so; without one the only one.
    pub(super) fn group(&self, name: Option<&str>) -> Result<GroupDir> {
        let mut found = self.groups()?;
        if let Some(name) = name {
            let lower = name.to_lowercase();
            let by_id = |group: &GroupDir| name.len() >= 4 && group.id.starts_with(&lower);
            found.retain(|group| by_id(group) || group.name().is_ok_and(|is| is == name));
        }
        let which = name.map_or_else(|| "a group".to_owned(), |name| format!("group {name:?}"));
        match found.len() {
            1 => found.pop().ok_or_else(|| Failure::internal("a group went away")),
            0 => Err(Failure::not_found(format!("{} does not hold {which}", self.dir.display()))),
            many => Err(Failure::conflict(format!(
                "{} holds {many} groups; say which: srn inspect groups {}",
                self.dir.display(),
                self.dir.display()
            ))),
        }
    }
}

/// Takes the lock as readers do: many may look at once, but no daemon may run.
fn hold(state: &Path) -> Result<Option<File>> {
    let lock = match File::open(state.join("lock")) {
        Ok(lock) => lock,
        // A copy without it, or a directory in which no daemon ever ran.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(state, "opening its lock", &error)),
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::conflict(format!(
            "a daemon is using {}; ask it instead (srn status), stop it first, or look at a copy",
            state.display()
        ))),
        Err(error) => Err(failed(state, "locking it", &error.into())),
    }
}

fn group_dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let names = fs().list(dir).map_err(|error| failed(dir, "listing it", &error))?;
    let is_id =
        |name: &&String| name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(names.iter().filter(is_id).map(|name| dir.join(name)).collect())
}

impl GroupDir {
    /// Its files one by one.
    pub(super) fn files(&self) -> Result<Files> {
        Files::open(fs(), &self.path)
            .map_err(|error| Failure::from(error).while_doing(&self.words()))
    }

    /// The name in its manifest.
    pub(super) fn name(&self) -> Result<String> {
        Ok(self.files()?.manifest.name)
    }

    /// Its name if it can be told, else where it is.
    pub(super) fn words(&self) -> String {
        let volume = srn_store::io::Volume::new(fs());
        match Manifest::load(&volume, &self.path) {
            Ok(manifest) => format!("group {}", manifest.name),
            Err(_) => format!("group {}", self.id),
        }
    }

    /// The group as a daemon would find it.
    pub(super) fn look(&self) -> Result<Looked> {
        inspect::open(fs(), &self.path, clock::now(), clock::random_u64()).map_err(|error| {
            let failure = Failure::from(error).while_doing(&self.words());
            let way_out = "; srn inspect verify says what is left";
            Failure::new(failure.kind, format!("{failure}{way_out}"))
        })
    }

    /// Verifies it; see [`inspect::verify`].
    pub(super) fn verify(
        &self,
        tell: &mut dyn FnMut(inspect::Progress) -> std::ops::ControlFlow<()>,
    ) -> Result<inspect::Report> {
        inspect::verify(fs(), &self.path, clock::now(), tell)
            .map_err(|error| Failure::from(error).while_doing(&self.words()))
    }
}

/// The line whose epoch begins with `wanted`; the main one without.
pub(super) fn line_of(looked: &Looked, wanted: Option<&str>) -> Result<LineInfo> {
    let lines = looked.group.lines();
    let id = |line: &LineInfo| -> EpochId { line.epochs.current() };
    let mut found = lines.into_iter();
    match wanted {
        None => found.next().ok_or_else(|| Failure::not_found("the group has no line of history")),
        Some(wanted) => {
            let lower = wanted.to_lowercase();
            let fits = |line: &LineInfo| id(line).to_string().starts_with(&lower);
            let fitting: Vec<LineInfo> = found.filter(fits).collect();
            match <[LineInfo; 1]>::try_from(fitting) {
                Ok([line]) => Ok(line),
                Err(other) if other.is_empty() => {
                    Err(Failure::not_found(format!("there is no line {wanted:?}")))
                }
                Err(other) => {
                    Err(Failure::conflict(format!("{wanted:?} fits {} lines", other.len())))
                }
            }
        }
    }
}
