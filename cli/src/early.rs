//! The exec-stub's way in. It stands between the end of a process and the start of its successor, so what the rest of
//! this binary does before `main` must not be waited for: RocksDB's static constructors alone take 1.4 ms.
#![expect(unsafe_code, reason = "a place in .init_array can be had in no other way")]

/// Constructors run in the order of their numbers, those of C++ after all that have one. The standard library's own,
/// which notes the arguments, is 00099.
#[used]
// SAFETY: the section is one of function pointers that the loader calls once, before `main`, with arguments that this
// function leaves alone; the C calling convention allows that.
#[unsafe(link_section = ".init_array.00100")]
static BEFORE_CONSTRUCTORS: extern "C" fn() = before_constructors;

/// Becomes the exec-stub if it is asked for by name; else `main` decides. Where the arguments are not known yet (a libc
/// other than glibc), that is `main` as well.
extern "C" fn before_constructors() {
    if std::env::args_os().nth(1).is_some_and(|role| role == "exec-stub") {
        nave_keeper::exec_stub_main();
    }
}
