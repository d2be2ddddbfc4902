//! Mirrors as processes: one that is stopped, killed or replaced loses no packet, and never decides alone.

use std::{
    cell::RefCell,
    io::{BufRead as _, BufReader},
    net::UdpSocket,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use fastswan::{
    Gateway, NetlinkHost, NetlinkSource, PassReason, XdpForwarder,
    forwarder::AttachConfig,
    policy::{MacAddr, NextHop},
    table::TableConfig,
};
use fastswan_testkit::{
    capture::Capture,
    lab::{self, BpfFileSystem},
    promote::Promote,
    site::{PEER, Site},
};
use nix::{
    net::if_::if_nametoindex,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Set for the copies of this program that mirror, to where they pin.
const MIRROR: &str = "FASTSWAN_TEST_MIRROR";
/// What the XDP program writes as source address, and the kernel does not.
const FAST: MacAddr = MacAddr([2, 0, 0, 0, 0xfa, 0x57]);
const PORT: u16 = 7000;
/// Nothing here takes longer, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(20);
const NAME: &str = "a_mirror_that_is_stopped_killed_or_replaced_loses_no_packet";

#[test]
fn a_mirror_that_is_stopped_killed_or_replaced_loses_no_packet() {
    if let Some(pins) = std::env::var_os(MIRROR) {
        mirror(&PathBuf::from(pins));
        return;
    }
    if !lab::require_root("mirrors as processes") {
        return;
    }
    let site = Site::new().unwrap();
    site.route().unwrap();
    // An optional tunnel in transport mode: without an association the kernel forwards in clear.
    site.gateway
        .ip("xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir out \
             tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode transport level use")
        .unwrap();
    let pins = BpfFileSystem::mount().unwrap();
    let pins = pins.path().join("pins");
    let traffic = Traffic::start(&site, Duration::from_millis(2));
    let start = || site.gateway.enter(|| Mirror::start(&pins));

    let first = start();
    traffic.wait_for("the fast path", |before, now| now.fast > before.fast + 50);

    first.signal(Signal::SIGSTOP);
    traffic.wait_for("the end of the lease", |before, now| now.kernel > before.kernel);
    let stopped = traffic.arrived();
    traffic.wait_for("packets in the kernel", |before, now| now.kernel > before.kernel + 50);
    assert_eq!(traffic.arrived().fast, stopped.fast, "nothing is fast without a mirror");
    first.signal(Signal::SIGCONT);
    traffic.wait_for("the fast path again", |before, now| now.fast > before.fast + 50);

    let counted = first.kill();
    traffic.wait_for("the kernel after a kill", |before, now| now.kernel > before.kernel + 50);
    let second = start();
    traffic.wait_for("the fast path of the second", |before, now| now.fast > before.fast + 50);
    second.wait_for_report(|fast| fast > counted);

    second.signal(Signal::SIGSTOP);
    let counted = second.counted();
    let third = start();
    third.wait_for_report(|fast| fast > counted);
    second.signal(Signal::SIGCONT);
    assert!(!second.end().success(), "the second is told that it was superseded");
    traffic.wait_for("the fast path of the third", |before, now| now.fast > before.fast + 50);

    // Both alive: the third goes on until the fourth knows all.
    let fourth = start();
    assert!(!third.end().success());
    let counted = fourth.counted();
    fourth.wait_for_report(|fast| fast > counted + 50);
    let (sent, arrived) = traffic.stop();
    assert_eq!(arrived.fast + arrived.kernel, sent);
    assert!(arrived.fast >= fourth.counted(), "what was counted has arrived");
}

/// Says how often a mirror replaces another one; a few times unless it is set.
const TAKEOVERS: &str = "FASTSWAN_TAKEOVERS";

#[test]
fn no_packet_is_lost_or_comes_to_an_unknown_port_while_mirrors_replace_each_other() {
    if !lab::require_root("mirrors that replace each other") {
        return;
    }
    let site = Site::new().unwrap();
    site.route().unwrap();
    site.gateway
        .ip("xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir out \
             tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode transport level use")
        .unwrap();
    let pins = BpfFileSystem::mount().unwrap();
    let pins = pins.path().join("pins");
    let traffic = Traffic::start(&site, Duration::from_millis(1));
    let start = || site.gateway.enter(|| Mirror::start(&pins));
    let mut mirror = start();
    traffic.wait_for("the fast path", |before, now| now.fast > before.fast + 50);
    let kernel = traffic.arrived().kernel;
    let takeovers = std::env::var(TAKEOVERS).map_or(5, |text| text.parse().unwrap());
    for _ in 0..takeovers {
        let next = start();
        assert!(!mirror.end().success(), "it is told that it was superseded");
        next.wait_for_report(|fast| fast > mirror.counted());
        mirror = next;
    }
    let (sent, arrived) = traffic.stop();
    let (unknown, passed) = (mirror.unknown(), arrived.kernel - kernel);
    println!(
        "{takeovers} takeovers, {sent} packets: {unknown} to an unknown port, {passed} passed meanwhile"
    );
    assert_eq!(arrived.fast + arrived.kernel, sent, "none is lost");
    assert_eq!(unknown, 0);
}

/// What the copies do: mirror the kernel's policies until another one takes over.
fn mirror(pins: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let device = if_nametoindex("out0").unwrap();
        let next_hop = NextHop::Fixed { source: FAST, destination: PEER };
        let source = Promote::new(NetlinkSource::open().unwrap(), device, next_hop, |_| true);
        let config = TableConfig { cells_v4: 256, cells_v6: 256, exceptions: 64, slots: 16 };
        let (forwarder, table) = XdpForwarder::load(&config).unwrap();
        let mut gateway = Gateway::new(source, NetlinkHost::open().unwrap(), table)
            .with_lease(Duration::from_millis(200))
            .with_forwarder(forwarder, [AttachConfig::new("lan0").complete_frames(true)])
            .unwrap()
            .pinned_in(pins);
        let handle = gateway.handle();
        let reports = async {
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                let status = handle.status().await.unwrap();
                let unknown = status.passes.get(PassReason::UnknownPort.name()).unwrap_or(&0);
                println!("unknown {unknown}\nfast {}", status.traffic().packets);
            }
        };
        let error = gateway.run_until(reports).await.unwrap_err();
        panic!("{error}");
    });
}

/// A copy of this program that mirrors.
struct Mirror {
    process: RefCell<Child>,
    /// Packets that it counted, of its last report: fast ones, and those from a port that it did not know.
    fast: Arc<AtomicU64>,
    unknown: Arc<AtomicU64>,
}

impl Mirror {
    fn start(pins: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(MIRROR, pins)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let [fast, unknown] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
        let reports = BufReader::new(process.stdout.take().unwrap());
        let (counted, counted_unknown) = (Arc::clone(&fast), Arc::clone(&unknown));
        thread::spawn(move || {
            for line in reports.lines().map_while(Result::ok) {
                if let Some(now) = line.strip_prefix("unknown ") {
                    counted_unknown.store(now.parse().unwrap(), Ordering::Relaxed);
                }
                if let Some(now) = line.strip_prefix("fast ") {
                    let now: u64 = now.parse().unwrap();
                    let before = counted.swap(now, Ordering::Relaxed);
                    assert!(now >= before, "{now} packets after {before}");
                }
            }
        });
        Self { process: RefCell::new(process), fast, unknown }
    }

    fn signal(&self, signal: Signal) {
        let id = self.process.borrow().id();
        kill(Pid::from_raw(id.cast_signed()), signal).unwrap();
    }

    fn counted(&self) -> u64 {
        self.fast.load(Ordering::Relaxed)
    }

    fn unknown(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    fn wait_for_report(&self, reached: impl Fn(u64) -> bool) {
        wait_for("a report", || reached(self.counted()));
    }

    /// Kills it, and returns what it had counted.
    fn kill(self) -> u64 {
        self.signal(Signal::SIGKILL);
        self.end();
        self.counted()
    }

    /// Waits for its end.
    fn end(&self) -> ExitStatus {
        let mut status = None;
        wait_for("the end of a mirror", || {
            status = self.process.borrow_mut().try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let mut process = self.process.borrow_mut();
        let _ = process.kill();
        let _ = process.wait();
    }
}

/// Packets that arrived at the peer, by who forwarded them.
#[derive(Clone, Copy, Debug, Default)]
struct Arrived {
    fast: u64,
    kernel: u64,
}

/// Numbered packets from the client to the peer, one after each pause.
struct Traffic {
    stop: Arc<AtomicBool>,
    arrived: Arc<Mutex<Arrived>>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<()>,
}

impl Traffic {
    fn start(site: &Site, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let arrived = Arc::new(Mutex::new(Arrived::default()));
        let mut capture = Capture::open(&site.peer).unwrap();
        let (ending, counts) = (Arc::clone(&stop), Arc::clone(&arrived));
        let receiver = thread::spawn(move || {
            loop {
                let Some(captured) = capture.next(Duration::from_millis(500)).unwrap() else {
                    if ending.load(Ordering::Relaxed) {
                        return;
                    }
                    continue;
                };
                let to_port = captured.frame.get(36..38) == Some(&PORT.to_be_bytes()[..]);
                if captured.received && to_port {
                    let mut counts = counts.lock().unwrap();
                    if captured.frame[6..12] == FAST.0 { counts.fast += 1 } else { counts.kernel += 1 }
                }
            }
        });
        let socket = site.client.enter(|| UdpSocket::bind("10.1.0.5:0")).unwrap();
        // Nobody answers that the port is closed.
        let sink = site.peer.enter(|| UdpSocket::bind(("10.2.0.9", PORT))).unwrap();
        let ending = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let mut sent = 0;
            while !ending.load(Ordering::Relaxed) {
                socket.send_to(&[0; 64], ("10.2.0.9", PORT)).unwrap();
                sent += 1;
                sleep(pause);
            }
            drop(sink);
            sent
        });
        Self { stop, arrived, sender, receiver }
    }

    fn arrived(&self) -> Arrived {
        *self.arrived.lock().unwrap()
    }

    fn wait_for(&self, what: &str, reached: impl Fn(Arrived, Arrived) -> bool) {
        let before = self.arrived();
        wait_for(what, || reached(before, self.arrived()));
    }

    /// How many were sent, and what has arrived.
    fn stop(self) -> (u64, Arrived) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        self.receiver.join().unwrap();
        let arrived = *self.arrived.lock().unwrap();
        (sent, arrived)
    }
}

fn wait_for(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        sleep(Duration::from_millis(2));
    }
}
