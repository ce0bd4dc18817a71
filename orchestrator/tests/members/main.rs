//! Whole members in this process: everything but the processes themselves is real.

mod calls;
mod harness;
mod one;
mod three;
