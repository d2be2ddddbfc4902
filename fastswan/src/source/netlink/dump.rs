//! Asks the kernel for everything it has: policies, associations, the default policy.
//!
//! On a socket of its own: a notification on the same socket whose sequence number happens to be the
//! request's would end a dump early. A [`Dump`] can be waited for, given up and waited for again; what it has
//! read so far stays with it.

use std::io;

use netlink_packet_xfrm::constants::{
    XFRM_MSG_GETDEFAULT, XFRM_MSG_GETPOLICY, XFRM_MSG_GETSA, XFRM_MSG_GETSPDINFO,
};
use netlink_sys::protocols::NETLINK_XFRM;

use super::{
    super::{PolicyEvent, Snapshot},
    NetlinkConfig,
    decode::{Content, DecodeError, decode},
    socket::{Datagram, NetlinkSocket, pass_through},
};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;

/// Lengths of a message's header and of the requests' fixed parts in bytes (`linux/netlink.h`, `linux/xfrm.h`).
const HEADER_LENGTH: u32 = 16;
const POLICY_ID_LENGTH: u32 = 64;
const SA_ID_LENGTH: u32 = 24;
const DEFAULT_LENGTH: u32 = 4;
const SPD_INFO_LENGTH: usize = 4;

/// Before Linux 5.14 there was no default policy: everything was accepted.
const NO_SUCH_REQUEST: i32 = libc::EINVAL;

/// Returns when every request that the kernel had begun to handle is done and notified of: it handles one at a time in
/// each namespace (`xfrm_cfg_mutex`), those of `PF_KEY` too.
pub(super) fn settle() -> io::Result<()> {
    match pass_through(NETLINK_XFRM, XFRM_MSG_GETSPDINFO, &[0; SPD_INFO_LENGTH])? {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A dump could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("policies or associations changed while they were being read")]
    Interrupted,
}

/// A dump in progress.
#[derive(Debug)]
pub(super) struct Dump {
    socket: NetlinkSocket,
    /// Number of what is being asked for, from 1, which is also the request's sequence number.
    stage: u32,
    count_larval: bool,
    snapshot: Snapshot,
}

impl Dump {
    /// Asks for the first part.
    pub(super) fn start(config: &NetlinkConfig) -> io::Result<Self> {
        let socket = NetlinkSocket::open(NETLINK_XFRM, &[], Some(config.receive_buffer))?;
        let dump =
            Self { socket, stage: 1, count_larval: config.count_larval, snapshot: Snapshot::default() };
        dump.ask()?;
        Ok(dump)
    }

    /// Reads on until everything is there.
    pub(super) async fn finish(&mut self) -> Result<Snapshot, DumpError> {
        loop {
            if let Some(snapshot) = self.step().await? {
                return Ok(snapshot);
            }
        }
    }

    /// Reads one datagram: everything if it was the last one.
    pub(super) async fn step(&mut self) -> Result<Option<Snapshot>, DumpError> {
        let datagram = self.socket.receive().await?;
        if self.take(&datagram)? {
            self.stage += 1;
            if self.request().is_none() {
                return Ok(Some(std::mem::take(&mut self.snapshot)));
            }
            self.ask()?;
        }
        Ok(None)
    }

    /// Type, flags and length of the fixed part of what is being asked for; `None` at the end.
    fn request(&self) -> Option<(u16, u16, u32)> {
        match self.stage {
            // Associations first, so that no policy is seen without its association.
            1 => Some((XFRM_MSG_GETSA, NLM_F_REQUEST | NLM_F_DUMP, SA_ID_LENGTH)),
            2 => Some((XFRM_MSG_GETPOLICY, NLM_F_REQUEST | NLM_F_DUMP, POLICY_ID_LENGTH)),
            3 => Some((XFRM_MSG_GETDEFAULT, NLM_F_REQUEST, DEFAULT_LENGTH)),
            _ => None,
        }
    }

    fn asks_for(&self, kind: u16) -> bool {
        self.request().is_some_and(|(asked, ..)| asked == kind)
    }

    fn ask(&self) -> io::Result<()> {
        let Some((kind, flags, fixed)) = self.request() else { return Ok(()) };
        let length = HEADER_LENGTH + fixed;
        let mut request = Vec::from(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(flags.to_ne_bytes());
        request.extend(self.stage.to_ne_bytes());
        // Our port number; the kernel knows it.
        request.extend(0_u32.to_ne_bytes());
        // The fixed part: zeros ask for all.
        request.resize(length as usize, 0);
        self.socket.send(&request)
    }

    /// Takes what a datagram says; true when the current part is complete.
    fn take(&mut self, datagram: &Datagram) -> Result<bool, DumpError> {
        if datagram.sender != 0 {
            return Ok(false);
        }
        if datagram.truncated {
            return Err(DumpError::Interrupted);
        }
        let mut done = false;
        for message in decode(&datagram.bytes)? {
            if message.sequence != self.stage {
                continue;
            }
            if message.interrupted {
                return Err(DumpError::Interrupted);
            }
            match message.content.counting_larval(self.count_larval) {
                Content::Event(PolicyEvent::Policy(policy)) => self.snapshot.policies.push(policy),
                Content::Event(PolicyEvent::Sa(sa)) => self.snapshot.sas.push(sa),
                Content::Event(PolicyEvent::DefaultPolicy(default_policy)) => {
                    self.snapshot.default_policy = default_policy;
                    done = true;
                }
                Content::Done(0) => done = true,
                Content::Error(NO_SUCH_REQUEST) if self.asks_for(XFRM_MSG_GETDEFAULT) => done = true,
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
