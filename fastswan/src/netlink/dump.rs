//! Asks the kernel for everything it has: policies, associations, the default policy.
//!
//! On sockets of its own: a notification on the same socket whose sequence number happens to be the
//! request's would end a dump early. And in threads of its own: policies and associations are read side by side, and
//! whoever waits for a [`Dump`] goes on with other things meanwhile.

use std::{
    collections::BTreeSet,
    io, thread,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use netlink_packet_xfrm::constants::{
    XFRM_MSG_GETDEFAULT, XFRM_MSG_GETPOLICY, XFRM_MSG_GETSA, XFRM_MSG_GETSADINFO, XFRM_MSG_GETSPDINFO,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use tokio::sync::oneshot;

use super::{
    decode::{Content, DecodeError, Messages, counted},
    socket::{Datagram, converse, pass_through, receive, request, set_receive_buffer},
};
use crate::{
    event::{PolicyEvent, Snapshot},
    policy::{DefaultPolicy, OffloadDev},
};

const NLM_F_DUMP: u16 = 0x300;

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
    match pass_through(NETLINK_XFRM, XFRM_MSG_GETSPDINFO, &[0; INFO_LENGTH])? {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
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
    System(#[from] io::Error),
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("policies or associations changed while they were being read")]
    Interrupted,
}

/// Everything, and the devices that it is offloaded to.
#[derive(Debug, Default)]
pub(crate) struct Dumped {
    pub(crate) snapshot: Snapshot,
    pub(crate) devices: BTreeSet<u32>,
}

/// A dump in progress. If it is dropped, its threads end with the next datagram.
#[derive(Debug)]
pub(crate) struct Dump(oneshot::Receiver<Result<Dumped, DumpError>>);

impl Dump {
    /// Begins to read.
    pub(crate) fn start(config: DumpConfig) -> io::Result<Self> {
        let (policies, sas) = (Reader::open(config)?, Reader::open(config)?);
        let (result, receiver) = oneshot::channel();
        thread::Builder::new().name("fastswan-dump".to_owned()).spawn(move || {
            let began = Instant::now();
            let go_on = || {
                if result.is_closed() {
                    Err(DumpError::Interrupted)
                } else if began.elapsed() > DUMP_LIMIT {
                    Err(io::Error::from(io::ErrorKind::TimedOut).into())
                } else {
                    Ok(())
                }
            };
            let dumped = read_all(policies, sas, &go_on);
            // Nobody waits for it any longer if this fails.
            let _ = result.send(dumped);
        })?;
        Ok(Self(receiver))
    }

    /// Waits until everything is there. Cancel-safe.
    pub(crate) async fn finish(&mut self) -> Result<Dumped, DumpError> {
        let gone = |_| DumpError::System(io::Error::other("the thread that reads has gone"));
        (&mut self.0).await.map_err(gone)?
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

/// A socket that is asked one thing after the other.
#[derive(Debug)]
struct Reader {
    socket: Socket,
    buffer: BytesMut,
    /// Of the latest request.
    sequence: u32,
    count_larval: bool,
}

impl Reader {
    fn open(config: DumpConfig) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_XFRM)?;
        set_receive_buffer(&socket, config.receive_buffer)?;
        // The kernel has answered before the call returns that asks. Should it not, the thread ends all the same.
        set_socket_timeout(&socket, Timeout::Recv, Some(DUMP_LIMIT))?;
        socket.bind_auto()?;
        Ok(Self { socket, buffer: BytesMut::new(), sequence: 0, count_larval: config.count_larval })
    }

    fn associations(&mut self, go_on: &impl Fn() -> Result<(), DumpError>) -> Result<Dumped, DumpError> {
        let mut dumped = Dumped::default();
        dumped.snapshot.sas.reserve_exact(expected(XFRM_MSG_GETSADINFO));
        self.ask((XFRM_MSG_GETSA, NLM_F_DUMP, SA_ID_LENGTH), go_on, |event| {
            if let PolicyEvent::Sa(sa) = event {
                dumped.devices.extend(sa.offload.map(index));
                dumped.snapshot.sas.push(sa);
            }
        })?;
        Ok(dumped)
    }

    fn policies(&mut self, go_on: &impl Fn() -> Result<(), DumpError>) -> Result<Dumped, DumpError> {
        let mut dumped = Dumped::default();
        dumped.snapshot.policies.reserve_exact(expected(XFRM_MSG_GETSPDINFO));
        self.ask((XFRM_MSG_GETPOLICY, NLM_F_DUMP, POLICY_ID_LENGTH), go_on, |event| {
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
        self.ask((XFRM_MSG_GETDEFAULT, 0, DEFAULT_LENGTH), go_on, |event| {
            if let PolicyEvent::DefaultPolicy(default_policy) = event {
                answer = default_policy;
            }
        })?;
        Ok(answer)
    }

    /// Sends a request of this kind, with these flags and a fixed part of zeros of this length, and passes on what is
    /// answered.
    fn ask(
        &mut self,
        (kind, flags, fixed): (u16, u16, usize),
        go_on: &impl Fn() -> Result<(), DumpError>,
        mut take: impl FnMut(PolicyEvent),
    ) -> Result<(), DumpError> {
        self.sequence += 1;
        let request = request(kind, flags, self.sequence, &vec![0; fixed]);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        loop {
            go_on()?;
            let datagram = receive(&self.socket, &mut self.buffer, 0)?;
            if self.take(&datagram, kind, &mut take)? {
                return Ok(());
            }
        }
    }

    /// Passes on what a datagram says; true if it is the last one.
    fn take(
        &self,
        datagram: &Datagram,
        asked: u16,
        take: &mut impl FnMut(PolicyEvent),
    ) -> Result<bool, DumpError> {
        if datagram.sender != 0 {
            return Ok(false);
        }
        if datagram.truncated {
            return Err(DumpError::Interrupted);
        }
        let mut done = false;
        for message in Messages(&datagram.bytes) {
            let message = message?;
            if message.sequence != self.sequence {
                continue;
            }
            if message.interrupted {
                return Err(DumpError::Interrupted);
            }
            match message.content {
                Content::Larval(sa) if self.count_larval && sa.id.spi != 0 => take(PolicyEvent::Sa(sa)),
                Content::Event(event) => {
                    // This answer is not a dump.
                    done |= matches!(event, PolicyEvent::DefaultPolicy(_));
                    take(event);
                }
                Content::Done(0) => done = true,
                Content::Error(NO_SUCH_REQUEST) if asked == XFRM_MSG_GETDEFAULT => done = true,
                Content::Done(errno) | Content::Error(errno) if errno != 0 => {
                    return Err(io::Error::from_raw_os_error(errno).into());
                }
                Content::Overrun => return Err(DumpError::Interrupted),
                _ => {}
            }
        }
        Ok(done)
    }
}

fn index(device: OffloadDev) -> u32 {
    device.ifindex
}

/// About how many the kernel has, for room to be made at once. It may not say.
fn expected(request: u16) -> usize {
    let answer = converse(NETLINK_XFRM, request, &[0; INFO_LENGTH]);
    answer.map_or(0, |answer| counted(&answer.bytes)).min(MOST_EXPECTED)
}
