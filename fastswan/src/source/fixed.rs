//! A source of policies that are written down: in code, or in a TOML file.
//!
//! Their author vouches for a security association of each: see [`Policy::assumed`].

use std::net::IpAddr;

use async_trait::async_trait;

use super::{PolicyEvent, PolicyOrder, PolicySource, Snapshot, SourceError};
use crate::policy::{
    Direction, Egress, Family, OffloadDev, OffloadKind, Overhead, Policy, PolicyId, Selector, Template,
};

/// A tunnel policy whose author vouches for it: its device encrypts what is sent to it.
///
/// ```
/// use fastswan::policy::{Egress, NextHop};
/// use fastswan::source::fixed::StaticPolicy;
/// use fastswan::{Selector, StaticSource};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let device = 7;
/// let tunnel = StaticPolicy::new(selector, device, "192.0.2.1".parse()?, "192.0.2.2".parse()?)
///     .priority(100)
///     .egress(Egress { next_hop: NextHop::Neighbour, max_length: Some(1400) });
/// let source = StaticSource::new(&[tunnel]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
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
    /// What the device adds to each packet.
    pub overhead: Overhead,
}

impl StaticPolicy {
    /// A tunnel of the device with this interface index, from this host's outer address to its peer's: priority 0, the
    /// default [`Egress`], and AES-GCM with an ICV of 16 bytes and without UDP encapsulation.
    #[must_use]
    pub fn new(selector: Selector, device: u32, local: IpAddr, peer: IpAddr) -> Self {
        let overhead = Overhead::aes_gcm_tunnel(Family::from(peer), false, 16);
        Self { selector, device, tunnel: (local, peer), priority: 0, egress: Egress::default(), overhead }
    }

    /// Sets the priority: lower is better.
    #[must_use]
    pub fn priority(self, priority: u32) -> Self {
        Self { priority, ..self }
    }

    /// Sets how its packets leave.
    #[must_use]
    pub fn egress(self, egress: Egress) -> Self {
        Self { egress, ..self }
    }

    /// Sets what the device adds to each packet.
    #[must_use]
    pub fn overhead(self, overhead: Overhead) -> Self {
        Self { overhead, ..self }
    }

    /// The policy and its assumed association, for a source of your own. Policies with the same reqid share an association
    /// in the kernel's eyes: give each tunnel its own.
    ///
    /// ```
    /// # #[cfg(feature = "tokio")]
    /// # async fn push() -> Result<(), Box<dyn std::error::Error>> {
    /// use fastswan::{ChannelSource, PolicyEvent, Selector, Snapshot, source::fixed::StaticPolicy};
    ///
    /// let (sender, source) = ChannelSource::new(Snapshot::default(), 16);
    /// // … give the source to a gateway, and from anywhere else:
    /// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
    /// let tunnel = StaticPolicy::new(selector, 7, "192.0.2.1".parse()?, "192.0.2.2".parse()?).policy(1);
    /// let id = tunnel.id.clone();
    /// sender.push(PolicyEvent::Policy(tunnel)).await?.written().await?;
    /// // It is in the table. Later:
    /// sender.push(PolicyEvent::PolicyRemoved(id)).await?.written().await?;
    /// # drop(source);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn policy(&self, reqid: u32) -> Policy {
        let (source, destination) = self.tunnel;
        Policy {
            priority: self.priority,
            templates: [Template::esp_tunnel(source, destination, reqid)].into(),
            offload: Some(OffloadDev { ifindex: self.device, kind: OffloadKind::Packet, inbound: false }),
            egress: self.egress,
            assumed: Some(self.overhead),
            ..Policy::new(PolicyId::new(Direction::Out, self.selector))
        }
    }
}

/// A source that says all it knows at once and never changes.
///
/// It yields one [`PolicyEvent::Snapshot`] and ends.
///
/// ```
/// # #[cfg(all(feature = "netlink", feature = "serde"))]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fastswan::StaticSource;
///
/// let source = StaticSource::from_toml(
///     r#"
///     [[policy]]
///     source = "10.1.0.0/16"
///     destination = "10.2.0.0/16"
///     device = "lo"
///     local = "192.0.2.1"
///     peer = "192.0.2.2"
///     next-hop = "neighbour"
///     "#,
/// )?;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "serde"))]
/// # fn main() {}
/// ```
#[derive(Clone, Debug)]
pub struct StaticSource(Option<Snapshot>);

impl StaticSource {
    /// These policies, each with an assumed association.
    #[must_use]
    pub fn new(policies: &[StaticPolicy]) -> Self {
        let policies = (1..).zip(policies).map(|(reqid, policy)| policy.policy(reqid)).collect();
        Self(Some(Snapshot { policies, ..Snapshot::default() }))
    }

    /// Has priorities alone decide where policies overlap that lead different ways ([`PolicyOrder::ByPriority`]): for a device
    /// that encrypts by these policies and not by the kernel's. Otherwise packets that several match pass, unless they
    /// lead the same way: the kernel's order among offloaded policies does not go by priority.
    ///
    /// [`PolicyOrder::ByPriority`]: crate::PolicyOrder::ByPriority
    #[must_use]
    pub fn by_priority(mut self) -> Self {
        if let Some(snapshot) = &mut self.0 {
            snapshot.order = PolicyOrder::ByPriority;
        }
        self
    }

    /// What a TOML text says: optionally `order = "priority"`, for [`by_priority`](Self::by_priority), and an array `policy` of
    /// tables with the fields
    ///
    /// - `source`, `destination`: the prefixes between which packets are sent;
    /// - `device`: name of the interface, in the calling thread's network namespace;
    /// - `local`, `peer`: the outer addresses of the tunnel, of the same family;
    /// - `priority`: optional, 0 if left out; lower is better, where priorities decide;
    /// - `next-hop`: optional: `"device"` (the default), `"neighbour"`, or a table with `source` and
    ///   `destination`; see [`NextHop`](crate::policy::NextHop);
    /// - `max-length`: optional, bytes from the IP header on.
    ///
    /// # Errors
    ///
    /// [`StaticSourceError`] with the line, the field and what is allowed there.
    #[cfg(all(feature = "netlink", feature = "serde"))]
    pub fn from_toml(text: &str) -> Result<Self, StaticSourceError> {
        let file: written::File = toml::from_str(text).map_err(|error| not_understood(text, &error))?;
        let policies: Result<Vec<_>, _> = file.policy.into_iter().map(TryInto::try_into).collect();
        let source = Self::new(&policies?);
        Ok(match file.order {
            written::Order::Kernel => source,
            written::Order::Priority => source.by_priority(),
        })
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
#[cfg(all(feature = "netlink", feature = "serde"))]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StaticSourceError {
    /// It is not TOML, or a field is wrong, missing or unknown.
    #[error("static policies, line {line}, column {column}: {message}, in `{written}`")]
    #[non_exhaustive]
    Toml {
        /// Where it is, counted from 1.
        line: usize,
        /// Characters from the start of the line, counted from 1.
        column: usize,
        /// What is wrong, and what is allowed there.
        message: String,
        /// The line.
        written: String,
    },
    /// A policy is for a device that does not exist.
    #[error("policy {selector}: no interface named {device:?}: check its name with `ip link`")]
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

#[cfg(all(feature = "netlink", feature = "serde"))]
fn not_understood(text: &str, error: &toml::de::Error) -> StaticSourceError {
    let at = error.span().map_or(0, |span| span.start);
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count();
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    StaticSourceError::Toml {
        line: line + 1,
        column: before[start..].chars().count() + 1,
        message: error.message().to_owned(),
        written: text.lines().nth(line).unwrap_or_default().trim().to_owned(),
    }
}

/// What a file looks like.
#[cfg(all(feature = "netlink", feature = "serde"))]
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
        pub(super) order: Order,
        #[serde(default)]
        pub(super) policy: Vec<Written>,
    }

    #[derive(Default, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub(super) enum Order {
        #[default]
        Kernel,
        Priority,
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
            Ok(Self::new(selector, device, local, peer).priority(written.priority).egress(egress))
        }
    }
}

#[cfg(all(test, feature = "netlink", feature = "serde"))]
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
        let overhead = Overhead::aes_gcm_tunnel(Family::V4, false, 16);
        assert!(policies.iter().all(|policy| policy.assumed == Some(overhead)));
        assert_eq!(database.sas().count(), 0, "an assumed association is none of the kernel's");
        assert_eq!((policies[0].priority, policies[0].egress.max_length), (7, Some(1400)));
        let fixed =
            NextHop::Fixed { source: MacAddr([2, 0, 0, 0, 0, 1]), destination: MacAddr([2, 0, 0, 0, 0, 2]) };
        assert_eq!(policies[0].egress.next_hop, fixed);
        assert_eq!(policies[1].egress.next_hop, NextHop::Neighbour);
    }

    #[tokio::test]
    async fn priorities_decide_if_the_text_says_so() {
        let order =
            async |text: &str| match StaticSource::from_toml(text).unwrap().next_event().await.unwrap() {
                Some(PolicyEvent::Snapshot(snapshot)) => snapshot.order,
                other => panic!("{other:?}"),
            };
        assert_eq!(order(POLICY).await, PolicyOrder::Kernel);
        assert_eq!(order(&format!("order = \"priority\"\n{POLICY}")).await, PolicyOrder::ByPriority);
        let wrong = StaticSource::from_toml("order = \"age\"").unwrap_err().to_string();
        assert!(wrong.contains("`kernel`") && wrong.contains("`priority`"), "{wrong}");
    }

    #[test]
    fn a_wrong_field_is_named_with_its_line() {
        let error = |text: &str| StaticSource::from_toml(text).unwrap_err().to_string();
        let wrong = |from: &str, to: &str| error(&POLICY.replace(from, to));
        let unknown = wrong("peer =", "per =");
        assert!(
            unknown.contains("line 7, column 9") && unknown.contains("`per`") && unknown.contains("`peer`"),
            "{unknown}"
        );
        assert!(wrong("10.1.0.0/16", "10.1.0.0/33").contains("source = \"10.1.0.0/33\""));
        assert!(wrong("\"lo\"", "\"none0\"").contains("no interface named \"none0\""));
        assert!(wrong("10.1.0.0/16", "2001:db8::/32").contains("one address family"));
        assert!(wrong("192.0.2.1", "2001:db8::1").contains("must be of its address family"));
        let crossed = POLICY.replace("192.0.2.1", "2001:db8::1").replace("192.0.2.2", "2001:db8::2");
        assert!(error(&crossed).contains("must be of its address family"), "{crossed}");
        assert!(error(&format!("{POLICY}next-hop = \"nic\"")).contains("`neighbour`"));
        assert!(error("[[policies]]").contains("unknown field `policies`"));
        assert!(error("policy = 3").contains("line 1"));
    }
}
