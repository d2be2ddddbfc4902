//! Follows what hooks into the kernel's way of forwarding.
//!
//! A thread in the namespace reads all of it, and again what may have changed: at once after a notification about
//! `nf_tables`, filters of tc or links, and ten times a second what the kernel does not tell of, which is legacy tables, tcx
//! programs, IPVS, and other functions at netfilter's hooks. A part that cannot be read counts as a hook for everything, with the reason as its name.
//!
//! # What a forwarded packet meets
//!
//! On the device that it comes in on, and then on the VLAN device that it is handed to: XDP, tc and netfilter's ingress hook.
//! In the IP layer: prerouting, forward and postrouting. Then the packet of an offloaded tunnel, which the kernel leaves
//! unchanged, goes to the device of the association (`xfrm_dev_direct_output`, Linux 6.14), and meets netfilter's egress hook
//! and tc there; before that version it goes through output and postrouting first. XDP programs see received frames
//! only, so one on the device that it leaves by does not matter.

mod attribute;
mod devices;
mod functions;
mod ipvs;
mod legacy_tables;
mod modules;
mod nf_tables;
mod traffic_control;

use std::{
    fs, io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use netlink_packet_core::NetlinkBuffer;
use netlink_sys::{
    Socket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::watch;

use self::{
    devices::Devices,
    functions::Functions,
    legacy_tables::LegacyTables,
    modules::{Missing, NF_TABLES, NFNETLINK},
};
use super::{
    anchor::{Anchor, IsAwaited, Job},
    request::{RequestError, Requests},
    socket::{receive, set_receive_buffer},
};
use crate::{
    host::{Hook, HookKind, HookPlace},
    policy::Family,
};

/// Between two looks at what the kernel does not tell of.
const LOOK: Duration = Duration::from_millis(100);
/// What was looked at longer ago is not known any longer.
const FRESH: Duration = Duration::from_millis(250);
/// Between two readings, at least, and as long as the first has taken: so that at most half of a processor is busy.
const PAUSE: Duration = Duration::from_millis(10);

/// Holds what a burst of changes brings; when it overruns, all is read.
const RECEIVE_BUFFER: usize = 1 << 20;
/// Notifications that are looked at at once; if there are more, all is read.
const MOST_UNREAD: usize = 4096;

const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_TC: u32 = 4;
const NFNLGRP_NFTABLES: u32 = 7;

/// Follows the hooks of a network namespace.
#[derive(Debug)]
pub(crate) struct HookWatch {
    hooks: watch::Receiver<Option<Vec<Hook>>>,
    /// When the thread looked last: it has told all that there was then.
    looked: Arc<Mutex<Option<Instant>>>,
    _thread: Job<()>,
}

impl HookWatch {
    /// Starts to follow those of the anchor's namespace.
    pub(crate) fn start(anchor: &Anchor) -> Self {
        let (sender, hooks) = watch::channel(None);
        let looked = Arc::new(Mutex::new(None));
        let told = looked.clone();
        let thread = anchor.run_unless_dropped("fastswan-hooks", move |is_awaited| {
            follow(&sender, &told, is_awaited);
        });
        Self { hooks, looked, _thread: thread }
    }

    /// Waits until there are other hooks than this has returned last, and returns all of them. Cancel-safe.
    pub(crate) async fn changed(&mut self) -> io::Result<Vec<Hook>> {
        self.hooks.changed().await.map_err(|_| ended())?;
        Ok(self.now())
    }

    /// The same, if that is so already.
    pub(crate) fn try_changed(&mut self) -> io::Result<Option<Vec<Hook>>> {
        let has_changed = self.hooks.has_changed().map_err(|_| ended())?;
        Ok(has_changed.then(|| self.now()))
    }

    /// Whether [`Self::changed`] has returned all that there was a quarter of a second ago, or later.
    pub(crate) fn caught_up(&self) -> io::Result<bool> {
        let looked = *self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_fresh = looked.is_some_and(|looked| looked.elapsed() <= FRESH);
        Ok(is_fresh && !self.hooks.has_changed().map_err(|_| ended())?)
    }

    fn now(&mut self) -> Vec<Hook> {
        self.hooks.borrow_and_update().clone().unwrap_or_default()
    }
}

fn ended() -> io::Error {
    io::Error::other("the thread that follows hooks could not be started, or has failed")
}

/// The hooks of the calling thread's namespace.
pub(crate) fn read_hooks() -> Vec<Hook> {
    Reader::new().read(Due::ALL)
}

/// What is to be read.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    devices: bool,
    nf_tables: bool,
    filters: bool,
}

impl Due {
    const ALL: Self = Self { devices: true, nf_tables: true, filters: true };

    fn add(&mut self, other: Self) {
        self.devices |= other.devices;
        self.nf_tables |= other.nf_tables;
        self.filters |= other.filters;
    }
}

fn follow(
    sender: &watch::Sender<Option<Vec<Hook>>>,
    looked: &Mutex<Option<Instant>>,
    is_awaited: &IsAwaited<'_>,
) {
    let mut ears = Ears::open();
    let mut reader = Reader::new();
    let mut due = Due::ALL;
    while is_awaited() {
        let began = Instant::now();
        reader.missing.look_again();
        // What was not heard before is to be read, which `hear` says of sockets that there are not.
        due.add(ears.hear());
        ears.open_again(&reader.missing);
        let hooks = reader.read(due);
        due = reader.failed();
        let is_new = |told: &mut Option<Vec<Hook>>| {
            let is_new = told.as_ref() != Some(&hooks);
            *told = Some(hooks);
            is_new
        };
        sender.send_if_modified(is_new);
        *looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(began);
        std::thread::sleep(began.elapsed().max(PAUSE));
        ears.wait(LOOK.saturating_sub(began.elapsed()));
    }
}

/// Subscribed to what the kernel tells.
#[derive(Debug)]
struct Ears {
    /// `None` if that cannot be heard: then it is read at each look.
    nf_tables: Option<Socket>,
    route: Option<Socket>,
    buffer: BytesMut,
}

impl Ears {
    fn open() -> Self {
        let heard = |protocol, groups: &[u32]| {
            subscribe(protocol, groups)
                .inspect_err(|error| tracing::debug!(%error, protocol, "hooks are polled"))
                .ok()
        };
        Self {
            nf_tables: heard(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES]),
            route: heard(NETLINK_ROUTE, &[RTNLGRP_LINK, RTNLGRP_TC]),
            buffer: BytesMut::new(),
        }
    }

    /// Subscribes to what could not be heard so far.
    fn open_again(&mut self, missing: &Missing) {
        if self.nf_tables.is_none() && !missing.has(NFNETLINK) {
            self.nf_tables = subscribe(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES]).ok();
        }
        if self.route.is_none() {
            self.route = subscribe(NETLINK_ROUTE, &[RTNLGRP_LINK, RTNLGRP_TC]).ok();
        }
    }

    /// What may have changed since the last time.
    fn hear(&mut self) -> Due {
        let nf_tables = Due { nf_tables: true, ..Due::default() };
        let of_nf_tables = |kind| if nf_tables::is_change(kind) { nf_tables } else { Due::default() };
        let of_route = |kind| match kind {
            RTM_NEWLINK | RTM_DELLINK => Due { devices: true, ..Due::default() },
            _ => Due { filters: traffic_control::is_change(kind), ..Due::default() },
        };
        let route = Due { devices: true, filters: true, ..Due::default() };
        let mut due = drain(self.nf_tables.as_ref(), &mut self.buffer, nf_tables, of_nf_tables);
        due.add(drain(self.route.as_ref(), &mut self.buffer, route, of_route));
        due
    }

    /// Returns when there is something to hear, or after this time.
    fn wait(&self, longest: Duration) {
        let sockets = self.nf_tables.iter().chain(&self.route);
        let mut sockets: Vec<_> = sockets.map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        let longest = Timespec { tv_sec: 0, tv_nsec: longest.subsec_nanos().into() };
        if poll(&mut sockets, Some(&longest)).is_err() {
            std::thread::sleep(PAUSE);
        }
    }
}

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;

fn subscribe(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    set_receive_buffer(&socket, RECEIVE_BUFFER)?;
    socket.bind_auto()?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    Ok(socket)
}

/// Reads all notifications that there are. `everything` is what is due if they cannot be told apart.
fn drain(
    socket: Option<&Socket>,
    buffer: &mut BytesMut,
    everything: Due,
    of_message: impl Fn(u16) -> Due,
) -> Due {
    let Some(socket) = socket else { return everything };
    let mut due = Due::default();
    for _ in 0..MOST_UNREAD {
        match receive(socket, buffer, libc::MSG_DONTWAIT) {
            Ok(datagram) if datagram.sender != 0 => {}
            Ok(datagram) => {
                let mut rest = &datagram.bytes[..];
                while !rest.is_empty() {
                    let Ok(message) = NetlinkBuffer::new_checked(rest) else { return everything };
                    due.add(of_message(message.message_type()));
                    rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
                }
                if datagram.truncated {
                    return everything;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return due,
            // An overrun: more may be unread.
            Err(_) => due = everything,
        }
    }
    everything
}

/// Reads the hooks part by part, and knows those that were not read again.
#[derive(Debug)]
struct Reader {
    devices: Devices,
    nf_tables: Part,
    filters: Part,
    programs: Part,
    tables: Part,
    services: Part,
    links: Part,
    others: Part,
    legacy: LegacyTables,
    functions: Functions,
    missing: Missing,
    /// The families whose connections are tracked, if the kernel lists that.
    tracked: Option<Vec<Family>>,
    /// Packets that go into an offloaded tunnel pass the output hook.
    output: bool,
}

/// The hooks of one kind, or why they are not known.
#[derive(Debug, Default)]
struct Part {
    hooks: Vec<Hook>,
    has_failed: bool,
}

impl Part {
    fn take<E: Into<io::Error>>(&mut self, kind: HookKind, what: &str, read: Result<Vec<Hook>, E>) {
        self.has_failed = read.is_err();
        self.hooks = read.unwrap_or_else(|error| {
            let error: io::Error = error.into();
            let remedy = match (kind, error.raw_os_error()) {
                // Files in /proc that only root's group may read.
                (HookKind::IpTables, Some(libc::EACCES)) => "; run with CAP_DAC_READ_SEARCH, or as root",
                _ => super::remedy(&error),
            };
            let name = format!("what there is of {what} cannot be read: {error}{remedy}");
            vec![Hook { kind, place: HookPlace::Forwarding(None), name }]
        });
    }
}

impl Reader {
    fn new() -> Self {
        let part = Part::default;
        Self {
            devices: Devices::default(),
            nf_tables: part(),
            filters: part(),
            programs: part(),
            tables: part(),
            services: part(),
            links: part(),
            others: part(),
            legacy: LegacyTables::default(),
            functions: Functions::default(),
            missing: Missing::default(),
            tracked: None,
            output: meets_output(),
        }
    }

    /// Reads what is due and what the kernel does not tell of. All hooks, in an order of their own.
    fn read(&mut self, mut due: Due) -> Vec<Hook> {
        if due.devices {
            let devices = Requests::open(NETLINK_ROUTE)
                .map_err(Into::into)
                .and_then(|mut kernel| Devices::read(&mut kernel));
            if let Ok(devices) = &devices
                && *devices != self.devices
            {
                // Chains and filters name devices.
                due.nf_tables |= !self.missing.has(NF_TABLES);
                due.filters = true;
                self.devices = devices.clone();
            }
            self.links.take(HookKind::Xdp, "links", devices.map(|devices| devices.xdp()));
        }
        if due.nf_tables {
            let hooks = self.read_nf_tables();
            self.nf_tables.take(HookKind::NfTables, "nf_tables", hooks);
        }
        if due.filters {
            let kernel = Requests::open(NETLINK_ROUTE).map_err(RequestError::from);
            let hooks = kernel.and_then(|mut kernel| traffic_control::read(&mut kernel, &self.devices));
            self.filters.take(HookKind::Tc, "filters of tc", hooks);
        }
        self.programs.take(HookKind::Tc, "tcx programs", traffic_control::tcx(&self.devices));
        self.tables.take(HookKind::IpTables, "legacy tables of iptables", self.legacy.read(self.output));
        self.services.take(HookKind::Ipvs, "services of IPVS", ipvs::read());
        let listing = self.functions.read(self.output, &mut self.missing);
        self.tracked = listing.as_ref().ok().and_then(|listing| listing.tracked.clone());
        self.others.take(
            HookKind::Netfilter,
            "functions at netfilter's hooks",
            listing.map(|listing| listing.hooks),
        );
        let parts = [
            &self.others,
            &self.nf_tables,
            &self.filters,
            &self.programs,
            &self.tables,
            &self.services,
            &self.links,
        ];
        let mut hooks: Vec<Hook> = parts.into_iter().flat_map(|part| part.hooks.clone()).collect();
        if let Some(tracked) = &self.tracked {
            correct_tracking(&mut hooks, tracked);
        }
        hooks.sort_unstable();
        hooks.dedup();
        hooks
    }

    /// What is to be read again because it could not be.
    fn failed(&self) -> Due {
        Due {
            devices: self.links.has_failed,
            nf_tables: self.nf_tables.has_failed,
            filters: self.filters.has_failed,
        }
    }

    fn read_nf_tables(&mut self) -> Result<Vec<Hook>, RequestError> {
        if self.missing.has(NFNETLINK) {
            return Ok(Vec::new());
        }
        let kernel = match Requests::open(NETLINK_NETFILTER) {
            Ok(kernel) => Ok(kernel),
            // The kernel has no netfilter that is asked by netlink.
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                self.missing.note(NFNETLINK);
                return Ok(Vec::new());
            }
            Err(error) => Err(error),
        };
        match nf_tables::read(&mut kernel?, &self.devices, self.output) {
            // Nor has it nf_tables.
            Err(RequestError::Refused(libc::EINVAL | libc::EOPNOTSUPP)) => {
                self.missing.note(NF_TABLES);
                Ok(Vec::new())
            }
            other => other,
        }
    }
}

/// Where the kernel lists whose connections are tracked, that counts. The rules that ask for it are its names.
fn correct_tracking(hooks: &mut Vec<Hook>, tracked: &[Family]) {
    let is_of = |place, family| match place {
        HookPlace::Forwarding(of) => of.is_none_or(|of| of == family),
        _ => false,
    };
    hooks.retain(|hook| {
        hook.kind != HookKind::Conntrack || tracked.iter().any(|family| is_of(hook.place, *family))
    });
    for family in tracked {
        let is_named = |hook: &Hook| hook.kind == HookKind::Conntrack && is_of(hook.place, *family);
        if !hooks.iter().any(is_named) {
            hooks.push(Hook {
                kind: HookKind::Conntrack,
                place: HookPlace::Forwarding(Some(*family)),
                name: "connections are tracked".to_owned(),
            });
        }
    }
}

/// Whether the kernel takes packets that it has forwarded into an offloaded tunnel through the output hook, as it does
/// before Linux 6.14.
fn meets_output() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split('.').map_while(|number| number.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version < (6, 14)
}
