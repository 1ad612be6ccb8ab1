//! The NBD protocol: sans-I/O machines, a tokio server and a tokio client.
