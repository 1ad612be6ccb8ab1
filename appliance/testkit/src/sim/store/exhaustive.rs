//! Every changing operation of a short schedule may be the last one, or fail.

use super::World;
use crate::Fault;
use crate::seeds::{Coverage, Simulation};

/// Steps of a schedule.
const STEPS: u64 = 14;

/// Lives through the schedule of this seed once for each of its changing operations and each fault
/// that may hit it there.
fn run(seed: u64) -> Coverage {
    let start = || {
        let mut world = World::new(seed);
        world.faults = false;
        world
    };
    let mut world = start();
    let before = world.disk.operations();
    for _ in 0..STEPS {
        world.step();
    }
    let operations = world.disk.operations() - before;
    let mut coverage = world.end();
    for fault in [Fault::PowerCut, Fault::Error] {
        for operation in 1..=operations {
            let mut world = start();
            world.disk.fault_in(operation, fault);
            for _ in 0..STEPS {
                world.step();
            }
            for (what, count) in world.end() {
                *coverage.entry(what).or_default() += count;
            }
        }
    }
    *coverage.entry("operations cut or failed").or_default() += 2 * operations;
    coverage
}

/// This simulation.
pub const EVERY_OPERATION: Simulation = Simulation {
    name: "every-operation",
    run,
    wanted: &["operations cut or failed", "cut in the middle", "failed operation"],
};
