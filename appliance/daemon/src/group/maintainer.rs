//! The thread that does a group's work behind the engine: sealing, trimming, retiring, merging.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use srn_core::ids::Seq;
use srn_core::limits::SECTOR;
use srn_core::time::Mono;
use srn_store::StoreError;
use srn_store::group::{Group as Store, Retention, Worked};

use super::breaker::{Breaker, Say};
use super::{GroupSlot, UpkeepStatus};
use crate::clock;
use crate::fleet::Level;

/// Work is looked for at least this often.
const EVERY: Duration = Duration::from_secs(2);

/// Content after which work is looked for at once, in bytes: a part of a segment.
const WAKE_BYTES: u64 = 8 << 20;

/// After a failure the next try waits this long.
const AFTER_FAILURE: Duration = Duration::from_secs(30);

/// Priority given up by the thread: what it does, nobody waits for.
const NICE: i32 = 5;

/// Extents of damage that one event names.
const CARRIED_NAMED: usize = 20;

#[derive(Debug, Default)]
struct Signal {
    bytes: u64,
    wake: bool,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    signal: Mutex<Signal>,
    condition: Condvar,
}

/// A handle to the thread.
#[derive(Debug)]
pub(super) struct Maintainer {
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Maintainer {
    pub(super) fn start(name: &str, store: Arc<Store>, group: GroupSlot) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name(format!("keep-{name}")).spawn(move || {
            crate::supervise::yield_priority(NICE);
            run(&of_thread, &store, &group);
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Looks for work now.
    pub(super) fn wake(&self) {
        self.with(|signal| signal.wake = true);
    }

    /// So many bytes went into the log.
    pub(super) fn progress(&self, bytes: u64) {
        let mut signal = self.shared.signal.lock().unwrap_or_else(PoisonError::into_inner);
        signal.bytes += bytes;
        if signal.bytes >= WAKE_BYTES {
            self.shared.condition.notify_one();
        }
    }

    /// Ends the thread, after the step under way.
    pub(super) fn stop(&self) {
        self.with(|signal| signal.stop = true);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Not from its own thread: the last holder of a group may be there.
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }

    fn with(&self, change: impl FnOnce(&mut Signal)) {
        change(&mut self.shared.signal.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.condition.notify_one();
    }
}

impl Drop for Maintainer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the thread remembers between its rounds.
#[derive(Debug, Default)]
struct Memory {
    told_full: bool,
    breaker: Breaker,
    /// Since when maintenance meets something damaged.
    damaged_since: Option<Mono>,
    /// Whether it carries that along.
    carries: bool,
}

fn run(shared: &Shared, store: &Arc<Store>, group: &GroupSlot) {
    let mut memory = Memory::default();
    loop {
        let pause = match work(shared, store, group, &mut memory) {
            Ok(()) => EVERY,
            Err(()) => AFTER_FAILURE,
        };
        let signal = shared.signal.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = |signal: &mut Signal| {
            !(signal.stop || signal.wake || (signal.bytes >= WAKE_BYTES && pause == EVERY))
        };
        let waited = shared.condition.wait_timeout_while(signal, pause, ready);
        let (mut signal, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if signal.stop {
            return;
        }
        signal.wake = false;
        signal.bytes = 0;
    }
}

/// Works until there is nothing to do.
fn work(
    shared: &Shared,
    store: &Arc<Store>,
    group: &GroupSlot,
    memory: &mut Memory,
) -> Result<(), ()> {
    let Memory { told_full, breaker, damaged_since, carries } = memory;
    loop {
        let (retention, name) = match group.get().and_then(Weak::upgrade) {
            Some(group) => {
                // First it is looked for, and fetched from the peer if that has it. Only then does it go
                // along.
                let for_good = damaged_since.is_some_and(|since| group.is_damaged_for_good(since));
                if for_good && !*carries {
                    breaker.again();
                }
                *carries = for_good;
                store.carry_damage(for_good);
                (group.retention(), group.name())
            }
            // Not there yet, or not any more.
            None => return Ok(()),
        };
        let wanted = retention;
        // History that cannot be given up is left alone; what the log needs to go on is done.
        let rests = breaker.rests(Instant::now());
        let retention = if rests { Retention::from(Seq::ZERO) } else { wanted.clone() };
        match store.maintain(&retention) {
            Ok(worked) => {
                if let Some(group) = group.get().and_then(Weak::upgrade) {
                    if *told_full {
                        log::info!("group {name}: there is room for the log again");
                        *told_full = false;
                    }
                    group.engine().room();
                }
                tell_carried(store, group);
                if worked == Worked::Nothing {
                    if store.debt(&wanted).damaged > 0 {
                        damaged_since.get_or_insert_with(clock::mono);
                    } else if !rests {
                        *damaged_since = None;
                    }
                    if !rests && let Some(say) = breaker.succeeded() {
                        tell(group, say, Level::Info, "history is looked after again");
                    }
                    note(store, group, &wanted, breaker);
                    let upgraded = group.get().and_then(Weak::upgrade);
                    if rests || !upgraded.is_some_and(|group| group.give_up_for_cap()) {
                        return Ok(());
                    }
                }
            }
            Err(StoreError::Full(why)) => {
                if !*told_full {
                    log::info!("group {name}: no room for the next log segment: {why}");
                    *told_full = true;
                }
                return Ok(());
            }
            Err(StoreError::Corrupt(why)) if !rests => {
                damaged_since.get_or_insert_with(clock::mono);
                let (say, rest) = breaker.failed(why.clone(), Instant::now());
                let rest = humantime::format_duration(rest);
                let text = format!(
                    "history cannot be given up, so it takes more and more room: {why}; tried \
                     again in {rest}"
                );
                tell(group, say, Level::Alert, &text);
                note(store, group, &wanted, breaker);
            }
            Err(error) => {
                // On a failed volume the engine has said so, loudly.
                if store.failure().is_none() {
                    log::error!("group {name}: maintenance: {error}");
                }
                return Err(());
            }
        }
        if shared.signal.lock().unwrap_or_else(PoisonError::into_inner).stop {
            return Ok(());
        }
    }
}

/// Says what was damaged where history was given up, and is damaged still.
fn tell_carried(store: &Store, group: &GroupSlot) {
    let carried = store.take_carried();
    let Some(group) = group.get().and_then(Weak::upgrade) else { return };
    if carried.is_empty() {
        return;
    }
    let bytes: u64 = carried.iter().map(|(_, extent)| extent.bytes()).sum();
    let catalog = group.catalog();
    let named = carried.iter().take(CARRIED_NAMED).map(|(no, extent)| {
        let name = catalog.disks.get(no).map_or("a removed disk", |disk| &disk.name);
        format!("{} bytes of disk {name} at {}", extent.bytes(), extent.start * SECTOR)
    });
    let named: Vec<String> = named.collect();
    let more = if carried.len() > CARRIED_NAMED { ", and more" } else { "" };
    let text = format!(
        "history was moved together with {bytes} bytes in it that are damaged and that nobody has now; \
         they stay damaged until they are written or repaired: {}{more}",
        named.join(", ")
    );
    group.context.event(Level::Alert, Some(&group.name()), &text);
}

/// Tells people, or the log.
fn tell(group: &GroupSlot, say: Say, level: Level, text: &str) {
    let Some(group) = group.get().and_then(Weak::upgrade) else { return };
    match say {
        Say::Little => log::warn!("group {}: {text}", group.name()),
        Say::Alert => group.context.event(level, Some(&group.name()), text),
    }
}

/// Writes down what people are shown.
fn note(store: &Store, group: &GroupSlot, wanted: &Retention, breaker: &Breaker) {
    let Some(group) = group.get().and_then(Weak::upgrade) else { return };
    let debt = store.debt(wanted);
    group.facts().upkeep = UpkeepStatus {
        debt_bytes: debt.bytes,
        damaged: debt.damaged,
        trouble: breaker.trouble().map(str::to_owned),
    };
}
