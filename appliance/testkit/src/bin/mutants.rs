//! Shows that the simulations find known bugs: `mutants [--limit N] [PART OF A NAME...]`.
//!
//! Prints, as a table for the documentation, the seeds that each bug needed, and fails when one
//! survives.
#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use std::process::ExitCode;
use std::time::Instant;

use srn_core::mutants::Mutant;
use srn_testkit::mutants::{hunt, hunter};

/// Characters of what the oracle said that fit the table.
const WORDS_MAX: usize = 90;

fn main() -> ExitCode {
    let mut limit = 3000;
    let mut names = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--limit" {
            limit = words.next().and_then(|value| value.parse().ok()).unwrap_or(limit);
        } else {
            names.push(word);
        }
    }
    // What is found is told in the table.
    std::panic::set_hook(Box::new(|_| {}));
    println!("| known bug | simulation | seeds | seconds | what the oracle said |");
    println!("|---|---|---|---|---|");
    let mut survivors = Vec::new();
    let is_asked_for = |mutant: &Mutant| {
        names.is_empty() || names.iter().any(|name| mutant.words().contains(name.as_str()))
    };
    for mutant in Mutant::ALL.iter().copied().filter(is_asked_for) {
        let (what, by) = (mutant.words(), hunter(mutant).name);
        let began = Instant::now();
        let found = hunt(mutant, limit);
        let took = began.elapsed().as_secs_f64();
        match found {
            Some(failure) => {
                let said = failure.message.lines().next().unwrap_or_default().replace('|', "/");
                let said: String = said.chars().take(WORDS_MAX).collect();
                println!("| {what} | {by} | {} | {took:.1} | {said} |", failure.seed + 1);
            }
            None => {
                println!("| {what} | {by} | **survives {limit}** | {took:.1} | |");
                survivors.push(what);
            }
        }
    }
    if survivors.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("\nthe simulations do not find: {}", survivors.join(", "));
    ExitCode::FAILURE
}
