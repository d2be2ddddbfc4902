//! Asks the kernel for everything it has: policies, associations, the default policy.
//!
//! In threads of its own: policies and associations are read side by side, and whoever waits for a [`Dump`] goes on with
//! other things meanwhile.

use std::{
    collections::BTreeSet,
    io, thread,
    time::{Duration, Instant},
};

use netlink_packet_xfrm::constants::{
    XFRM_MSG_GETDEFAULT, XFRM_MSG_GETPOLICY, XFRM_MSG_GETSA, XFRM_MSG_GETSADINFO, XFRM_MSG_GETSPDINFO,
};
use netlink_sys::protocols::NETLINK_XFRM;

use super::{
    anchor::{Anchor, Job},
    decode::{self, Content, DecodeError, counted},
    request::{DUMP, RequestError, Requests},
};
use crate::{
    event::{PolicyEvent, Snapshot},
    policy::{DefaultPolicy, OffloadDev},
};

/// Lengths of the requests' fixed parts in bytes (`linux/xfrm.h`).
const POLICY_ID_LENGTH: usize = 64;
const SA_ID_LENGTH: usize = 24;
const DEFAULT_LENGTH: usize = 4;
const INFO_LENGTH: usize = 4;

/// A dump that takes longer has been forgotten.
const DUMP_LIMIT: Duration = Duration::from_secs(30);

/// Room for more is only made as they come.
const MOST_EXPECTED: usize = 1 << 20;

/// Before Linux 5.14 there was no default policy: everything was accepted.
const NO_SUCH_REQUEST: i32 = libc::EINVAL;

/// Returns when every request that the kernel had begun to handle is done and notified of: it handles one at a time in
/// each namespace (`xfrm_cfg_mutex`), those of `PF_KEY` too.
pub(crate) fn settle() -> io::Result<()> {
    let request = (XFRM_MSG_GETSPDINFO, 0, &[0; INFO_LENGTH][..]);
    Ok(Requests::open(NETLINK_XFRM)?.ask(request, |_, _| Ok::<_, RequestError>(()))?)
}

/// How to dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DumpConfig {
    /// Of the sockets, in bytes, as in `SO_RCVBUF`.
    pub(crate) receive_buffer: usize,
    /// Larval associations count as complete ones.
    pub(crate) count_larval: bool,
}

/// A dump could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DumpError {
    #[error("{0}")]
    System(io::Error),
    #[error("{0}")]
    Request(RequestError),
    #[error("{0}")]
    Decode(DecodeError),
    #[error("policies or associations changed while they were being read")]
    Interrupted,
}

impl From<io::Error> for DumpError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl From<RequestError> for DumpError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Interrupted => Self::Interrupted,
            error => Self::Request(error),
        }
    }
}

impl From<DecodeError> for DumpError {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

impl DumpError {
    /// What a system call or the kernel answered.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::System(error) | Self::Request(RequestError::System(error)) => error.raw_os_error(),
            Self::Request(RequestError::Refused(errno)) => Some(*errno),
            _ => None,
        }
    }
}

/// Everything, and the devices that it is offloaded to.
#[derive(Debug, Default)]
pub(crate) struct Dumped {
    pub(crate) snapshot: Snapshot,
    pub(crate) devices: BTreeSet<u32>,
}

/// A dump in progress. If it is dropped, its threads end with the next datagram.
#[derive(Debug)]
pub(crate) struct Dump(Job<Result<Dumped, DumpError>>);

impl Dump {
    /// Begins to read, in the namespace of the anchor.
    pub(crate) fn start(anchor: &Anchor, config: DumpConfig) -> Self {
        Self(anchor.run_unless_dropped("fastswan-dump", move |is_awaited| {
            let began = Instant::now();
            let go_on = || {
                if !is_awaited() {
                    Err(DumpError::Interrupted)
                } else if began.elapsed() > DUMP_LIMIT {
                    Err(io::Error::from(io::ErrorKind::TimedOut).into())
                } else {
                    Ok(())
                }
            };
            read_all(Reader::open(config)?, Reader::open(config)?, &go_on)
        }))
    }

    /// Waits until everything is there. Cancel-safe.
    pub(crate) async fn finish(&mut self) -> Result<Dumped, DumpError> {
        (&mut self.0).await.map_err(DumpError::System)?
    }
}

fn read_all(
    mut policies: Reader,
    mut sas: Reader,
    go_on: &(impl Fn() -> Result<(), DumpError> + Sync),
) -> Result<Dumped, DumpError> {
    thread::scope(|scope| {
        let sas = thread::Builder::new()
            .name("fastswan-dump".to_owned())
            .spawn_scoped(scope, || sas.associations(go_on))?;
        let mut dumped = policies.policies(go_on)?;
        let gone = |_| DumpError::System(io::Error::other("the thread that reads associations has gone"));
        let sas = sas.join().map_err(gone)??;
        dumped.snapshot.sas = sas.snapshot.sas;
        dumped.devices.extend(sas.devices);
        // Last of all: it waits for a lock that covers changes together with their notifications (`xfrm_cfg_mutex`), so
        // all that was seen here has been told of when this is answered, but for what has expired.
        dumped.snapshot.default_policy = policies.default_policy(go_on)?;
        Ok(dumped)
    })
}

/// Asks for one thing after the other.
#[derive(Debug)]
struct Reader {
    kernel: Requests,
    count_larval: bool,
}

impl Reader {
    fn open(config: DumpConfig) -> io::Result<Self> {
        let kernel = Requests::open(NETLINK_XFRM)?;
        kernel.set_receive_buffer(config.receive_buffer)?;
        Ok(Self { kernel, count_larval: config.count_larval })
    }

    fn associations(&mut self, go_on: &impl Fn() -> Result<(), DumpError>) -> Result<Dumped, DumpError> {
        let mut dumped = Dumped::default();
        dumped.snapshot.sas.reserve_exact(self.expected(XFRM_MSG_GETSADINFO));
        self.ask((XFRM_MSG_GETSA, DUMP, &[0; SA_ID_LENGTH]), go_on, |event| {
            if let PolicyEvent::Sa(sa) = event {
                dumped.devices.extend(sa.offload.map(index));
                dumped.snapshot.sas.push(sa);
            }
        })?;
        Ok(dumped)
    }

    fn policies(&mut self, go_on: &impl Fn() -> Result<(), DumpError>) -> Result<Dumped, DumpError> {
        let mut dumped = Dumped::default();
        dumped.snapshot.policies.reserve_exact(self.expected(XFRM_MSG_GETSPDINFO));
        self.ask((XFRM_MSG_GETPOLICY, DUMP, &[0; POLICY_ID_LENGTH]), go_on, |event| {
            if let PolicyEvent::Policy(policy) = event {
                dumped.devices.extend(policy.offload.map(index));
                dumped.snapshot.policies.push(policy);
            }
        })?;
        Ok(dumped)
    }

    fn default_policy(
        &mut self,
        go_on: &impl Fn() -> Result<(), DumpError>,
    ) -> Result<DefaultPolicy, DumpError> {
        let mut answer = DefaultPolicy::default();
        let asked = self.ask((XFRM_MSG_GETDEFAULT, 0, &[0; DEFAULT_LENGTH]), go_on, |event| {
            if let PolicyEvent::DefaultPolicy(default_policy) = event {
                answer = default_policy;
            }
        });
        match asked {
            Ok(()) | Err(DumpError::Request(RequestError::Refused(NO_SUCH_REQUEST))) => Ok(answer),
            Err(error) => Err(error),
        }
    }

    /// Passes on what is answered to a request of this kind, with these flags and this fixed part.
    fn ask(
        &mut self,
        (kind, flags, fixed): (u16, u16, &[u8]),
        go_on: &impl Fn() -> Result<(), DumpError>,
        mut take: impl FnMut(PolicyEvent),
    ) -> Result<(), DumpError> {
        self.kernel.send(kind, flags, fixed).map_err(RequestError::System)?;
        loop {
            go_on()?;
            let last = self.kernel.read(|kind, payload| {
                if let Content::Event(event) = decode::read(kind, payload)?.counting_larval(self.count_larval)
                {
                    take(event);
                }
                Ok::<_, DumpError>(())
            })?;
            if last {
                return Ok(());
            }
        }
    }

    /// About how many the kernel has, for room to be made at once. It may not say.
    fn expected(&mut self, request: u16) -> usize {
        let mut expected = 0;
        let asked = self.kernel.ask((request, 0, &[0; INFO_LENGTH]), |_, payload| {
            expected = counted(payload).min(MOST_EXPECTED);
            Ok::<_, RequestError>(())
        });
        asked.map_or(0, |()| expected)
    }
}

fn index(device: OffloadDev) -> u32 {
    device.ifindex
}
