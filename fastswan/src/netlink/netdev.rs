//! Whether a device takes frames that XDP redirects to it: the kernel drops them, after the program has said
//! where they go, if it does not. The `netdev` family of generic netlink tells (Linux 6.3).

use std::{error::Error, fmt::Debug, io};

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NetlinkDeserializable, NetlinkSerializable, Nla as _, NlasIterator,
    Parseable as _, ParseableParametrized,
};
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{
        GenlCtrl, GenlCtrlCmd,
        nlas::{GenlCtrlAttrs, McastGrpAttrs},
    },
};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::request::Requests;

/// `linux/netdev.h`
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_XDP_ACT_NDO_XMIT: u64 = 4;
/// `NETDEV_MCGRP_MGMT`
const MANAGEMENT: &str = "mgmt";

/// Whether a device of this thread's network namespace takes redirected frames at the moment.
///
/// # Errors
///
/// The errno of a system call; `ENODEV` without such a device, `ENOENT` before Linux 6.3.
pub(crate) fn takes_redirected_frames(ifindex: u32) -> io::Result<bool> {
    let mut kernel = Requests::open(NETLINK_GENERIC)?;

    let id = family(&mut kernel)?.into_iter().find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(id) => Some(id),
        _ => None,
    });

    let ifindex = DefaultNla::new(NETDEV_A_DEV_IFINDEX, ifindex.to_ne_bytes().to_vec());
    let mut get = GenlMessage::from_payload(Netdev(vec![ifindex]));
    get.set_resolved_family_id(id.ok_or_else(|| invalid("the netdev family has no number"))?);
    let Netdev(attributes) = request(&mut kernel, &get)?;
    let features = attributes.iter().find(|attribute| attribute.kind() == NETDEV_A_DEV_XDP_FEATURES);
    let features = features.and_then(|attribute| {
        let mut value = vec![0; attribute.value_len()];
        attribute.emit_value(&mut value);
        value.try_into().ok().map(u64::from_ne_bytes)
    });
    Ok(features.is_some_and(|features| features & NETDEV_XDP_ACT_NDO_XMIT != 0))
}

/// The multicast group that hears when what a device can do changes.
///
/// # Errors
///
/// The errno of a system call; `ENOENT` before Linux 6.3.
pub(super) fn management_group() -> io::Result<u32> {
    let attributes = family(&mut Requests::open(NETLINK_GENERIC)?)?;
    let groups = attributes.into_iter().find_map(|attribute| match attribute {
        GenlCtrlAttrs::McastGroups(groups) => Some(groups),
        _ => None,
    });
    let is_named = |group: &Vec<McastGrpAttrs>| {
        group.iter().any(|attribute| matches!(attribute, McastGrpAttrs::Name(name) if name == MANAGEMENT))
    };
    let group = groups.into_iter().flatten().find(is_named);
    let id = group.into_iter().flatten().find_map(|attribute| match attribute {
        McastGrpAttrs::Id(id) => Some(id),
        McastGrpAttrs::Name(_) => None,
    });
    id.ok_or_else(|| invalid("the netdev family has no group that tells of devices"))
}

/// What there is to know about the `netdev` family.
fn family(kernel: &mut Requests) -> io::Result<Vec<GenlCtrlAttrs>> {
    let name = GenlCtrlAttrs::FamilyName(Netdev::family_name().to_owned());
    let family = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] };
    Ok(request(kernel, &GenlMessage::from_payload(family))?.nlas)
}

/// A message of the `netdev` family: its attributes.
#[derive(Clone, Debug)]
struct Netdev(Vec<DefaultNla>);

impl GenlFamily for Netdev {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        NETDEV_CMD_DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Netdev {
    fn buffer_len(&self) -> usize {
        self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Netdev {
    fn parse_with_param(buffer: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        NlasIterator::new(buffer)
            .map(|attribute| DefaultNla::parse(&attribute?))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// Sends a request and returns what its answer holds.
fn request<F>(kernel: &mut Requests, message: &GenlMessage<F>) -> io::Result<F>
where
    F: Debug,
    GenlMessage<F>: NetlinkSerializable + NetlinkDeserializable<Error = DecodeError>,
{
    let answer = kernel.ask_for(0, message)?.pop();
    answer.map(|message| message.payload).ok_or_else(|| invalid("no answer to a request"))
}

fn invalid(reason: impl Into<Box<dyn Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
