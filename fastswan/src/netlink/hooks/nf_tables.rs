//! Base chains of `nf_tables` that may change the fate of forwarded packets, and rules that have connections tracked.
//!
//! A base chain cannot change the fate of a packet if its policy is to accept and none of its rules can do more than look,
//! count, accept and ask not to be tracked, nor those of the chains that they jump to. Everything that is not known to be
//! harmless is taken to do harm.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    attribute::{Attributes, needed, network_u32, text, undecodable},
    devices::Devices,
    legacy_tables::tracks,
};
use crate::{
    host::{Hook, HookKind, HookPlace},
    netlink::request::{DUMP, RequestError, Requests},
    policy::Family,
};

/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u16 = 10 << 8;
/// Messages of it.
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;

/// `struct nfgenmsg`: family, version, and a number of 16 bits.
const HEADER: usize = 4;

/// Families of tables (`linux/netfilter.h`).
const INET: u8 = 1;
pub(super) const IPV4: u8 = 2;
const ARP: u8 = 3;
const NETDEV: u8 = 5;
const BRIDGE: u8 = 7;
pub(super) const IPV6: u8 = 10;

/// Hooks of the IP families, and `NF_INET_INGRESS` of the family inet.
pub(super) const PREROUTING: u32 = 0;
pub(super) const FORWARD: u32 = 2;
pub(super) const OUTPUT: u32 = 3;
pub(super) const POSTROUTING: u32 = 4;
const INET_INGRESS: u32 = 5;
/// Hooks of the family netdev.
const NETDEV_INGRESS: u32 = 0;
const NETDEV_EGRESS: u32 = 1;

const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
/// None of the chains of such a table is at work.
const DORMANT: u32 = 1;

const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;

const HOOK_NUMBER: u16 = 1;
const HOOK_DEVICE: u16 = 3;
const HOOK_DEVICES: u16 = 4;
const DEVICE_NAME: u16 = 1;
/// The beginning of names (Linux 6.16).
const DEVICE_PREFIX: u16 = 2;

const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;

const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

/// Verdicts: to accept, to go on with the next rule, to the caller, and to another chain.
const ACCEPT: u32 = 1;
const CONTINUE: u32 = (-1_i32).cast_unsigned();
const JUMP: u32 = (-3_i32).cast_unsigned();
const GOTO: u32 = (-4_i32).cast_unsigned();
const RETURN: u32 = (-5_i32).cast_unsigned();

/// Expressions that load, compare and count, and no more.
const LOOK: [&str; 17] = [
    "bitwise",
    "byteorder",
    "cmp",
    "counter",
    "fib",
    "hash",
    "last",
    "limit",
    "notrack",
    "numgen",
    "osf",
    "quota",
    "range",
    "rt",
    "socket",
    "tunnel",
    "xfrm",
];
/// Expressions that load, unless they have an attribute of this type, by which they write.
const LOOK_UNLESS: [(&str, u16); 4] = [("ct", 4), ("lookup", 3), ("meta", 3), ("payload", 5)];
/// `exthdr` loads only if it has a destination register and no source register.
const EXTHDR_DESTINATION: u16 = 1;
const EXTHDR_SOURCE: u16 = 7;

/// Expressions that have connections tracked.
const TRACK: [&str; 7] = ["connlimit", "ct", "flow_offload", "masq", "nat", "redir", "synproxy"];
/// The name in `match` and `target`, which are those of iptables.
const COMPATIBLE_NAME: u16 = 1;
/// The type of object that `objref` names: counters, quotas and limits only look.
const OBJREF_TYPE: u16 = 1;
const LOOKING_OBJECTS: [u32; 3] = [1, 2, 4];

/// Family, table and chain.
type ChainName = (u8, String, String);

/// A chain that the kernel runs.
#[derive(Debug)]
struct BaseChain {
    name: ChainName,
    hook: u32,
    devices: Vec<DeviceName>,
    accepts: bool,
}

#[derive(Debug)]
enum DeviceName {
    Whole(String),
    Beginning(String),
}

/// What the rules of a chain can do.
#[derive(Debug, Default)]
struct Rules {
    harm: bool,
    track: bool,
    /// Chains of the same table.
    jumps: BTreeSet<String>,
}

/// Whether a notification of the group `NFNLGRP_NFTABLES` says that chains or rules may not be as they were. Elements of
/// sets change nothing: a rule that asks a set for more than a match does harm.
pub(super) fn is_change(kind: u16) -> bool {
    kind & 0xff00 == SUBSYSTEM
        && matches!(kind & 0xff, NEW_TABLE | DELETE_TABLE | NEW_CHAIN | DELETE_CHAIN | NEW_RULE | DELETE_RULE)
}

/// What the kernel has told of its rules.
#[derive(Debug, Default)]
struct Ruleset {
    /// Families and names of tables none of whose chains is at work.
    dormant: BTreeSet<(u8, String)>,
    chains: Vec<BaseChain>,
    rules: BTreeMap<ChainName, Rules>,
}

/// Reads what hooks there are. `output` says whether the kernel takes packets that it has forwarded into an offloaded tunnel
/// through the output hook too.
pub(super) fn read(
    kernel: &mut Requests,
    devices: &Devices,
    output: bool,
) -> Result<Vec<Hook>, RequestError> {
    let mut interrupted = RequestError::Interrupted;
    for _ in 0..ATTEMPTS {
        match read_once(kernel) {
            Err(RequestError::Interrupted) => interrupted = RequestError::Interrupted,
            ruleset => return Ok(ruleset?.hooks(devices, output)),
        }
    }
    Err(interrupted)
}

fn read_once(kernel: &mut Requests) -> Result<Ruleset, RequestError> {
    let mut ruleset = Ruleset::default();
    for get in [GET_TABLE, GET_CHAIN, GET_RULE] {
        // Of all families.
        kernel.ask((SUBSYSTEM | get, DUMP, &[0; HEADER]), |kind, payload| ruleset.add(kind, payload))?;
    }
    Ok(ruleset)
}

impl Ruleset {
    fn add(&mut self, kind: u16, payload: &[u8]) -> Result<(), RequestError> {
        match kind.checked_sub(SUBSYSTEM) {
            Some(NEW_TABLE) => {
                let (table, flags) = table(payload)?;
                if flags & DORMANT != 0 {
                    self.dormant.insert(table);
                }
            }
            Some(NEW_CHAIN) => self.chains.extend(base_chain(payload)?),
            Some(NEW_RULE) => rule(payload, &mut self.rules)?,
            _ => {}
        }
        Ok(())
    }

    fn hooks(mut self, devices: &Devices, output: bool) -> Vec<Hook> {
        spread_harm(&mut self.rules);
        let is_at_work = |chain: &&BaseChain| !self.dormant.contains(&(chain.name.0, chain.name.1.clone()));
        let does_harm = |chain: &&BaseChain| {
            !chain.accepts || self.rules.get(&chain.name).is_some_and(|rules| rules.harm)
        };
        let chains = self.chains.iter().filter(is_at_work).filter(does_harm);
        let mut hooks: Vec<Hook> = chains.flat_map(|chain| chain.hooks(devices, output)).collect();
        // Also for rules that are not at work.
        let tracking = self.rules.iter().filter(|(_, rules)| rules.track);
        hooks.extend(tracking.map(|((family, table, chain), _)| Hook {
            kind: HookKind::Conntrack,
            place: HookPlace::Forwarding(ip_family(*family)),
            name: format!("connections are tracked for chain {} {table} {chain}", family_name(*family)),
        }));
        hooks
    }
}

impl BaseChain {
    /// Where forwarded packets meet it.
    fn hooks(&self, devices: &Devices, output: bool) -> Vec<Hook> {
        let (family, table, chain) = &self.name;
        let described = |hook: &str, place| Hook {
            kind: HookKind::NfTables,
            place,
            name: format!("chain {} {table} {chain} (hook {hook})", family_name(*family)),
        };
        let forwarding = HookPlace::Forwarding(ip_family(*family));
        let on_devices = |hook: &str, place: fn(u32) -> HookPlace| {
            let devices: BTreeSet<u32> = self.devices.iter().flat_map(|name| name.find(devices)).collect();
            devices.into_iter().map(|device| described(hook, place(device))).collect()
        };
        match (*family, self.hook) {
            (NETDEV, NETDEV_INGRESS) | (INET, INET_INGRESS) => on_devices("ingress", HookPlace::Ingress),
            (NETDEV, NETDEV_EGRESS) => on_devices("egress", HookPlace::Egress),
            (INET | IPV4 | IPV6, PREROUTING) => vec![described("prerouting", forwarding)],
            (INET | IPV4 | IPV6, FORWARD) => vec![described("forward", forwarding)],
            (INET | IPV4 | IPV6, POSTROUTING) => vec![described("postrouting", forwarding)],
            (INET | IPV4 | IPV6, OUTPUT) if output => vec![described("output", forwarding)],
            // Input and output are for the host's own packets; a member of a bridge is no port; ARP is not forwarded.
            _ => Vec::new(),
        }
    }
}

impl DeviceName {
    fn find(&self, devices: &Devices) -> Vec<u32> {
        match self {
            Self::Whole(name) => devices.named(|other| other == name),
            Self::Beginning(prefix) => devices.named(|other| other.starts_with(prefix)),
        }
    }
}

/// Chains that jump to one that does harm do harm.
fn spread_harm(rules: &mut BTreeMap<ChainName, Rules>) {
    loop {
        let harmful: Vec<ChainName> = rules
            .iter()
            .filter(|((family, table, _), chain)| {
                let does_harm = |target: &String| {
                    rules.get(&(*family, table.clone(), target.clone())).is_some_and(|rules| rules.harm)
                };
                !chain.harm && chain.jumps.iter().any(does_harm)
            })
            .map(|(name, _)| name.clone())
            .collect();
        if harmful.is_empty() {
            return;
        }
        for name in harmful {
            rules.entry(name).or_default().harm = true;
        }
    }
}

/// The address family that the packets of a table are of; `None` is both.
fn ip_family(family: u8) -> Option<Family> {
    match family {
        IPV4 => Some(Family::V4),
        IPV6 => Some(Family::V6),
        _ => None,
    }
}

fn family_name(family: u8) -> &'static str {
    match family {
        INET => "inet",
        IPV4 => "ip",
        ARP => "arp",
        NETDEV => "netdev",
        BRIDGE => "bridge",
        IPV6 => "ip6",
        _ => "of an unknown family",
    }
}

/// How often a dump is asked for that changes keep interrupting.
const ATTEMPTS: u32 = 16;

/// Family and name of a table, and its flags.
fn table(payload: &[u8]) -> Result<((u8, String), u32), RequestError> {
    let (mut name, mut flags) = (None, 0);
    for attribute in Attributes::behind(payload, HEADER)? {
        match attribute? {
            (TABLE_NAME, value) => name = Some(text(value)),
            (TABLE_FLAGS, value) => flags = network_u32(value)?,
            _ => {}
        }
    }
    Ok(((payload[0], needed(name, "the name of a table")?), flags))
}

/// A chain, if it is one that the kernel runs by itself.
fn base_chain(payload: &[u8]) -> Result<Option<BaseChain>, RequestError> {
    let (mut table, mut name, mut hook, mut policy) = (None, None, None, None);
    for attribute in Attributes::behind(payload, HEADER)? {
        match attribute? {
            (CHAIN_TABLE, value) => table = Some(text(value)),
            (CHAIN_NAME, value) => name = Some(text(value)),
            (CHAIN_HOOK, value) => hook = Some(value),
            (CHAIN_POLICY, value) => policy = Some(network_u32(value)?),
            _ => {}
        }
    }
    let (table, name) = (needed(table, "a chain's table")?, needed(name, "the name of a chain")?);
    let Some(hook) = hook else { return Ok(None) };
    let mut number = None;
    let mut devices = Vec::new();
    for attribute in Attributes::inside(hook) {
        match attribute? {
            (HOOK_NUMBER, value) => number = Some(network_u32(value)?),
            (HOOK_DEVICE, value) => devices.push(DeviceName::Whole(text(value))),
            (HOOK_DEVICES, value) => {
                for device in Attributes::inside(value) {
                    match device? {
                        (DEVICE_NAME, name) => devices.push(DeviceName::Whole(text(name))),
                        (DEVICE_PREFIX, name) => devices.push(DeviceName::Beginning(text(name))),
                        _ => return Err(undecodable("a chain of devices that are not named")),
                    }
                }
            }
            _ => {}
        }
    }
    Ok(Some(BaseChain {
        name: (payload[0], table, name),
        hook: needed(number, "the hook of a base chain")?,
        devices,
        accepts: policy == Some(ACCEPT),
    }))
}

/// Adds what a rule can do to its chain.
fn rule(payload: &[u8], rules: &mut BTreeMap<ChainName, Rules>) -> Result<(), RequestError> {
    let (mut table, mut chain, mut expressions) = (None, None, None);
    for attribute in Attributes::behind(payload, HEADER)? {
        match attribute? {
            (RULE_TABLE, value) => table = Some(text(value)),
            (RULE_CHAIN, value) => chain = Some(text(value)),
            (RULE_EXPRESSIONS, value) => expressions = Some(value),
            _ => {}
        }
    }
    let table = needed(table, "a rule's table")?;
    let chain = needed(chain, "a rule's chain")?;
    let expressions = needed(expressions, "a rule's expressions")?;
    let rules = rules.entry((payload[0], table, chain)).or_default();
    for expression in Attributes::inside(expressions) {
        let (mut name, mut data) = (None, &[][..]);
        for attribute in Attributes::inside(expression?.1) {
            match attribute? {
                (EXPRESSION_NAME, value) => name = Some(text(value)),
                (EXPRESSION_DATA, value) => data = value,
                _ => {}
            }
        }
        rules.add(&needed(name, "the name of an expression")?, data)?;
    }
    Ok(())
}

impl Rules {
    fn add(&mut self, name: &str, data: &[u8]) -> Result<(), RequestError> {
        let find = |wanted: u16| {
            let mut attributes = Attributes::inside(data);
            attributes.find_map(|attribute| match attribute {
                Ok((kind, value)) => (kind == wanted).then_some(Ok(value)),
                Err(error) => Some(Err(error)),
            })
        };
        let find = |wanted| find(wanted).transpose();
        self.track |= TRACK.contains(&name);
        if name == "objref" {
            let object = find(OBJREF_TYPE)?.map(network_u32).transpose()?;
            let does_more = object.is_none_or(|object| !LOOKING_OBJECTS.contains(&object));
            self.track |= does_more;
            self.harm |= does_more;
            return Ok(());
        }
        if matches!(name, "match" | "target") {
            let compatible = find(COMPATIBLE_NAME)?.map(text);
            self.track |= compatible.is_none_or(|name| tracks(&name));
        }
        if name == "immediate" {
            return self.add_immediate(data);
        }
        let writes = match LOOK_UNLESS.iter().find(|(known, _)| *known == name) {
            Some((_, register)) => find(*register)?.is_some(),
            None if name == "exthdr" => find(EXTHDR_DESTINATION)?.is_none() || find(EXTHDR_SOURCE)?.is_some(),
            None => !LOOK.contains(&name),
        };
        self.harm |= writes;
        Ok(())
    }

    /// Loads a value, or gives a verdict.
    fn add_immediate(&mut self, data: &[u8]) -> Result<(), RequestError> {
        for attribute in Attributes::inside(data) {
            let (IMMEDIATE_DATA, value) = attribute? else { continue };
            for attribute in Attributes::inside(value) {
                let (DATA_VERDICT, verdict) = attribute? else { continue };
                let (mut code, mut chain) = (None, None);
                for attribute in Attributes::inside(verdict) {
                    match attribute? {
                        (VERDICT_CODE, value) => code = Some(network_u32(value)?),
                        (VERDICT_CHAIN, value) => chain = Some(text(value)),
                        _ => {}
                    }
                }
                match (needed(code, "a verdict's code")?, chain) {
                    (ACCEPT | CONTINUE | RETURN, _) => {}
                    (JUMP | GOTO, Some(chain)) => drop(self.jumps.insert(chain)),
                    _ => self.harm = true,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::hooks::attribute::tests::{bytes, cuts};

    /// As Linux 6.18 has told of `table netdev dev { chain in { type filter hook ingress devices = { lan0, x } priority 0; drop; } }`
    /// and of a table inet that sleeps, whose chain forward has `policy drop; tcp dport 22 jump more` and whose chain more has
    /// `ct state new counter name c accept`.
    const TABLES: [&str; 2] = [
        "05000002080001006465760008000300000000010c00040000000000000000010800020000000000",
        "01000002070001006677000008000300000000030c00040000000000000000020800020000000001",
    ];
    const CHAINS: [&str; 3] = [
        "05000002080001006465760007000300696e00000c00020000000000000000012c0004000800010000000000080002000000\
         0000180004000600010078000000090001006c616e300000000008000500000000010b00070066696c746572000008000a00\
         000000010800060000000001",
        "010000020700010066770000090003006d6f7265000000000c00020000000000000000010800060000000002",
        "0100000207000100667700000c000300666f7277617264000c00020000000000000000021400040008000100000000020800\
         02000000000008000500000000000b00070066696c746572000008000a00000000010800060000000001",
    ];
    const RULES: [&str; 3] = [
        "05000002080001006465760007000200696e00000c000300000000000000000234000400300001000e000100696d6d656469\
         6174650000001c0002000800010000000000100002000c0002000800010000000000",
        "010000020700010066770000090002006d6f7265000000000c0003000000000000000004f000040020000100070001006374\
         000014000200080002000000000108000200000000004c0001000c00010062697477697365003c0002000800010000000001\
         0800020000000001080003000000000408000600000000000c00040008000100080000000c00050008000100000000002c00\
         010008000100636d700020000200080001000000000108000200000000010c0003000800010000000000240001000b000100\
         6f626a72656600001400020006000200630000000800010000000001300001000e000100696d6d6564696174650000001c00\
         02000800010000000000100002000c0002000800010000000001",
        "0100000207000100667700000c000200666f7277617264000c0003000000000000000005f000040024000100090001006d65\
         74610000000014000200080002000000001008000100000000012c00010008000100636d7000200002000800010000000001\
         08000200000000000c0003000500010006000000340001000c0001007061796c6f6164002400020008000100000000010800\
         020000000002080003000000000208000400000000022c00010008000100636d700020000200080001000000000108000200\
         000000000c00030006000100001600003c0001000e000100696d6d6564696174650000002800020008000100000000001c00\
         02001800020008000100fffffffd090002006d6f726500000000",
    ];

    fn all() -> impl Iterator<Item = (u16, Vec<u8>)> {
        let of = |kind, texts: &'static [&'static str]| {
            texts.iter().map(move |text| (SUBSYSTEM | kind, bytes(text)))
        };
        of(NEW_TABLE, &TABLES).chain(of(NEW_CHAIN, &CHAINS)).chain(of(NEW_RULE, &RULES))
    }

    fn hooks(messages: impl Iterator<Item = (u16, Vec<u8>)>) -> Vec<String> {
        let mut ruleset = Ruleset::default();
        messages.for_each(|(kind, payload)| ruleset.add(kind, &payload).unwrap());
        let devices = Devices::of(&[(7, "lan0"), (8, "xenon")]);
        ruleset.hooks(&devices, false).iter().map(|hook| format!("{:?} {hook}", hook.place)).collect()
    }

    #[test]
    fn a_rulesets_hooks_are_those_that_may_do_harm() {
        // The first chain names one device, and the beginning of others; the second table sleeps.
        let tracked = "Forwarding(None) conntrack: connections are tracked for chain inet fw more";
        let on = |device| format!("Ingress({device}) nf_tables: chain netdev dev in (hook ingress)");
        assert_eq!(hooks(all()), [on(7), tracked.to_owned()]);

        let awake = all().filter(|(kind, _)| *kind != SUBSYSTEM | NEW_TABLE);
        let forward = "Forwarding(None) nf_tables: chain inet fw forward (hook forward)";
        assert_eq!(hooks(awake), [on(7), forward.to_owned(), tracked.to_owned()]);

        // The policy of the last chain is to accept now, and what it jumps to does no harm.
        let mut accepting = bytes(CHAINS[2]);
        let policy = accepting.windows(4).position(|window| window == [8, 0, 5, 0]).unwrap();
        accepting[policy + 7] = 1;
        let harmless = [(SUBSYSTEM | NEW_CHAIN, accepting)].into_iter();
        assert_eq!(hooks(harmless.chain(all().skip(6))), [tracked.to_owned()]);
    }

    #[test]
    fn a_message_cut_short_is_an_error_unless_the_cut_is_between_attributes() {
        for (kind, payload) in all() {
            for length in cuts(&payload, HEADER) {
                let added = Ruleset::default().add(kind, &payload[..length]);
                assert!(added.is_err(), "{kind:#x} cut to {length} of {}", payload.len());
            }
            // Nothing panics on any cut, nor on any changed byte.
            for length in 0..payload.len() {
                let _ = Ruleset::default().add(kind, &payload[..length]);
                let mut changed = payload.clone();
                for value in [0, 1, 3, 4, 0x7f, 0xff] {
                    changed[length] = value;
                    let _ = Ruleset::default().add(kind, &changed);
                }
            }
        }
    }
}
