//! The mirror's command line: what it says when it cannot run, and that nobody need read what it prints.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use fastswan_testkit::lab::{self, Namespace};

const MIRROR: &str = env!("CARGO_BIN_EXE_mirror");
/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(20);

/// Tells a story in a namespace that has the veth pair lan0 and lan1.
fn story(what: &str, tell: impl FnOnce() + Send) {
    if !lab::require_root(what) {
        return;
    }
    let namespace = Namespace::new("command-line").unwrap();
    namespace.ip("link add lan0 type veth peer name lan1").unwrap();
    namespace.enter(tell);
}

/// What a mirror that cannot run says: one error, with these words.
fn assert_says(command: &mut Command, words: &[&str]) {
    let Output { status, stderr, .. } = command.env("RUST_BACKTRACE", "0").output().unwrap();
    let told = String::from_utf8(stderr).unwrap();
    assert!(status.code().is_some_and(|code| code != 0), "{status}: {told}");
    assert!(!told.contains("panicked"), "{told}");
    let errors: Vec<_> = told.lines().filter(|line| line.to_lowercase().starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{told}");
    for word in words {
        assert!(errors[0].contains(word), "{:?} says nothing of {word:?}", errors[0]);
    }
}

fn mirror(arguments: &[&str]) -> Command {
    let mut mirror = Command::new(MIRROR);
    mirror.args(["--guard", "off", "--complete-frames"]).args(arguments);
    mirror
}

#[test]
fn what_cannot_be_attached_to_is_said_with_the_remedy() {
    story("a mirror of no interface", || {
        assert_says(&mut mirror(&["lan7"]), &["lan7", "`ip link`"]);
        assert_says(&mut mirror(&["lan0", "lan0"]), &["lan0", "name it once"]);
        assert_says(&mut mirror(&["lan0@lan1"]), &["give lan0"]);
        let mut incomplete = Command::new(MIRROR);
        assert_says(incomplete.args(["--guard", "off", "lan0"]), &["lan0", "ethtool -K"]);
    });
}

#[test]
fn a_table_of_no_or_absurd_size_is_refused() {
    story("a mirror without a table", || {
        for size in ["0", "4294967295"] {
            for option in ["--policies", "--cells-v4", "--cells-v6"] {
                assert_says(&mut mirror(&["lan0", option, size]), &[size, "from 1 to"]);
            }
        }
    });
}

#[test]
fn a_missing_capability_is_named() {
    story("a mirror without a capability", || {
        for (lacking, set) in
            [("CAP_NET_ADMIN", "-sys_admin,-net_admin"), ("CAP_PERFMON", "-sys_admin,-perfmon")]
        {
            let mut command = Command::new("setpriv");
            command.arg(format!("--bounding-set={set}")).arg(MIRROR).args(["--complete-frames", "lan0"]);
            assert_says(&mut command, &[&format!("lacks {lacking}"), "or as root"]);
        }
    });
}

#[test]
fn a_mirror_whose_reports_nobody_reads_goes_on() {
    story("a mirror whose reader is gone", || {
        let mut running =
            mirror(&["lan0", "--report", "1"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut reports = BufReader::new(running.stdout.take().unwrap());
        let mut line = String::new();
        reports.read_line(&mut line).unwrap();
        assert!(!line.is_empty());
        drop(reports);
        // Long enough for two more reports.
        sleep(Duration::from_millis(2500));
        assert_eq!(running.try_wait().unwrap(), None, "it goes on");
        let told = Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
        assert!(told.success());
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = running.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "{status}");
    });
}
