//! The life of the daemon: from the configuration to the running node, and back.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use srn_store::group::{RecentBudget, Shared};
use srn_store::index::BlockCache;
use srn_store::io::{BufPool, OsFs, Volume};
use tokio::signal::unix::{SignalKind, signal};

use crate::api;
use crate::clock;
use crate::config::{CONFIG_PATH, Config, ConfigError};
use crate::context::Context;
use crate::error::{Failure, Kind, Result};
use crate::fleet::SqliteFleet;
use crate::node::{Node, StateDir};

/// Idle page-aligned buffers kept for use, in bytes.
const POOL_BYTES: usize = 24 << 20;

/// Priority that the link's threads give up: a server's write does not wait for replication. A tenth of
/// a busy processor is left to it: starved altogether it would let a small cache run full.
const LINK_NICE: i32 = 10;

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// Everything that keeps it from starting.
pub fn run(config: Option<&Path>) -> Result<()> {
    let config = load(config)?;
    crate::logging::start(config.log_level);
    crate::supervise::abort_on_panic();
    raise_file_limit();
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    // A connection's packets are the work of one task: threads that hand it to and fro cost a tenth
    // more than they bring.
    let link = runtime("link", threads / 2, |builder| {
        builder.on_thread_start(|| crate::supervise::yield_priority(LINK_NICE));
    })?;
    let front = runtime("front", threads, |_| {})?;
    let result = front.block_on(live(config, link.handle().clone()));
    // Whatever still runs is of no use to anybody.
    link.shutdown_timeout(std::time::Duration::from_millis(500));
    front.shutdown_timeout(std::time::Duration::from_millis(500));
    result
}

fn load(path: Option<&Path>) -> Result<Config> {
    let loaded = match path {
        Some(path) => Config::load(path),
        None if Path::new(CONFIG_PATH).exists() => Config::load(Path::new(CONFIG_PATH)),
        None => Config::defaults(),
    };
    loaded.map_err(|error| {
        let kind = match &error {
            ConfigError::Read { source, .. } if source.kind() == ErrorKind::NotFound => {
                Kind::NotFound
            }
            _ => Kind::Invalid,
        };
        Failure::new(kind, error.to_string())
    })
}

fn runtime(
    name: &'static str,
    threads: usize,
    change: impl FnOnce(&mut tokio::runtime::Builder),
) -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.thread_name(name).worker_threads(threads.clamp(1, 8)).enable_all();
    change(&mut builder);
    builder.build().map_err(|error| Failure::internal(format!("starting threads: {error}")))
}

/// Every log segment and index of every group is an open file.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

async fn live(config: Config, link: tokio::runtime::Handle) -> Result<()> {
    let state = StateDir::take(&config.state_dir)?;
    make_dir(&config.run_dir)?;
    let fleet = Arc::new(SqliteFleet::open(&state.fleet_path())?);
    let identity = state.identity()?;
    let store = Shared {
        volume: Volume::new(Arc::new(OsFs)),
        pool: BufPool::new(POOL_BYTES),
        cache: Arc::new(BlockCache::new(config.index_cache_bytes)),
        recent: Arc::new(RecentBudget::new(config.recent_bytes)),
        entropy: Arc::new(clock::random_u64),
    };
    let listener = api::listen(&config.control_socket, config.control_group.as_deref())?;
    let socket = config.control_socket.clone();
    log::info!("srn {} starts as node {} with key {}", crate::VERSION, config.name, identity.id());
    let context = Context::new(config, fleet, store, link)
        .map_err(|error| Failure::internal(format!("starting a thread: {error}")))?;
    let node = Node::start(context, identity).await?;
    let serving = tokio::spawn(api::serve(listener, node.clone()));
    ready();
    wait_for_signal().await?;
    log::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    node.stop().await;
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), serving).await;
    let _ = std::fs::remove_file(socket);
    node.context().write_events();
    log::info!("stopped");
    Ok(())
}

fn make_dir(path: &PathBuf) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(|error| {
        Failure::new(Kind::Storage, format!("making run directory {}: {error}", path.display()))
    })
}

/// Tells systemd, and whoever reads the log, that clients are served now.
fn ready() {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    log::info!("ready");
}

async fn wait_for_signal() -> Result<()> {
    let failed = |error| Failure::internal(format!("waiting for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
