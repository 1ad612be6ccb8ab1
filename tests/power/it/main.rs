//! Real power cuts.
//!
//! The real `srn daemon` runs in an emulated guest whose state disk is a simulated block device
//! with a volatile cache ([`srn_testkit::BlockDisk`]). NBD clients write through the node; the power
//! goes off in the middle of a disk request; the guest boots again on what is left, and the oracle
//! checks that every answered write is there (promise P1), that what is there is a prefix of what
//! was sent (P2), and that nothing on the console complains. Then the clients write on.
//!
//! `SIM_SEED=n` replays the choices of a run (not its timing), `POWER_LAPS=n` sets the laps,
//! `POWER_KEEP=file` keeps the state disk of a run that fails.
#![expect(clippy::unwrap_used, reason = "a test's vocabulary fails like the test it serves")]
#![expect(clippy::print_stdout, reason = "a run tells what it did")]

mod bed;
mod client;
mod console;
mod disk;
mod guest;
mod oracle;

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use srn_testkit::Chance;
use srn_testkit::disk::Toll;

use bed::Bed;
use oracle::Broken;

/// Laps unless said otherwise.
const LAPS_DEFAULT: u64 = 3;

/// In percent, how often the set-up is cut too.
const EARLY_CUT_PERCENT: u64 = 50;

/// Starts after one cut that are cut too, at most.
const CUT_STARTS_MAX: u64 = 2;

/// A guest takes all processors that a small machine has.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Runs a test with its seed, alone.
fn run(test: impl AsyncFnOnce(u64)) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = number("SIM_SEED").unwrap_or_else(|| {
        // Any will do: the timing is never the same, so no run is like another anyway.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::from(now.subsec_micros())
    });
    println!("seed {seed} (replay its choices with SIM_SEED={seed})");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test(seed));
}

#[test]
fn answered_writes_survive_power_cuts() {
    run(async |seed| {
        let laps = number("POWER_LAPS").unwrap_or(LAPS_DEFAULT);
        let mut chance = Chance::new(seed);
        let mut bed = Bed::new(seed).await;
        if chance.percent(EARLY_CUT_PERCENT) {
            bed.cut_during_set_up(chance.between(1, 400)).await;
        }
        bed.start().await;
        for lap in 1..=laps {
            println!("lap {lap} of {laps}");
            let after = match chance.below(4) {
                0 => chance.between(1, 50),
                _ => chance.between(50, 3000),
            };
            bed.write_until_cut(after).await;
            bed.lose_power(Toll::Drawn).await;
            for _ in 0..chance.between(0, CUT_STARTS_MAX) {
                bed.cut_during_start(chance.between(1, 200)).await;
            }
            bed.start().await;
            bed.check().await.unwrap_or_else(|broken| bed.fail(&broken.to_string()));
        }
        bed.finish().await;
    });
}

/// A node whose disk forgets what was flushed, after a hundred answered writes to each disk.
async fn betrayed(seed: u64, toll: Toll) -> Bed {
    let mut bed = Bed::new(seed).await;
    bed.start().await;
    bed.lie();
    bed.write_until_answered(100).await;
    bed.lose_power(toll).await;
    bed
}

#[test]
fn a_disk_that_goes_back_in_time_is_noticed_by_the_oracle() {
    run(async |seed| {
        // What is left is whole and consistent, so the node cannot notice.
        let mut bed = betrayed(seed, Toll::Everything).await;
        bed.start().await;
        match bed.check().await {
            Err(broken @ Broken::Lost { .. }) => println!("noticed: {broken}"),
            other => bed.fail(&format!("not noticed: {other:?}")),
        }
    });
}

#[test]
fn a_disk_that_forgets_half_of_what_was_flushed_is_noticed() {
    run(async |seed| {
        let mut bed = betrayed(seed, Toll::Half).await;
        let noticed = match bed.try_start().await {
            Err(why) => why,
            Ok(()) => match bed.check().await {
                Err(broken) => broken.to_string(),
                Ok(()) => bed.fail("not noticed"),
            },
        };
        println!("noticed: {noticed}");
    });
}
