//! Points in time: which there are, what people call them, how long they are kept, and that what is
//! recovered of one is what the disks held then.

mod common;
mod history;
mod quiesce;
mod retention;
mod schedules;
