//! Whole members in this process: everything but the processes themselves is real.

mod harness;
mod one;
mod three;
