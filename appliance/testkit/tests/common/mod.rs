//! What the tests of this room share.

#![allow(unused_imports, unreachable_pub, reason = "each test uses its part of it")]

pub use srn_testkit::oracle::*;
