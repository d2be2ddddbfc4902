//! Namespaces are gone when their test is, however it ends.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
};

use fastswan_testkit::lab::{self, Namespace, clean_up_on_signals, remove_leftovers};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Set for the copy of this program that makes a namespace and waits for its end.
const VICTIM: &str = "FASTSWAN_TEST_VICTIM";

fn exists(name: &str) -> bool {
    Path::new("/run/netns").join(name).exists()
}

/// Another process that has made a namespace.
struct Victim {
    child: Child,
    /// It ends when this is closed, should nobody stop it before.
    open: Option<ChildStdin>,
    name: String,
}

fn victim() -> Victim {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_makes_a_namespace_and_waits", "--nocapture"])
        .env(VICTIM, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut name = String::new();
    BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut name).unwrap();
    let name = name.trim().to_owned();
    assert!(exists(&name), "{name:?}");
    Victim { open: child.stdin.take(), child, name }
}

impl Victim {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.open.take());
        let _ = self.child.wait();
    }
}

/// Not a story of its own: what [`victim`] does.
#[test]
fn a_process_makes_a_namespace_and_waits() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    clean_up_on_signals().unwrap();
    let namespace = Namespace::new("victim").unwrap();
    eprintln!("{}", namespace.name());
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn a_namespace_is_gone_after_its_test() {
    if !lab::require_root("making namespaces") {
        return;
    }
    let namespace = Namespace::new("short").unwrap();
    let name = namespace.name().to_owned();
    assert!(exists(&name));
    drop(namespace);
    assert!(!exists(&name));
}

#[test]
fn a_namespace_is_gone_after_its_test_panics() {
    if !lab::require_root("making namespaces") {
        return;
    }
    let panicked = std::thread::spawn(|| {
        let namespace = Namespace::new("panic").unwrap();
        let name = namespace.name().to_owned();
        namespace.enter(|| std::panic::panic_any(name));
    });
    let name = *panicked.join().unwrap_err().downcast::<String>().unwrap();
    assert!(name.ends_with("-panic"), "{name}");
    assert!(!exists(&name));
}

#[test]
fn a_process_that_is_told_to_stop_takes_its_namespaces_along() {
    if !lab::require_root("stopping a process") {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut victim = victim();
        victim.signal(signal);
        assert_eq!(victim.child.wait().unwrap().code(), Some(130), "{signal}");
        assert!(!exists(&victim.name), "{signal}");
    }
}

#[test]
fn what_a_killed_process_left_is_removed_and_nothing_of_the_living() {
    if !lab::require_root("killing a process") {
        return;
    }
    let own = Namespace::new("own").unwrap();
    let living = victim();
    let mut killed = victim();
    let foreign = "testkit-1-foreign";
    assert!(Command::new("ip").args(["netns", "add", foreign]).status().unwrap().success());
    killed.signal(Signal::SIGKILL);
    killed.child.wait().unwrap();
    assert!(exists(&killed.name), "SIGKILL lets nobody clean up");

    remove_leftovers();
    let left = [own.name(), &living.name, foreign, &killed.name].map(exists);
    assert!(Command::new("ip").args(["netns", "del", foreign]).status().unwrap().success());
    assert_eq!(left, [true, true, true, false]);
}
