//! The keeper from outside: a real process with a real socket, its agent played by the tests.

mod agent;
mod harness;
mod life;
mod output;
mod peers;
mod successor;
mod world;
