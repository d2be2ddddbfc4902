//! What kind of port an interface is and which XDP program it runs, from the kernel's routing netlink.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkInfo, LinkMessage, LinkXdp},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// What the kernel says about a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PortLink {
    /// The number of the XDP program that it runs, in whichever mode.
    pub(super) program: Option<u32>,
    /// The program runs in the kernel's stack.
    pub(super) generic: bool,
    /// It is a device on a bus, not one that the kernel made up.
    pub(super) hardware: bool,
    /// What kind of made-up device it is (`IFLA_INFO_KIND`); empty if the kernel does not say.
    pub(super) kind: String,
}

/// Asks about the interface with this index in this thread's network namespace.
pub(super) fn read_link(ifindex: u32) -> io::Result<PortLink> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut request = NetlinkMessage::new(header, RouteNetlinkMessage::GetLink(link).into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);

    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(read(&link.attributes)),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}

fn read(attributes: &[LinkAttribute]) -> PortLink {
    let mut port = PortLink::default();
    for attribute in attributes {
        match attribute {
            LinkAttribute::Xdp(xdp) => {
                port.program = xdp.iter().find_map(program);
                port.generic = xdp.iter().any(|attribute| matches!(attribute, LinkXdp::SkbProgId(_)));
            }
            LinkAttribute::ParentDevName(_) => port.hardware = true,
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
