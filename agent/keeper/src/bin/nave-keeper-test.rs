//! The keeper without the rest of `nave`, for the tests in `tests/`: `keeper DATA_DIR [AGENT ARGV…]` and
//! `exec-stub FD`.

use std::ffi::OsString;
use std::process::ExitCode;

use nave_keeper::{KeeperOptions, exec_stub_main, keeper_main};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_deref().and_then(|role| role.to_str()) {
        Some("exec-stub") => exec_stub_main(),
        Some("keeper") => {
            let data_dir = arguments.next().map_or_else(Default::default, Into::into);
            let agent_command: Vec<OsString> = arguments.collect();
            match keeper_main(KeeperOptions { data_dir, agent_command }) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        }
        _ => ExitCode::from(2),
    }
}

#[expect(clippy::print_stderr, reason = "the end of a program is where errors are printed")]
fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("{error}");
    ExitCode::FAILURE
}
