//! The pure brain: frames, positions, machines and states. No clock, no I/O, no randomness.
