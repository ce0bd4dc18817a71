//! A tiny HTTP service for the README, the demo and the tests: standard library only, so that it runs on any
//! machine that can build Nave. It listens on `$HOST:$PORT`, answers every path with who it is, and can be told
//! to misbehave, which is what the tests need:
//!
//! ```text
//! hello                      serve until told to stop
//! hello --greeting TEXT      what to answer
//! hello --exit CODE          end at once with this code
//! hello --ignore-term        do not end on SIGTERM
//! hello --unready            answer 503 on /ready
//! hello --print-env          print the environment before serving
//! hello --fork-away          start a child that outlives its parent's process group
//! hello --lines N            write N numbered lines to stdout before serving
//! ```
//! `GET /exit/CODE` ends it, `GET /env/NAME` answers with a variable.
#![expect(
    clippy::print_stdout,
    clippy::exit,
    reason = "a small program whose product is its output and its exit code"
)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};

#[derive(Debug, Default)]
struct Options {
    greeting: Option<String>,
    exit: Option<i32>,
    ignore_term: bool,
    unready: bool,
    print_env: bool,
    fork_away: bool,
    lines: u64,
}

fn main() {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(what) => {
            println!("hello: {what}");
            std::process::exit(2);
        }
    };
    if let Some(code) = options.exit {
        println!("hello: ending with {code} as told");
        std::process::exit(code);
    }
    if options.ignore_term {
        ignore_term();
    }
    if options.print_env {
        std::env::vars().for_each(|(name, value)| println!("{name}={value}"));
    }
    if options.fork_away {
        fork_away();
    }
    (1..=options.lines).for_each(|n| println!("line {n}"));
    serve(&options);
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--greeting" => options.greeting = Some(value()?),
            "--exit" => {
                options.exit = Some(value()?.parse().map_err(|_| "--exit takes a number".to_owned())?)
            }
            "--lines" => options.lines = value()?.parse().map_err(|_| "--lines takes a number".to_owned())?,
            "--ignore-term" => options.ignore_term = true,
            "--unready" => options.unready = true,
            "--print-env" => options.print_env = true,
            "--fork-away" => options.fork_away = true,
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(options)
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn serve(options: &Options) {
    let address = format!("{}:{}", variable("HOST"), variable("PORT"));
    let listener = match TcpListener::bind(&address) {
        Ok(listener) => listener,
        Err(error) => {
            println!("hello: cannot listen on {address}: {error}");
            std::process::exit(98);
        }
    };
    println!("hello: listening on {address}");
    for stream in listener.incoming().flatten() {
        let _ = answer(stream, options);
    }
}

fn answer(mut stream: TcpStream, options: &Options) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    if let Some(code) = path.strip_prefix("/exit/") {
        respond(&mut stream, "200 OK", "ending\n")?;
        std::process::exit(code.parse().unwrap_or(1));
    }
    if let Some(name) = path.strip_prefix("/env/") {
        return respond(&mut stream, "200 OK", &format!("{}\n", variable(name)));
    }
    if path == "/ready" && options.unready {
        return respond(&mut stream, "503 Service Unavailable", "not ready\n");
    }
    let greeting = options.greeting.as_deref().unwrap_or("hello");
    let who = format!("{greeting} from {} on {}\n", variable("NAVE_INSTANCE"), variable("NAVE_HOST"));
    respond(&mut stream, "200 OK", &who)
}

fn respond(stream: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // At once: who is killed between two writes leaves half an answer, which no proxy can mend.
    stream.write_all((head + body).as_bytes())
}

/// A shell ignores the signal for both: what is ignored stays ignored through exec.
fn ignore_term() {
    if std::env::var_os("HELLO_TERM_IGNORED").is_some() {
        return;
    }
    let program = std::env::current_exe().expect("/proc is mounted");
    let error = std::os::unix::process::CommandExt::exec(
        std::process::Command::new("/bin/sh")
            .arg("-c")
            .arg("trap '' TERM; exec \"$0\" \"$@\"")
            .arg(program)
            .args(std::env::args().skip(1))
            .env("HELLO_TERM_IGNORED", "1"),
    );
    println!("hello: cannot run /bin/sh: {error}");
    std::process::exit(1);
}

fn fork_away() {
    let child = std::process::Command::new("/bin/sh").arg("-c").arg("setsid sleep 3600 & exit 0").status();
    println!("hello: started a child of its own session: {child:?}");
}
