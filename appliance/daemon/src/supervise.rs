//! Threads: their priorities, and what happens when one goes wrong.

/// From now on a panic in any thread ends the process, once it has been logged. A daemon without
/// one of its threads would look alive and protect nothing; one that is gone is started again, and
/// reopening after a crash is what the store is made for.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        let backtrace = std::backtrace::Backtrace::capture();
        log::error!("{info}\n{backtrace}");
        log::logger().flush();
        std::process::abort();
    }));
}

/// Gives up priority for the calling thread: production comes first. Refusal does no harm.
pub fn yield_priority(nice: i32) {
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), nice) {
        log::debug!("lowering a thread's priority: {error}");
    }
}
