//! A source of policies that are written down: in code, or in a TOML file.
//!
//! Whoever writes a static policy vouches for its security association. The source yields an assumed
//! association beside each policy; this exists here and in the testkit's lab adapter only.

use std::net::IpAddr;

use async_trait::async_trait;

use super::{PolicyEvent, PolicySource, Snapshot, SourceError};
use crate::policy::{
    Direction, Egress, Family, OffloadDev, OffloadKind, Overhead, Policy, PolicyId, SecurityAssociation,
    Selector, Template,
};

/// SPIs of assumed associations count up from here. Real ones may be the same; they are never on the wire.
const FIRST_ASSUMED_SPI: u32 = 0xffff_0000;

/// A tunnel policy that someone vouches for: its device encrypts what is sent to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticPolicy {
    /// Its packets.
    pub selector: Selector,
    /// Interface index of the device.
    pub device: u32,
    /// Outer addresses of the tunnel: this host's, and its peer's.
    pub tunnel: (IpAddr, IpAddr),
    /// Lower is better.
    pub priority: u32,
    /// How its packets leave.
    pub egress: Egress,
}

impl StaticPolicy {
    /// The policy with this number in its source, and the association that it is assumed to have.
    fn assume(&self, number: u32) -> (Policy, SecurityAssociation) {
        let (source, destination) = self.tunnel;
        let offload = Some(OffloadDev { ifindex: self.device, kind: OffloadKind::Packet, inbound: false });
        let reqid = number + 1;
        let template = Template::esp_tunnel(source, destination, reqid);
        let policy = Policy {
            priority: self.priority,
            templates: [template].into(),
            offload,
            egress: self.egress,
            ..Policy::new(PolicyId::new(Direction::Out, self.selector))
        };
        let outer = Family::from(destination);
        let spi = FIRST_ASSUMED_SPI.wrapping_add(number);
        let sa = SecurityAssociation {
            offload,
            overhead: Some(Overhead::aes_gcm_tunnel(outer, false, 16)),
            ..SecurityAssociation::for_template(&template, spi)
        };
        (policy, sa)
    }
}

/// A source that says all it knows at once and never changes.
///
/// It yields one [`PolicyEvent::Snapshot`] and ends.
#[derive(Clone, Debug)]
pub struct StaticSource(Option<Snapshot>);

impl StaticSource {
    /// These policies, each with an assumed association.
    #[must_use]
    pub fn new(policies: &[StaticPolicy]) -> Self {
        let assumed = (0..).zip(policies).map(|(number, policy)| policy.assume(number));
        let (policies, sas) = assumed.unzip();
        Self(Some(Snapshot { policies, sas, ..Snapshot::default() }))
    }

    /// What a TOML text says: an array `policy` of tables with the fields
    ///
    /// - `source`, `destination`: the prefixes between which packets are sent;
    /// - `device`: name of the interface, in the calling thread's network namespace;
    /// - `local`, `peer`: the outer addresses of the tunnel, of the same family;
    /// - `priority`: optional, 0 if left out; lower is better;
    /// - `next-hop`: optional: `"device"` (the default), `"neighbour"`, or a table with `source` and
    ///   `destination`; see [`NextHop`](crate::policy::NextHop);
    /// - `max-length`: optional, bytes from the IP header on.
    ///
    /// # Errors
    ///
    /// [`StaticSourceError`] with the line, the field and what is allowed there.
    #[cfg(feature = "serde")]
    pub fn from_toml(text: &str) -> Result<Self, StaticSourceError> {
        let file: written::File = toml::from_str(text)?;
        let policies: Result<Vec<_>, _> = file.policy.into_iter().map(TryInto::try_into).collect();
        Ok(Self::new(&policies?))
    }
}

#[async_trait]
impl PolicySource for StaticSource {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        Ok(self.0.take().map(PolicyEvent::Snapshot))
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        Ok(self.0.is_none())
    }
}

/// A TOML text does not describe policies.
#[cfg(feature = "serde")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StaticSourceError {
    /// It is not TOML, or a field is wrong, missing or unknown.
    #[error("static policies: {0}")]
    Toml(#[from] toml::de::Error),
    /// A policy is for a device that does not exist.
    #[error("policy {selector}: no interface named {device}: check its name with `ip link`")]
    NoSuchInterface {
        /// The policy.
        selector: Box<Selector>,
        /// The name of the device.
        device: String,
    },
    /// A policy is between IPv4 and IPv6.
    #[error("static policies: {0}")]
    MixedFamilies(#[from] crate::policy::MixedFamilies),
    /// The two ends of a tunnel are of different families, or not of the policy's.
    #[error(
        "policy {selector}: the tunnel's ends {local} and {peer} must be of its address family: \
         kernels forward nothing into an offloaded tunnel of another"
    )]
    MixedTunnel {
        /// The policy.
        selector: Box<Selector>,
        /// This host's end.
        local: IpAddr,
        /// The other end.
        peer: IpAddr,
    },
}

/// What a file looks like.
#[cfg(feature = "serde")]
mod written {
    use super::{Egress, Family, IpAddr, Selector, StaticPolicy, StaticSourceError};
    use crate::{
        policy::{MacAddr, NextHop},
        sys::ifindex,
    };
    use ipnet::IpNet;
    use serde::{Deserialize, Deserializer, de::Error as _};

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct File {
        #[serde(default)]
        pub(super) policy: Vec<Written>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    pub(super) struct Written {
        source: IpNet,
        destination: IpNet,
        device: String,
        local: IpAddr,
        peer: IpAddr,
        #[serde(default)]
        priority: u32,
        #[serde(default)]
        next_hop: WrittenNextHop,
        max_length: Option<u16>,
    }

    #[derive(Default)]
    struct WrittenNextHop(NextHop);

    impl<'de> Deserialize<'de> for WrittenNextHop {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            #[derive(Deserialize)]
            #[serde(deny_unknown_fields)]
            struct Addresses {
                source: String,
                destination: String,
            }
            #[derive(Deserialize)]
            #[serde(untagged, expecting = "\"device\", \"neighbour\", or a table of source and destination")]
            enum Any {
                Word(String),
                Fixed(Addresses),
            }
            let mac = |text: String| text.parse::<MacAddr>().map_err(D::Error::custom);
            match Any::deserialize(deserializer)? {
                Any::Word(word) if word == "device" => Ok(Self(NextHop::Device)),
                Any::Word(word) if word == "neighbour" => Ok(Self(NextHop::Neighbour)),
                Any::Word(word) => Err(D::Error::unknown_variant(&word, &["device", "neighbour"])),
                Any::Fixed(Addresses { source, destination }) => {
                    Ok(Self(NextHop::Fixed { source: mac(source)?, destination: mac(destination)? }))
                }
            }
        }
    }

    impl TryFrom<Written> for StaticPolicy {
        type Error = StaticSourceError;

        fn try_from(written: Written) -> Result<Self, StaticSourceError> {
            let selector = Selector::between(written.source, written.destination)?;
            let (local, peer) = (written.local, written.peer);
            if [local, peer].iter().any(|end| Family::from(*end) != selector.family()) {
                return Err(StaticSourceError::MixedTunnel { selector: Box::new(selector), local, peer });
            }
            let device = ifindex(&written.device).map_err(|_| StaticSourceError::NoSuchInterface {
                selector: Box::new(selector),
                device: written.device,
            })?;
            let egress = Egress { next_hop: written.next_hop.0, max_length: written.max_length };
            Ok(Self { selector, device, tunnel: (local, peer), priority: written.priority, egress })
        }
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;
    use crate::policy::NextHop;
    use crate::{database::Database, policy::MacAddr};

    const POLICY: &str = r#"
        [[policy]]
        source = "10.1.0.0/16"
        destination = "10.2.0.0/16"
        device = "lo"
        local = "192.0.2.1"
        peer = "192.0.2.2"
    "#;

    async fn database(text: &str) -> Database {
        let mut source = StaticSource::from_toml(text).unwrap();
        let mut database = Database::default();
        while let Some(event) = source.next_event().await.unwrap() {
            database.apply(event);
        }
        database
    }

    #[tokio::test]
    async fn a_written_policy_has_an_association_and_its_fields() {
        let other = POLICY.replace("10.2.0.0/16", "10.3.0.0/16");
        let text = format!(
            "{POLICY}\npriority = 7\nmax-length = 1400\n\
             next-hop = {{ source = \"02:00:00:00:00:01\", destination = \"02:00:00:00:00:02\" }}\n\
             {other}\nnext-hop = \"neighbour\""
        );
        let database = database(&text).await;
        let policies: Vec<_> = database.policies().collect();
        assert_eq!(policies.len(), 2);
        for policy in &policies {
            let live = database.live_sas(&policy.templates[0], &policy.id.selector, 0, 1).count();
            assert_eq!(live, 1, "each policy has its own association");
        }
        assert_eq!((policies[0].priority, policies[0].egress.max_length), (7, Some(1400)));
        let fixed =
            NextHop::Fixed { source: MacAddr([2, 0, 0, 0, 0, 1]), destination: MacAddr([2, 0, 0, 0, 0, 2]) };
        assert_eq!(policies[0].egress.next_hop, fixed);
        assert_eq!(policies[1].egress.next_hop, NextHop::Neighbour);
    }

    #[test]
    fn a_wrong_field_is_named_with_its_line() {
        let error = |text: &str| StaticSource::from_toml(text).unwrap_err().to_string();
        let wrong = |from: &str, to: &str| error(&POLICY.replace(from, to));
        let unknown = wrong("peer =", "per =");
        assert!(
            unknown.contains("line 7") && unknown.contains("`per`") && unknown.contains("`peer`"),
            "{unknown}"
        );
        assert!(wrong("10.1.0.0/16", "10.1.0.0/33").contains("source = \"10.1.0.0/33\""));
        assert!(wrong("\"lo\"", "\"none0\"").contains("no interface named none0"));
        assert!(wrong("10.1.0.0/16", "2001:db8::/32").contains("one address family"));
        assert!(wrong("192.0.2.1", "2001:db8::1").contains("must be of its address family"));
        let crossed = POLICY.replace("192.0.2.1", "2001:db8::1").replace("192.0.2.2", "2001:db8::2");
        assert!(error(&crossed).contains("must be of its address family"), "{crossed}");
        assert!(error(&format!("{POLICY}next-hop = \"nic\"")).contains("`neighbour`"));
        assert!(error("[[policies]]").contains("unknown field `policies`"));
        assert!(error("policy = 3").contains("line 1"));
    }
}
