//! Every decoder of bytes that come from a disk, a peer or a person: changed inputs may be refused,
//! but nothing panics, nothing allocates without bound, and what decodes is encoded to the same.

#![allow(clippy::ptr_arg, reason = "what makes sums right is a pointer to a function of vectors")]

mod files;
mod frames;
mod group;
mod messages;
mod text;

use srn_testkit::fuzz::Counting;

#[global_allocator]
static COUNTING: Counting = Counting;
