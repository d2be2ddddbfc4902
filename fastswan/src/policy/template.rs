//! What a policy asks for.

use std::{
    net::IpAddr,
    ops::{Deref, DerefMut},
};

use smallvec::SmallVec;

use super::IPPROTO_ESP;

/// How a security association wraps packets (`XFRM_MODE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Only the payload is protected; hosts only.
    Transport,
    /// The whole packet is protected, inside a new one.
    Tunnel,
    /// Another mode of the kernel, by its number; never fast.
    Other(u8),
}

/// One step of what a policy asks for (`struct xfrm_user_tmpl`).
///
/// ```
/// use fastswan::policy::{Mode, Template};
///
/// let tunnel = Template::esp_tunnel("192.0.2.1".parse()?, "192.0.2.2".parse()?, 7);
/// assert_eq!((tunnel.mode, tunnel.reqid, tunnel.optional), (Mode::Tunnel, 7, false));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Template {
    /// Tunnel or transport.
    pub mode: Mode,
    /// IPsec protocol, [`IPPROTO_ESP`] for NICs.
    pub protocol: u8,
    /// The SPI, if the policy is bound to one association; 0 is any.
    pub spi: u32,
    /// Outer source address.
    pub source: IpAddr,
    /// Outer destination address.
    pub destination: IpAddr,
    /// Binds a policy to the associations that have the same number. Outbound, 0 is a number like others
    /// (`xfrm_state_find`).
    pub reqid: u32,
    /// The step may be left out when there is no association (`level use`).
    pub optional: bool,
}

impl Template {
    /// A required ESP tunnel between two outer addresses, for associations with this reqid and any SPI.
    #[must_use]
    pub fn esp_tunnel(source: IpAddr, destination: IpAddr, reqid: u32) -> Self {
        Self {
            mode: Mode::Tunnel,
            protocol: IPPROTO_ESP,
            spi: 0,
            source,
            destination,
            reqid,
            optional: false,
        }
    }
}

/// The templates of a policy, outermost last. Nearly all policies have one, which then is part of them:
/// `[template].into()`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Templates(SmallVec<[Template; 1]>);

impl Deref for Templates {
    type Target = [Template];

    fn deref(&self) -> &[Template] {
        &self.0
    }
}

impl DerefMut for Templates {
    fn deref_mut(&mut self) -> &mut [Template] {
        &mut self.0
    }
}

impl<const N: usize> From<[Template; N]> for Templates {
    fn from(templates: [Template; N]) -> Self {
        templates.into_iter().collect()
    }
}

impl From<Vec<Template>> for Templates {
    fn from(templates: Vec<Template>) -> Self {
        Self(templates.into())
    }
}

impl FromIterator<Template> for Templates {
    fn from_iter<I: IntoIterator<Item = Template>>(templates: I) -> Self {
        Self(templates.into_iter().collect())
    }
}

impl Extend<Template> for Templates {
    fn extend<I: IntoIterator<Item = Template>>(&mut self, templates: I) {
        self.0.extend(templates);
    }
}
