//! What kind of port an interface is and which XDP program it runs, from the kernel's routing netlink.

use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkInfo, LinkMessage, LinkXdp},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// `linux/if_link.h`: any of an interface's names, of up to 127 bytes.
const IFLA_ALT_IFNAME: u16 = 53;
const LONGEST_NAME: usize = 127;

/// What the kernel says about a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PortLink {
    pub(super) ifindex: u32,
    pub(super) name: String,
    /// The number of the XDP program that it runs, in whichever mode.
    pub(super) program: Option<u32>,
    /// The program runs in the kernel's stack.
    pub(super) generic: bool,
    /// It is a device on a bus, not one that the kernel made up.
    pub(super) hardware: bool,
    /// What kind of made-up device it is (`IFLA_INFO_KIND`); empty if the kernel does not say.
    pub(super) kind: String,
    /// The interface of this network namespace that it is on, or for a veth, joined to.
    pub(super) joined_to: Option<u32>,
    /// The interface that it is a member of.
    controller: Option<u32>,
}

/// Asks about the interface with this index in this thread's network namespace.
pub(super) fn read_link(ifindex: u32) -> io::Result<PortLink> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    one(message)
}

/// Asks about the interface with this name, or this alternative name, in this thread's network namespace.
pub(super) fn find_link(name: &str) -> io::Result<PortLink> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let mut message = LinkMessage::default();
    let name = [name.as_bytes(), b"\0"].concat();
    message.attributes.push(LinkAttribute::Other(DefaultNla::new(IFLA_ALT_IFNAME, name)));
    one(message)
}

/// The interfaces that are members of another one, as those of a bridge are.
pub(super) fn members(controller: u32) -> io::Result<Vec<PortLink>> {
    let mut all = Vec::new();
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Controller(controller));
    let socket = send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(invalid)?;
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => all.push(read(&link)),
                NetlinkPayload::Done(_) => {
                    // A kernel that does not filter tells of all.
                    all.retain(|link| link.controller == Some(controller));
                    return Ok(all);
                }
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => return Err(io::Error::from(io::ErrorKind::InvalidData)),
            }
            rest = rest.get((answer.header.length as usize).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn one(message: LinkMessage) -> io::Result<PortLink> {
    let (answer, _) = send(message, NLM_F_REQUEST)?.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(invalid)?.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(read(&link)),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}

fn send(message: LinkMessage, flags: u16) -> io::Result<Socket> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut request = NetlinkMessage::new(header, RouteNetlinkMessage::GetLink(message).into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_ROUTE)?;
    // From now on only the kernel can send to it.
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    Ok(socket)
}

fn read(message: &LinkMessage) -> PortLink {
    let mut port = PortLink { ifindex: message.header.index, ..PortLink::default() };
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => port.name.clone_from(name),
            LinkAttribute::Xdp(xdp) => {
                port.program = xdp.iter().find_map(program);
                port.generic = xdp.iter().any(|attribute| matches!(attribute, LinkXdp::SkbProgId(_)));
            }
            LinkAttribute::ParentDevName(_) => port.hardware = true,
            LinkAttribute::Link(ifindex) => port.joined_to = Some(*ifindex),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Controller(ifindex) => port.controller = Some(*ifindex),
            LinkAttribute::LinkInfo(info) => {
                for info in info {
                    if let LinkInfo::Kind(kind) = info {
                        port.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    port.joined_to = port.joined_to.filter(|ifindex| !elsewhere && ![0, port.ifindex].contains(ifindex));
    port
}

fn program(attribute: &LinkXdp) -> Option<u32> {
    match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id)
            if *id != 0 =>
        {
            Some(*id)
        }
        _ => None,
    }
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
