//! `srn inspect`: looks at a state directory, or at one group's, with no daemon running.
//!
//! It writes nothing to it: groups are opened by the daemon's own code, whose repairs stay in memory
//! (`srn_store::inspect`). It refuses to know the fleet (peers, settings, events): what it shows is
//! told by the groups' own files, which are all that is needed to get the data back.

mod answers;
mod args;
mod export;
mod frame;
mod place;
mod point;
mod points;
mod segments;
mod stop;
mod verify;

pub(super) use args::InspectCommand;

use serde::Serialize;

use super::{render, say};
use crate::error::Result;
use answers::{GroupAnswer, group_row};
use args::Where;
use place::{GroupDir, Place};

/// Prints an answer: as JSON, or as `text` makes of it.
fn show<T: Serialize>(json: bool, answer: &T, text: impl FnOnce(&T) -> String) {
    if json {
        say(&serde_json::to_string_pretty(answer).unwrap_or_default());
    } else {
        say(&text(answer));
    }
}

/// Does what was asked for.
///
/// # Errors
/// When a daemon runs there; when there is no such thing; when it is damaged.
pub(super) fn run(command: InspectCommand, json: bool) -> Result<()> {
    match command {
        InspectCommand::Groups { dir } => groups(&Place::open(&dir)?, json),
        InspectCommand::Points { at } => with_group(&at, |group| points::points(group, json)),
        InspectCommand::Segments { at } => with_group(&at, |group| segments::segments(group, json)),
        InspectCommand::Verify { at } => {
            let place = Place::open(&at.dir)?;
            let groups = match &at.group {
                Some(name) => vec![place.group(Some(name))?],
                None => place.groups()?,
            };
            verify::verify(&groups, json)
        }
        InspectCommand::Frame(args) => {
            with_group(&args.at, |group| frame::frame(group, &args, json))
        }
        InspectCommand::Export(args) => {
            with_group(&args.at, |group| export::export(group, &args, json))
        }
    }
}

fn with_group(at: &Where, what: impl FnOnce(&GroupDir) -> Result<()>) -> Result<()> {
    // Held to the end, so that no daemon begins to write meanwhile.
    let place = Place::open(&at.dir)?;
    what(&place.group(at.group.as_deref())?)
}

fn groups(place: &Place, json: bool) -> Result<()> {
    let groups: Vec<GroupAnswer> =
        place.groups()?.iter().map(GroupAnswer::of).collect::<Result<_>>()?;
    show(json, &groups, |groups| {
        if groups.is_empty() {
            return "there is no group here".into();
        }
        let head = ["GROUP", "ID", "ROLE", "KEEPS", "LOG", "BASE", "WRITTEN UP TO", "STATE"];
        let rows: Vec<Vec<String>> = groups.iter().map(group_row).collect();
        render::table(&head, &rows)
    });
    Ok(())
}
