//! `cargo demo` shows what it is to show, and leaves nothing behind.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use fastswan_testkit::lab;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

fn demo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastswan-testkit"));
    command.arg("demo").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The namespaces of a process's labs.
fn namespaces_of(child: &Child) -> Vec<String> {
    let list = Command::new("ip").args(["netns", "list"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let prefix = format!("fsw-{}-", child.id());
    list.lines().filter(|line| line.starts_with(&prefix)).map(str::to_owned).collect()
}

#[test]
fn offloaded_policies_are_forwarded_and_nothing_is_lost() {
    if !lab::require_root("the demo") {
        return;
    }
    let child = demo(&["--", "--seconds", "3", "--json"]).spawn().unwrap();
    let process = child.id();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let object: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("no object on the last line:\n{text}\n{error}"));

    let number = |key: &str| object[key].as_i64().unwrap_or_else(|| panic!("{key} in {object}"));
    assert_eq!((number("lost"), number("shadowed_fast")), (0, 0), "{object}");
    assert!(number("kernel_packets") > 0, "{object}");
    assert!(number("eligible") > 0 && number("fast_packets") * 100 >= number("eligible") * 99, "{object}");
    assert!(number("sent") > number("eligible"), "{object}");
    assert!(object["pass_reasons"]["shadowed"].as_u64() > Some(0), "{object}");
    let states = object["policies"].as_array().unwrap().iter().map(|policy| &policy["state"]);
    assert_eq!(states.filter(|state| *state == "deleted").count(), 1, "{object}");
    assert!(output.status.success(), "{error}");
    assert!(!std::fs::exists(format!("/run/netns/fsw-{process}-0-client")).unwrap());
}

#[test]
fn an_interrupted_demo_leaves_no_namespace() {
    if !lab::require_root("the demo") {
        return;
    }
    let mut child = demo(&["--seconds", "60"]).spawn().unwrap();
    // It says something when all is set up.
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(namespaces_of(&child).len(), 3, "{line}");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    child.wait().unwrap();
    assert_eq!(namespaces_of(&child), Vec::<String>::new());
}

#[test]
fn without_privilege_the_demo_says_what_it_needs() {
    if !lab::require_root("becoming another user") {
        return;
    }
    let arguments = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    // The binary lies where another user may not look: it is handed over open.
    let binary = std::fs::File::open(env!("CARGO_BIN_EXE_fastswan-testkit")).unwrap();
    let output = Command::new("setpriv")
        .args(arguments)
        .args(["/proc/self/fd/0", "demo"])
        .stdin(binary)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("run it as root"), "{error}");
    assert!(!output.status.success());
}
