//! Which allocator a process uses. A hub member makes and frees small records on several threads, and jemalloc takes
//! a tenth less of the leader's CPU for each write than the system's (docs/performance.md). The other roles stay with the
//! system's: a keeper shall fit in 3 MiB, and jemalloc's own tables alone are a part of that.
//!
//! The choice is made from the command line before `main`, that is before Rust allocates anything, and never changes;
//! so whatever is freed is freed by the allocator that made it. C++ (RocksDB) always uses the system's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicBool, Ordering};

use tikv_jemallocator::Jemalloc;

/// Set once, by [`choose`], before the first allocation.
static MEMBER: AtomicBool = AtomicBool::new(false);

/// One allocator for members and another for everyone else.
#[derive(Debug)]
pub(crate) struct ByRole;

// SAFETY: both allocators keep the contract, and `MEMBER` does not change once anything was allocated, so every
// pointer goes back to the allocator that it came from.
#[expect(unsafe_code, reason = "a global allocator is unsafe to implement")]
unsafe impl GlobalAlloc for ByRole {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { if is_member() { Jemalloc.alloc(layout) } else { System.alloc(layout) } }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { if is_member() { Jemalloc.dealloc(ptr, layout) } else { System.dealloc(ptr, layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { if is_member() { Jemalloc.alloc_zeroed(layout) } else { System.alloc_zeroed(layout) } }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe {
            if is_member() { Jemalloc.realloc(ptr, layout, size) } else { System.realloc(ptr, layout, size) }
        }
    }
}

fn is_member() -> bool {
    MEMBER.load(Ordering::Relaxed)
}

/// Called by the C library before `main`, with the command line: glibc passes it to every such function, as std
/// itself relies on.
#[expect(unsafe_code, reason = "only a function in this section runs before the first allocation")]
#[used]
// SAFETY: the section holds pointers to functions of this type.
#[unsafe(link_section = ".init_array.00098")]
static CHOOSE: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = choose;

extern "C" fn choose(count: c_int, arguments: *const *const c_char, _environment: *const *const c_char) {
    if count < 2 || arguments.is_null() {
        return;
    }
    #[expect(unsafe_code, reason = "the command line as C has it")]
    // SAFETY: the C library hands over `count` pointers to strings that live as long as the process.
    let role = unsafe { CStr::from_ptr(*arguments.add(1)) };
    MEMBER.store(role == c"orchestrator", Ordering::Relaxed);
}
