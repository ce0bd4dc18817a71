//! Manifests that several promises share.

use nave_tests::nave::hello;

/// A web service of `count` copies, ready when it answers.
pub(crate) fn web(name: &str, count: u32) -> String {
    web_with(name, count, "", "")
}

/// The same with more words on its command line and more tables at the end.
pub(crate) fn web_with(name: &str, count: u32, args: &str, tables: &str) -> String {
    let words: String = args.split_whitespace().map(|word| format!(", \"{word}\"")).collect();
    format!(
        "name = \"{name}\"\ncommand = [\"{}\"{words}]\ncount = {count}\n\n[ports.http]\nprotocol = \"http\"\n\n\
         [health]\nhttp = \"/ready\"\ninterval = \"200ms\"\n\n{tables}\n",
        hello().display()
    )
}

/// A process that is ready as soon as it runs.
pub(crate) fn sleeper(name: &str, count: u32) -> String {
    format!("name = \"{name}\"\ncommand = [\"sleep\", \"infinity\"]\ncount = {count}\n")
}

/// A service that is a few lines of Python, ready when it takes connections. `port`: the keys of its port; `more`: its
/// own keys.
pub(crate) fn python(name: &str, program: &str, port: &str, more: &str) -> String {
    format!(
        "name = \"{name}\"\ncommand = [\"python3\", \"-c\", '''{program}''']\n{more}\n[ports.main]\n{port}\n\n\
         [health]\ntcp = true\ninterval = \"100ms\"\n"
    )
}
