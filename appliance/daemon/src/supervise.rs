//! Threads and priorities.

/// Gives up priority for the calling thread: production comes first. Refusal does no harm.
pub fn yield_priority(nice: i32) {
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), nice) {
        log::debug!("lowering a thread's priority: {error}");
    }
}
