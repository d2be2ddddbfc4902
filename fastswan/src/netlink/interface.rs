//! What kind of port an interface is and which XDP program it runs, from the kernel's routing netlink.

use std::io;

use netlink_packet_core::DefaultNla;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkInfo, LinkLayerType, LinkMessage, LinkXdp},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::request::{DUMP, Requests};

/// `linux/if_link.h`: any of an interface's names, of up to 127 bytes.
const IFLA_ALT_IFNAME: u16 = 53;
const LONGEST_NAME: usize = 127;

/// What the kernel says about a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortLink {
    pub(crate) ifindex: u32,
    pub(crate) name: String,
    /// The number of the XDP program that it runs, in whichever mode.
    pub(crate) program: Option<u32>,
    /// The program runs in the kernel's stack.
    pub(crate) generic: bool,
    /// It is a device on a bus, not one that the kernel made up.
    pub(crate) hardware: bool,
    /// It is the loopback interface.
    pub(crate) loopback: bool,
    /// What kind of made-up device it is (`IFLA_INFO_KIND`); empty if the kernel does not say.
    pub(crate) kind: String,
    /// The interface of this network namespace that it is on, or for a veth, joined to.
    pub(crate) joined_to: Option<u32>,
    /// The interface that it is a member of.
    controller: Option<u32>,
}

/// Asks about the interface with this index in this thread's network namespace.
pub(crate) fn read_link(ifindex: u32) -> io::Result<PortLink> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    one(message)
}

/// Asks about the interface with this name, or this alternative name, in this thread's network namespace.
pub(crate) fn find_link(name: &str) -> io::Result<PortLink> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let mut message = LinkMessage::default();
    let name = [name.as_bytes(), b"\0"].concat();
    message.attributes.push(LinkAttribute::Other(DefaultNla::new(IFLA_ALT_IFNAME, name)));
    one(message)
}

/// The interfaces that are members of another one, as those of a bridge are.
pub(crate) fn members(controller: u32) -> io::Result<Vec<PortLink>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Controller(controller));
    let mut all = ask(DUMP, message)?;
    // A kernel that does not filter tells of all.
    all.retain(|link| link.controller == Some(controller));
    Ok(all)
}

fn one(message: LinkMessage) -> io::Result<PortLink> {
    ask(0, message)?.into_iter().next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn ask(flags: u16, message: LinkMessage) -> io::Result<Vec<PortLink>> {
    let answers = Requests::open(NETLINK_ROUTE)?.ask_for(flags, &RouteNetlinkMessage::GetLink(message))?;
    let links = answers.iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(read(link)),
        _ => None,
    });
    Ok(links.collect())
}

fn read(message: &LinkMessage) -> PortLink {
    let header = &message.header;
    let loopback = header.link_layer_type == LinkLayerType::Loopback;
    let mut port = PortLink { ifindex: header.index, loopback, ..PortLink::default() };
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
