//! All functions at the hooks of netfilter that forwarded packets pass, whoever has put them there: a BPF program, a module.
//!
//! Where the kernel lists them (`CONFIG_NETFILTER_NETLINK_HOOK`), what is not known from elsewhere, or known to be harmless,
//! counts. Where it does not, BPF programs are found by their links, which are not told apart by namespace, and modules of
//! other makers are not seen.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{
    attribute::{Attributes, Body, network_u32, text},
    modules::{Missing, NFNETLINK, NFNETLINK_HOOK},
    nf_tables::{FORWARD, IPV4, IPV6, OUTPUT, POSTROUTING, PREROUTING},
};
use crate::{
    host::{Hook, HookKind, HookPlace},
    netlink::request::{DUMP, RequestError, Requests},
    policy::Family,
    sys::bpf::{NetfilterLink, first_link, netfilter_link},
};

/// `NFNL_SUBSYS_HOOK`, and its only message.
const LIST: u16 = 12 << 8;
/// Length of `struct nfgenmsg` in bytes.
const HEADER: usize = 4;
const NUMBER: u16 = 1;
const FUNCTION: u16 = 4;
const CHAIN: u16 = 6;
const CHAIN_KIND: u16 = 2;
const OF_NF_TABLES: u32 = 1;

/// Connection tracking.
const TRACKING: [&str; 5] =
    ["ipv4_conntrack_in", "ipv4_conntrack_local", "ipv6_conntrack_in", "ipv6_conntrack_local", "nf_confirm"];
/// How the names of functions begin whose rules are read elsewhere, or that let forwarded packets alone: what the kernel puts
/// in the place of a function that has gone (`accept_all`); chains and legacy tables, and NAT, which asks these; IPVS; the
/// assembling of fragments, which pass anyway; bridges; and security modules, which judge packets with labels and those of
/// the host's own sockets.
const KNOWN: [&str; 17] = [
    "accept_all",
    "apparmor_ip_",
    "arpt_do_table",
    "br_nf_",
    "ip6t_do_table",
    "ip6table_",
    "ip_sabotage_in",
    "ip_vs_",
    "ipt_do_table",
    "iptable_",
    "ipv4_conntrack_defrag",
    "ipv6_defrag",
    "nf_flow_offload_",
    "nf_nat_ipv",
    "nft_do_chain",
    "selinux_ip",
    "smack_ip",
];

/// Attempts to list what changes meanwhile.
const ATTEMPTS: u32 = 16;

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Functions {
    /// Links of BPF programs that are at hooks.
    links: Vec<(u32, NetfilterLink)>,
    /// Links up to this number were looked at.
    looked_up_to: u32,
}

/// What is at the hooks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listing {
    /// The families whose connections are tracked, if that is known.
    pub(super) tracked: Option<Vec<Family>>,
    /// What is not known from elsewhere.
    pub(super) hooks: Vec<Hook>,
}

impl Functions {
    /// Lists them. `output` says whether forwarded packets pass the output hook too.
    pub(super) fn read(&mut self, output: bool, missing: &mut Missing) -> io::Result<Listing> {
        if !missing.has(NFNETLINK) && !missing.has(NFNETLINK_HOOK) {
            match list(output) {
                Err(RequestError::Refused(libc::EINVAL | libc::EOPNOTSUPP)) => missing.note(NFNETLINK_HOOK),
                Err(RequestError::System(error)) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                    missing.note(NFNETLINK);
                }
                listed => return Ok(listed?),
            }
        }
        self.look_for_links()?;
        let of = |family| match family {
            IPV4 => Some(Family::V4),
            IPV6 => Some(Family::V6),
            _ => None,
        };
        let met = |link: &NetfilterLink| matters(link.hook, output);
        let links = self.links.iter().filter(|(_, link)| met(link)).map(|(number, link)| Hook {
            kind: HookKind::Netfilter,
            place: HookPlace::Forwarding(u8::try_from(link.family).ok().and_then(of)),
            name: format!("BPF link #{number} at the hook {}", hook_name(link.hook)),
        });
        Ok(Listing { tracked: None, hooks: links.collect() })
    }

    /// Finds new links, and forgets those that are gone.
    fn look_for_links(&mut self) -> io::Result<()> {
        self.links
            .retain(|(number, link)| netfilter_link(*number).is_ok_and(|now| now.as_ref() == Some(link)));
        // Numbers go up.
        while let Some(number) = first_link(self.looked_up_to)? {
            match netfilter_link(number) {
                Ok(Some(link)) if !self.links.iter().any(|(known, _)| *known == number) => {
                    self.links.push((number, link));
                }
                Ok(_) => {}
                // It is being made: next time.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
                Err(error) => return Err(error),
            }
            self.looked_up_to = number;
        }
        Ok(())
    }
}

/// Whether forwarded packets pass a hook of an IP family.
fn matters(hook: u32, output: bool) -> bool {
    matches!(hook, PREROUTING | FORWARD | POSTROUTING) || output && hook == OUTPUT
}

fn hook_name(hook: u32) -> &'static str {
    match hook {
        PREROUTING => "prerouting",
        FORWARD => "forward",
        OUTPUT => "output",
        _ => "postrouting",
    }
}

fn list(output: bool) -> Result<Listing, RequestError> {
    let mut kernel = Requests::open(NETLINK_NETFILTER)?;
    let mut found = Listing { tracked: Some(Vec::new()), hooks: Vec::new() };
    for (number, family) in [(IPV4, Family::V4), (IPV6, Family::V6)] {
        for hook in [PREROUTING, FORWARD, POSTROUTING].into_iter().chain(output.then_some(OUTPUT)) {
            let body = Body(vec![number, 0, 0, 0]).with(NUMBER, &hook.to_be_bytes());
            let mut attempts = ATTEMPTS;
            while let Err(error) = kernel.ask((LIST, DUMP, &body.0), |kind, payload| {
                if kind == LIST { found.add(payload, family, hook) } else { Ok(()) }
            }) {
                attempts -= 1;
                if !matches!(error, RequestError::Interrupted) || attempts == 0 {
                    return Err(error);
                }
            }
        }
    }
    found.hooks.sort_unstable();
    found.hooks.dedup();
    Ok(found)
}

impl Listing {
    fn add(&mut self, payload: &[u8], family: Family, hook: u32) -> Result<(), RequestError> {
        let (mut function, mut is_chain) = (None, false);
        for attribute in Attributes::behind(payload, HEADER)? {
            match attribute? {
                (FUNCTION, value) => function = Some(text(value)),
                (CHAIN, value) => {
                    for attribute in Attributes::inside(value) {
                        if let (CHAIN_KIND, kind) = attribute? {
                            is_chain |= network_u32(kind)? == OF_NF_TABLES;
                        }
                    }
                }
                _ => {}
            }
        }
        // A kernel without names of its functions is not known.
        let function = function.unwrap_or_else(|| "an unnamed function".to_owned());
        if TRACKING.contains(&function.as_str()) {
            let tracked = self.tracked.get_or_insert_default();
            if !tracked.contains(&family) {
                tracked.push(family);
            }
        } else if !(is_chain || KNOWN.iter().any(|known| function.starts_with(known))) {
            self.hooks.push(Hook {
                kind: HookKind::Netfilter,
                place: HookPlace::Forwarding(Some(family)),
                name: format!("{function} at the hook {}", hook_name(hook)),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::hooks::attribute::tests::cuts;

    fn message(function: &str, chain: Option<u32>) -> Vec<u8> {
        let body = Body(vec![2, 0, 0, 0]).with(FUNCTION, format!("{function}\0").as_bytes());
        let described = |kind: u32| Body::default().with(CHAIN_KIND, &kind.to_be_bytes()).0;
        chain.map_or(body.clone(), |kind| body.with(CHAIN, &described(kind))).0
    }

    fn listed(function: &str, chain: Option<u32>) -> (usize, usize) {
        let mut listing = Listing { tracked: Some(Vec::new()), hooks: Vec::new() };
        listing.add(&message(function, chain), Family::V4, FORWARD).unwrap();
        (listing.tracked.map_or(0, |tracked| tracked.len()), listing.hooks.len())
    }

    #[test]
    fn functions_are_known_or_count() {
        assert_eq!(listed("ipv4_conntrack_in", None), (1, 0));
        assert_eq!(listed("nft_do_chain_inet", Some(OF_NF_TABLES)), (0, 0));
        assert_eq!(listed("nf_nat_ipv4_pre_routing", None), (0, 0));
        assert_eq!(listed("ipt_do_table", None), (0, 0));
        assert_eq!(listed("accept_all", None), (0, 0), "one that has gone");
        assert_eq!(listed("nf_hook_run_bpf", Some(2)), (0, 1));
        assert_eq!(listed("their_firewall", None), (0, 1));
    }

    #[test]
    fn a_message_cut_short_is_an_error_unless_the_cut_is_between_attributes() {
        let payload = message("nf_hook_run_bpf", Some(2));
        let add = |payload: &[u8]| {
            let mut listing = Listing { tracked: None, hooks: Vec::new() };
            listing.add(payload, Family::V6, PREROUTING)
        };
        for length in cuts(&payload, HEADER) {
            add(&payload[..length]).unwrap_err();
        }
        for length in 0..payload.len() {
            let _ = add(&payload[..length]);
            let mut changed = payload.clone();
            changed[length] = 0xff;
            let _ = add(&changed);
        }
    }
}
