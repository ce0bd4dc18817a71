//! The keeper from outside: a real process with a real socket, its agent played by the tests.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, also in its helpers")]

mod agent;
mod harness;
mod life;
mod listen;
mod output;
mod peers;
mod successor;
mod upgrade;
mod world;
