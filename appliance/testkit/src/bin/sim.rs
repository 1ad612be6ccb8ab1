//! Runs simulations for as many seeds as one likes: `sim [SIMULATION...] [--seeds N] [--from N]`.
//!
//! Ctrl-C ends it and says how far it got. Exit code 1 when a seed fails or something that should
//! have happened never did.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use srn_testkit::seeds::{self, Simulation};
use srn_testkit::sim;

/// Seeds below which coverage is not asked for.
const ENOUGH: u64 = 300;

struct Asked {
    simulations: Vec<&'static Simulation>,
    from: u64,
    seeds: u64,
}

fn asked() -> Result<Asked, String> {
    let mut asked = Asked { simulations: Vec::new(), from: 0, seeds: 1000 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().unwrap_or_default();
            value.parse::<u64>().map_err(|_| format!("{word} takes a number, not '{value}'"))
        };
        match word.as_str() {
            "--seeds" => asked.seeds = number()?,
            "--from" => asked.from = number()?,
            "--seed" => (asked.from, asked.seeds) = (number()?, 1),
            name => match sim::ALL.iter().find(|simulation| simulation.name == name) {
                Some(simulation) => asked.simulations.push(simulation),
                None => return Err(format!("there is no simulation '{name}'")),
            },
        }
    }
    if asked.simulations.is_empty() {
        // One seed of that one is hundreds of worlds.
        asked.simulations = sim::ALL.to_vec();
        asked.simulations.retain(|simulation| simulation.name != "every-operation");
    }
    Ok(asked)
}

/// Set when somebody has had enough.
fn interrupted() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        if let Ok(runtime) = runtime
            && runtime.block_on(tokio::signal::ctrl_c()).is_ok()
        {
            set.store(true, Ordering::Relaxed);
        }
    });
    flag
}

fn main() -> ExitCode {
    let asked = match asked() {
        Ok(asked) => asked,
        Err(error) => {
            let names: Vec<&str> = sim::ALL.iter().map(|simulation| simulation.name).collect();
            eprintln!("{error}\nsim [{}] [--seeds N] [--from N] [--seed N]", names.join("|"));
            return ExitCode::from(2);
        }
    };
    let stop = interrupted();
    let mut code = ExitCode::SUCCESS;
    for simulation in &asked.simulations {
        if !stop.load(Ordering::Relaxed) && !run(simulation, &asked, &stop) {
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// Says whether it was clean.
fn run(simulation: &Simulation, asked: &Asked, stop: &AtomicBool) -> bool {
    let name = simulation.name;
    let began = Instant::now();
    let line = Line::new();
    let outcome = seeds::run_all(simulation, &(asked.from..asked.from + asked.seeds), |clean| {
        line.show(began, name, clean, asked.seeds);
        !stop.load(Ordering::Relaxed)
    });
    line.end();
    for (what, count) in &outcome.coverage {
        println!("{count:12} {what}");
    }
    let took = began.elapsed().as_secs_f64();
    let rate = outcome.clean as f64 / took;
    println!("{name}: {} seeds clean in {took:.0} s, {rate:.0} a second", outcome.clean);
    if let Some(failure) = outcome.failure {
        println!("{name}: FAILED at seed {}: {}", failure.seed, failure.message);
        println!("replay: cargo run -p srn-testkit --bin sim -- {name} --seed {}", failure.seed);
        return false;
    }
    if outcome.clean < asked.seeds {
        println!("{name}: interrupted; go on with --from {}", asked.from + outcome.clean);
        return true;
    }
    let missing = seeds::missing(simulation, &outcome.coverage);
    if asked.seeds >= ENOUGH && !missing.is_empty() {
        println!("{name}: FAILED: these never happened: {missing:?}");
        return false;
    }
    true
}

/// One line that is written over and over; without a terminal, a line each half minute.
struct Line {
    every: Duration,
    last: std::cell::Cell<Instant>,
    terminal: bool,
}

impl Line {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let every = Duration::from_secs(if terminal { 1 } else { 30 });
        Self { every, last: std::cell::Cell::new(Instant::now()), terminal }
    }

    fn show(&self, began: Instant, name: &str, clean: u64, of: u64) {
        if self.last.get().elapsed() < self.every {
            return;
        }
        self.last.set(Instant::now());
        let rate = clean as f64 / began.elapsed().as_secs_f64();
        let left = of.saturating_sub(clean) as f64 / rate.max(0.001);
        let (minutes, seconds) = ((left / 60.0) as u64, left as u64 % 60);
        let end = if self.terminal { "\x1b[K\r" } else { "\n" };
        eprint!(
            "{name}: {clean} of {of} seeds, {rate:.0} a second, {minutes}:{seconds:02} left{end}"
        );
        let _ = std::io::stderr().flush();
    }

    fn end(&self) {
        if self.terminal {
            eprint!("\x1b[K");
        }
    }
}
