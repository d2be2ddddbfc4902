//! Hosts to try things on: network namespaces, joined by veth pairs, that are gone when the test is.
//!
//! A [`Namespace`] removes itself when it is dropped, when a test panics, and, after
//! [`clean_up_on_signals`], when the process is told to stop. Names carry the process's number, so that
//! [`remove_leftovers`] can tell what a killed process left behind.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use fastswan::policy::MacAddr;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
};

use crate::sys::{Ethtool, ProgramPlace, attach_program, ethtool_set, feature_set, packet_socket};

/// Where `ip netns` keeps namespaces.
const NETNS: &str = "/run/netns";
const PREFIX: &str = "fsw";

/// Namespaces of this process that exist.
static EXISTING: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Something in a lab could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A program could not be started.
    #[error("cannot run `{command}`: {error}; install the Debian package iproute2")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed: {message}")]
    Command {
        /// The command line.
        command: String,
        /// What it said.
        message: String,
    },
    /// A system call failed.
    #[error("{attempt} failed: {error}")]
    System {
        /// What was tried, on which object.
        attempt: String,
        /// Why.
        #[source]
        error: io::Error,
    },
}

impl LabError {
    fn system(attempt: impl Into<String>, error: impl Into<io::Error>) -> Self {
        Self::System { attempt: attempt.into(), error: error.into() }
    }
}

/// A network namespace with nothing but loopback, which is up.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one; the hint becomes part of its name.
    ///
    /// # Errors
    ///
    /// [`LabError`], for instance without root.
    pub fn new(hint: &str) -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}-{}-{number}-{hint}", std::process::id());
        existing().insert(name.clone());
        let namespace = Self { name };
        ip(&["netns", "add", &namespace.name])?;
        namespace.ip("link set lo up")?;
        // Nothing that the story does not tell: no address detection, no solicitations, no filters.
        for (key, value) in [
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.default.router_solicitations", "0"),
            ("net.ipv6.conf.default.accept_ra", "0"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.default.rp_filter", "0"),
        ] {
            namespace.sysctl(key, value)?;
        }
        Ok(namespace)
    }

    /// Its name, as `ip netns list` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a closure on a thread that is in the namespace, and waits for it.
    ///
    /// # Panics
    ///
    /// If the closure does, or if the namespace cannot be entered.
    pub fn enter<T: Send>(&self, story: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.join_this_thread().expect("entering a namespace");
                story()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    ///
    /// [`LabError::System`].
    pub fn join_this_thread(&self) -> Result<(), LabError> {
        let path = format!("{NETNS}/{}", self.name);
        let file = File::open(&path).map_err(|error| LabError::system(format!("opening {path}"), error))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .map_err(|error| LabError::system(format!("entering {path}"), error))
    }

    /// Runs `ip` in the namespace and returns what it prints. Arguments are split at spaces.
    ///
    /// # Errors
    ///
    /// [`LabError::Start`] or [`LabError::Command`].
    pub fn ip(&self, arguments: &str) -> Result<String, LabError> {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments.split_whitespace());
        ip(&all)
    }

    /// Runs a program in the namespace, with arguments that are separated by spaces.
    ///
    /// # Errors
    ///
    /// [`LabError::Start`] or [`LabError::Command`].
    pub fn run(&self, command: &str) -> Result<(), LabError> {
        let mut words = command.split_whitespace();
        let mut program = Command::new(words.next().unwrap_or_default());
        let output = self.enter(|| program.args(words).output());
        let output = output.map_err(|error| LabError::Start { command: command.to_owned(), error })?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(LabError::Command { command: command.to_owned(), message })
    }

    /// Sets a sysctl, written with dots, or with slashes if a name in it has a dot.
    ///
    /// # Errors
    ///
    /// [`LabError::System`].
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        // /proc/sys/net is that of the thread that opens it.
        let key = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
        let path = format!("/proc/sys/{key}");
        self.enter(|| fs::write(&path, value))
            .map_err(|error| LabError::system(format!("setting {key} to {value}"), error))
    }

    /// The interface index of a device.
    ///
    /// # Errors
    ///
    /// [`LabError::System`].
    pub fn ifindex(&self, device: &str) -> Result<u32, LabError> {
        self.enter(|| nix::net::if_::if_nametoindex(device))
            .map_err(|error| LabError::system(format!("looking for {device}"), error))
    }

    /// Turns a feature of a device on or off, by the kernel's name of it, as in `rx-vlan-hw-parse`.
    ///
    /// # Errors
    ///
    /// [`LabError::System`].
    pub fn set_feature(&self, device: &str, feature: &str, on: bool) -> Result<(), LabError> {
        self.enter(|| feature_set(device, feature, on))
            .map_err(|error| LabError::system(format!("setting {feature} of {device}"), error))
    }

    /// Forwards IPv4 and IPv6.
    ///
    /// # Errors
    ///
    /// [`LabError::System`].
    pub fn forward(&self) -> Result<(), LabError> {
        self.sysctl("net.ipv4.ip_forward", "1")?;
        self.sysctl("net.ipv6.conf.all.forwarding", "1")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// A BPF file system of one's own, to pin in; it is gone when it is dropped.
#[derive(Debug)]
pub struct BpfFileSystem {
    directory: PathBuf,
}

impl BpfFileSystem {
    /// Mounts one on a new temporary directory.
    ///
    /// # Errors
    ///
    /// [`LabError::System`], for instance without root.
    pub fn mount() -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("{PREFIX}-{}-{number}", std::process::id()));
        let failed = |error: io::Error| LabError::system(format!("mounting {}", directory.display()), error);
        fs::create_dir(&directory).map_err(failed)?;
        let data: Option<&str> = None;
        mount(Some("bpf"), &directory, Some("bpf"), MsFlags::empty(), data)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self { directory })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }
}

impl Drop for BpfFileSystem {
    fn drop(&mut self) {
        let _ = umount2(&self.directory, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.directory);
    }
}

/// One end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Where it is.
    pub namespace: &'a Namespace,
    /// Its name.
    pub device: &'a str,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its addresses, with prefix lengths.
    pub addresses: &'a [&'a str],
}

/// Joins two namespaces by a veth pair that is up.
///
/// Frames are complete: nothing is left to a device that does not exist, neither checksums nor segmentation nor
/// VLAN tags. Both ends poll (GRO is on), without which the kernel drops what XDP sends to them, but they merge
/// nothing: what is captured is what was sent.
///
/// # Errors
///
/// [`LabError`].
pub fn join(left: End<'_>, right: End<'_>, mtu: u32) -> Result<(), LabError> {
    join_with(None, None, left, right, mtu)
}

/// Like [`join`], and the left device gets this interface index.
///
/// # Errors
///
/// [`LabError`].
pub fn join_with_index(index: Option<u32>, left: End<'_>, right: End<'_>, mtu: u32) -> Result<(), LabError> {
    join_with(index, None, left, right, mtu)
}

/// Like [`join`], and both devices have this many queues in each direction. What XDP sends on a CPU arrives in the queue with the
/// number of the CPU, or that modulo the number of queues.
///
/// # Errors
///
/// [`LabError`].
pub fn join_with_queues(queues: u32, left: End<'_>, right: End<'_>, mtu: u32) -> Result<(), LabError> {
    join_with(None, Some(queues), left, right, mtu)
}

fn join_with(
    index: Option<u32>,
    queues: Option<u32>,
    left: End<'_>,
    right: End<'_>,
    mtu: u32,
) -> Result<(), LabError> {
    let index = index.map(|index| format!("index {index}")).unwrap_or_default();
    let queues =
        queues.map(|queues| format!("numrxqueues {queues} numtxqueues {queues}")).unwrap_or_default();
    let describe = |end: End<'_>| {
        format!("{} address {} mtu {mtu} {queues} netns {}", end.device, end.mac, end.namespace.name())
    };
    let command = format!("link add {index} {} type veth peer name {}", describe(left), describe(right));
    ip(&command.split_whitespace().collect::<Vec<_>>())?;
    for end in [left, right] {
        end.namespace.enter(|| complete_frames(end.device))?;
        // Nothing that is merged may be longer than a byte.
        end.namespace.ip(&format!("link set {} gro_max_size 1", end.device))?;
    }
    // Only now: when an end is switched on, the kernel decides whether it takes frames from XDP, by whether
    // the other one polls.
    for end in [left, right] {
        end.switch_on()?;
    }
    Ok(())
}

/// Has a veth device of this thread's network namespace send complete frames, leave nothing to others, and poll.
pub(crate) fn complete_frames(device: &str) -> Result<(), LabError> {
    let settings = [
        (Ethtool::TxChecksums, 0),
        (Ethtool::TcpSegmentation, 0),
        (Ethtool::Segmentation, 0),
        (Ethtool::Flags, 0),
        (Ethtool::Gro, 1),
    ];
    settings.into_iter().try_for_each(|(command, value)| {
        ethtool_set(device, command, value)
            .map_err(|error| LabError::system(format!("{command:?} of {device}"), error))
    })
}

/// Has a veth device of this thread's network namespace poll, or not: only if it does, its peer takes redirected frames.
///
/// # Errors
///
/// [`LabError`].
pub fn set_gro(device: &str, on: bool) -> Result<(), LabError> {
    ethtool_set(device, Ethtool::Gro, u32::from(on))
        .map_err(|error| LabError::system(format!("GRO of {device}"), error))
}

impl End<'_> {
    /// Makes a device that is in the initial namespace this end, and switches it on.
    ///
    /// # Errors
    ///
    /// [`LabError`].
    pub fn plug(&self, device: &str, mtu: u32) -> Result<(), LabError> {
        ip(&["link", "set", device, "netns", self.namespace.name(), "name", self.device])?;
        self.namespace.ip(&format!("link set {} address {} mtu {mtu}", self.device, self.mac))?;
        self.switch_on()
    }

    fn switch_on(&self) -> Result<(), LabError> {
        for address in self.addresses {
            let detection = if address.contains(':') { "nodad" } else { "" };
            self.namespace.ip(&format!("address add {address} dev {} {detection}", self.device))?;
        }
        self.namespace.ip(&format!("link set {} up", self.device)).map(drop)
    }
}

/// Tells the two ends of a veth pair about each other, so that no neighbour need be asked for.
///
/// # Errors
///
/// [`LabError`].
pub fn introduce(one: End<'_>, other: End<'_>) -> Result<(), LabError> {
    for (here, there) in [(one, other), (other, one)] {
        for address in there.addresses {
            let address = address.split('/').next().unwrap_or_default();
            let (mac, device) = (there.mac, here.device);
            here.namespace.ip(&format!("neighbour replace {address} lladdr {mac} dev {device}"))?;
        }
    }
    Ok(())
}

/// The wire behind a device of this thread's network namespace: every write sends one frame from the device,
/// as it is.
///
/// # Errors
///
/// [`LabError::System`].
pub fn wire(device: &str) -> Result<File, LabError> {
    let open = || packet_socket(nix::net::if_::if_nametoindex(device)?, 0);
    let socket = open().map_err(|error| LabError::system(format!("opening the wire of {device}"), error))?;
    Ok(File::from(socket))
}

/// Attaches a tcx program that drops to a device of this thread's network namespace, where packets come in or where they
/// leave, until what this returns is closed.
///
/// # Errors
///
/// [`LabError::System`].
pub fn drop_at_tcx(device: &str, egress: bool) -> Result<OwnedFd, LabError> {
    const TCX_DROP: i32 = 2;
    let ifindex = nix::net::if_::if_nametoindex(device);
    let ifindex = ifindex.map_err(|error| LabError::system(format!("looking for {device}"), error))?;
    attach_program(ProgramPlace::Tcx { ifindex, egress }, TCX_DROP)
        .map_err(|error| LabError::system(format!("attaching a tcx program to {device}"), error))
}

/// Attaches a BPF program that drops to netfilter's forward hook of IPv4 in this thread's network namespace, until what this
/// returns is closed.
///
/// # Errors
///
/// [`LabError::System`].
pub fn drop_at_forward_hook() -> Result<OwnedFd, LabError> {
    const NF_DROP: i32 = 0;
    let place = ProgramPlace::Netfilter { family: 2, hook: 2 };
    attach_program(place, NF_DROP)
        .map_err(|error| LabError::system("attaching a BPF program to netfilter", error))
}

/// Whether this process may make namespaces and load programs, for tests that need it.
///
/// # Panics
///
/// If it may not although it must: when `CI` is set, or `FASTSWAN_REQUIRE_TIERS` names tier 1.
#[must_use]
pub fn require_root(what: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let tiers = std::env::var("FASTSWAN_REQUIRE_TIERS").unwrap_or_default();
    let required = std::env::var_os("CI").is_some() || tiers.split(',').any(|tier| tier == "1");
    assert!(!required, "{what}: this test needs root");
    eprintln!("NOT RUN, needs root: {what}");
    false
}

/// Removes all namespaces of this process when it is told to stop (SIGINT, SIGTERM, SIGHUP), and exits.
///
/// # Errors
///
/// If a handler is installed already.
pub fn clean_up_on_signals() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        // Held for good: nobody makes another one.
        let existing = existing();
        existing.iter().for_each(|name| delete(name));
        std::process::exit(130);
    })
}

/// Removes namespaces whose process is gone.
pub fn remove_leftovers() {
    let Ok(entries) = fs::read_dir(NETNS) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut parts = name.split('-');
        if let (Some(PREFIX), Some(Ok(process))) = (parts.next(), parts.next().map(str::parse::<u32>))
            && !fs::exists(format!("/proc/{process}")).unwrap_or(true)
        {
            delete(&name);
        }
    }
}

fn existing() -> std::sync::MutexGuard<'static, BTreeSet<String>> {
    EXISTING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(name: &str) {
    let mut existing = existing();
    if existing.remove(name) {
        delete(name);
    }
}

/// Errors are of no use here: what is not there need not be removed.
fn delete(name: &str) {
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

/// Has one process of `ip`, with some options, run many commands, a line each.
pub(crate) fn batch(options: &[&str], lines: &str) -> Result<(), LabError> {
    let command = format!("ip {} -batch -", options.join(" "));
    let start = |error| LabError::Start { command: command.clone(), error };
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut input) = child.stdin.take() {
        // If it has gone, it says why.
        let _ = input.write_all(lines.as_bytes());
    }
    let output = child.wait_with_output().map_err(start)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::Command { command: format!("{command} <<< {}", lines.trim()), message })
}

/// Runs `ip` in this thread's namespace.
pub(crate) fn ip(arguments: &[&str]) -> Result<String, LabError> {
    let command = format!("ip {}", arguments.join(" "));
    let output = Command::new("ip").args(arguments).output();
    let output = output.map_err(|error| LabError::Start { command: command.clone(), error })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::Command { command, message })
}
