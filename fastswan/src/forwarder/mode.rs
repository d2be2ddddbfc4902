//! Where in the kernel the program runs.

/// How the program is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// Native if the driver can, otherwise generic; [`Attachment::fallback`](super::Attachment::fallback) tells why.
    #[default]
    Automatic,
    /// In the driver, before the kernel allocates a packet: the fast way.
    Native,
    /// In the kernel's stack: works with every driver and gains less. Not for an interface on top of others (a VLAN,
    /// macvlan, bond, or bridge with members): there packets arrive merged and without their VLAN tags.
    Generic,
}
