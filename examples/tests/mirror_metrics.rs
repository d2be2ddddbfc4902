//! The mirror as a process in a namespace: it answers whoever scrapes it.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use fastswan_testkit::{lab, site::Site};

const ADDRESS: &str = "127.0.0.1:9100";
/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(20);

struct Mirror(Child);

impl Mirror {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mirror"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is served, if anybody answers.
fn scrape() -> Option<String> {
    let mut stream = TcpStream::connect(ADDRESS).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Some(answer)
}

fn wait_for_lines(lines: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = scrape().unwrap_or_default();
        let missing: Vec<_> = lines.iter().filter(|line| !answer.lines().any(|own| own == **line)).collect();
        if missing.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{missing:?} are missing in:\n{answer}");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_mirror_answers_a_scrape_with_what_the_kernel_has() {
    if !lab::require_root("a mirror that serves metrics") {
        return;
    }
    let site = Site::new().unwrap();
    site.route().unwrap();
    let gateway = &site.gateway;
    gateway.ip("link set lo up").unwrap();
    gateway.enter(|| {
        let arguments = ["lan0", "--complete-frames", "--metrics", ADDRESS, "--report", "0"];
        let _mirror = Mirror::start(&arguments);
        wait_for_lines(&[
            "fastswan_current 1",
            "fastswan_policies{state=\"fast\",reason=\"\"} 0",
            "fastswan_resyncs_total{cause=\"start\"} 1",
            "fastswan_events_total 1",
            "fastswan_lag_seconds_count 1",
            "# TYPE fastswan_fast_packets_total counter",
        ]);
        gateway
            .ip("xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir out \
                 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
            .unwrap();
        wait_for_lines(&["fastswan_events_total 2", "fastswan_lag_seconds_count 2"]);
    });
}

#[test]
fn an_address_that_is_taken_is_named() {
    if !lab::require_root("a mirror that serves metrics") {
        return;
    }
    let site = Site::new().unwrap();
    site.gateway.ip("link set lo up").unwrap();
    site.gateway.enter(|| {
        let _taken = TcpListener::bind(ADDRESS).unwrap();
        let mut mirror = Mirror::start(&["lan0", "--complete-frames", "--metrics", ADDRESS]);
        let mut said = String::new();
        mirror.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!mirror.0.wait().unwrap().success());
        assert!(said.contains("cannot serve metrics on 127.0.0.1:9100"), "{said}");
    });
}
