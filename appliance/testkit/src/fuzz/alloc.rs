//! An allocator that counts what each thread asks for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts. A fuzzing binary has it as its `#[global_allocator]`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counting;

/// Bytes that this thread has asked for so far; what was given back is not taken off.
#[must_use]
pub fn allocated() -> u64 {
    ALLOCATED.with(Cell::get)
}

fn count(bytes: usize) {
    // A thread that is ending has nothing to count with any more.
    let _ = ALLOCATED.try_with(|sum| sum.set(sum.get().saturating_add(bytes as u64)));
}

#[expect(unsafe_code, reason = "an allocator cannot be written without; it only counts")]
// SAFETY: every call is handed to the system's allocator as it is, and so is what it returns.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the promises of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size.saturating_sub(layout.size()));
        // SAFETY: the caller keeps the promises of `realloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// A cap that nobody counts against proves nothing.
pub(super) fn check_installed() {
    let before = allocated();
    let some = std::hint::black_box(vec![0u8; 64]);
    assert!(
        allocated() >= before + some.len() as u64,
        "this binary lacks: #[global_allocator] static COUNTING: Counting = Counting"
    );
}
