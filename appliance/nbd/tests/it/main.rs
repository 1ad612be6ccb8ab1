//! The crate from outside: our server and client against each other, against peers that break
//! every rule, and against the C implementations.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests, also where they say it once")]

mod support;

mod hostile_clients;
mod hostile_servers;
mod interop_client;
mod interop_server;
mod lifecycle;
mod model;
mod server_replies;
mod tls;
