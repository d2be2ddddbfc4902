//! The mirror as a process in a namespace: it answers whoever scrapes it.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
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
    /// One that serves its metrics and tells nothing else.
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mirror"));
        command.args(["lan0", "--complete-frames", "--metrics", ADDRESS, "--report", "0"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tells a story on the gateway of a site.
fn story(what: &str, tell: impl FnOnce(&Site) + Send) {
    if !lab::require_root(what) {
        return;
    }
    let site = Site::new().unwrap();
    site.route().unwrap();
    site.gateway.ip("link set lo up").unwrap();
    site.gateway.enter(|| tell(&site));
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
    story("a mirror that serves metrics", |site| {
        let _mirror = Mirror::start();
        wait_for_lines(&[
            "fastswan_current 1",
            "fastswan_policies{state=\"fast\",reason=\"\"} 0",
            "fastswan_resyncs_total{input=\"policies\",cause=\"start\"} 1",
            "fastswan_events_total 1",
            "# TYPE fastswan_lag_seconds histogram",
            "# TYPE fastswan_fast_packets_total counter",
        ]);
        site.gateway
            .ip("xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir out \
                 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
            .unwrap();
        wait_for_lines(&["fastswan_events_total 2"]);
    });
}

/// Changes the address of the gateway's port, and waits until frames to it are taken and only policies are missing.
fn wait_until_followed(site: &Site) {
    const NEW: &str = "02:00:00:00:00:77";
    site.gateway.ip(&format!("link set lan0 address {NEW}")).unwrap();
    site.client.ip(&format!("neighbour replace 10.1.0.1 lladdr {NEW} dev eth0")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        site.client.enter(|| UdpSocket::bind("10.1.0.5:0").unwrap().send_to(b"", "10.2.0.9:9").unwrap());
        let answer = scrape().unwrap_or_default();
        if answer.contains("fastswan_passed_packets_total{reason=\"no_policy\"}") {
            return;
        }
        assert!(Instant::now() < deadline, "never taken:\n{answer}");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_host_that_changes_all_the_time_is_followed_to_the_end() {
    story("a mirror of a host that changes", |site| {
        let _mirror = Mirror::start();
        wait_for_lines(&["fastswan_current 1"]);
        // Far more than can be read one by one, or without being interrupted.
        let mut storm = tempfile::NamedTempFile::new().unwrap();
        for host in 0..20_000 {
            let route = format!("10.3.{}.{}/32", host % 200 / 100, host % 100);
            writeln!(storm, "route replace {route} via 192.0.2.2\nroute delete {route}").unwrap();
        }
        site.gateway.ip(&format!("-batch {}", storm.path().display())).unwrap();
        wait_until_followed(site);
    });
}

#[test]
fn an_address_that_is_taken_is_named() {
    story("a mirror that serves metrics", |_| {
        let _taken = TcpListener::bind(ADDRESS).unwrap();
        let mut mirror = Mirror::start();
        let mut said = String::new();
        mirror.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!mirror.0.wait().unwrap().success());
        assert!(said.contains("cannot serve metrics on 127.0.0.1:9100"), "{said}");
    });
}
