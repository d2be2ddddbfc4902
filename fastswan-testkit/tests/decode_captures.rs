//! The netlink parser on messages that a kernel really sent, whole, cut short and damaged.

use bytes::Bytes;
use fastswan::{
    PolicyEvent,
    netlink::{Content, decode},
    policy::{
        Action, DefaultPolicy, Direction, Mark, Mode, OffloadDev, OffloadKind, Overhead, Policy, PolicyId,
        PolicyType, PortMatch, SecurityAssociation,
    },
};
use fastswan_testkit::xfrm::{CAPTURED, captured};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

const NIC: u32 = 2;

fn contents(name: &str) -> Vec<Content> {
    let messages = decode(&Bytes::from_static(captured(name))).unwrap();
    messages.into_iter().map(|message| message.content).collect()
}

fn event(name: &str) -> PolicyEvent {
    match contents(name).pop() {
        Some(Content::Event(event)) => event,
        other => panic!("{name}: {other:?}"),
    }
}

fn policy(name: &str) -> Policy {
    match event(name) {
        PolicyEvent::Policy(policy) => policy,
        other => panic!("{name}: {other:?}"),
    }
}

fn removed(name: &str) -> PolicyId {
    match event(name) {
        PolicyEvent::PolicyRemoved(id) => id,
        other => panic!("{name}: {other:?}"),
    }
}

fn sa(name: &str) -> SecurityAssociation {
    match event(name) {
        PolicyEvent::Sa(sa) => sa,
        other => panic!("{name}: {other:?}"),
    }
}

fn offload(inbound: bool) -> OffloadDev {
    OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound }
}

#[test]
fn policies_say_where_they_are_offloaded() {
    for (name, expected) in [
        ("newpolicy-out-offload", Some(offload(false))),
        ("newpolicy-in-offload", Some(offload(true))),
        ("newpolicy-fwd-not-offloaded", None),
        ("updpolicy-offload-new-prio", Some(offload(false))),
        ("updpolicy-offload-removed", None),
        ("strongswan-newpolicy-out", Some(offload(false))),
    ] {
        assert_eq!(policy(name).offload, expected, "{name}");
    }
}

#[test]
fn policies_say_what_they_match_and_ask_for() {
    let out = policy("newpolicy-out-offload");
    assert_eq!((out.id.direction, out.id.policy_type), (Direction::Out, PolicyType::Main));
    assert_eq!((out.action, out.templates.len(), out.use_limited), (Action::Allow, 1, false));
    assert_eq!((out.templates[0].mode, out.templates[0].protocol), (Mode::Tunnel, 50));
    assert_eq!(policy("newpolicy-out-offload-transport").templates[0].mode, Mode::Transport);
    assert_eq!(policy("newpolicy-out-offload-no-tmpl").templates[..], []);
    assert_eq!(policy("newpolicy-out-offload-block").action, Action::Block);
    assert_eq!(policy("newpolicy-block-not-offloaded").action, Action::Block);
    assert!(policy("newpolicy-out-offload-ipv6-sel").id.selector.source.addr().is_ipv6());
    assert_eq!(policy("newpolicy-fwd-not-offloaded").id.direction, Direction::Forward);
    let https = policy("newpolicy-out-offload-tcp-dport443").id.selector;
    assert_eq!((https.protocol, https.destination_port), (6, PortMatch::exactly(443)));
    let marked = policy("newpolicy-out-offload-mark-ifid").id;
    assert!(marked.mark != Mark::default() && marked.if_id != 0, "{marked}");
    let bypass = policy("strongswan-bypass-out-udp500");
    assert_eq!((bypass.id.selector.protocol, bypass.templates.len()), (17, 0));
    let port = PortMatch::exactly(500);
    assert!([bypass.id.selector.source_port, bypass.id.selector.destination_port].contains(&port));
}

#[test]
fn a_policy_says_that_it_asks_for_an_association_for_each_processor() {
    const XFRM_POLICY_CPU_ACQUIRE: u8 = 4;
    let expected = Policy { asks_per_cpu: true, ..policy("newpolicy-out-offload") };
    let mut message = captured("newpolicy-out-offload").to_vec();
    // After the header, `flags` of `struct xfrm_userpolicy_info`.
    message[16 + 162] |= XFRM_POLICY_CPU_ACQUIRE;
    let told = decode(&message.into()).unwrap().remove(0).content;
    assert_eq!(told, Content::Event(PolicyEvent::Policy(expected)));
    assert!(!policy("newpolicy-out-offload").asks_per_cpu);
}

#[test]
fn a_deleted_policy_has_the_identity_that_it_was_added_with() {
    for name in ["delpolicy-by-selector-offload", "delpolicy-by-index-offload", "delpolicy-not-offloaded"] {
        let id = removed(name);
        assert_ne!(id.selector.destination.prefix_len(), 0, "{name}: {id}");
    }
    assert_eq!(removed("polexpire-hard-offload").direction, Direction::Out);
    assert_eq!(contents("polexpire-soft-offload"), [Content::Ignored]);
    assert_eq!(event("flushpolicy"), PolicyEvent::PoliciesFlushed(PolicyType::Main));
}

#[test]
fn associations_say_their_device_and_overhead() {
    let out = sa("newsa-out-offload");
    assert_eq!((out.offload, out.mode), (Some(offload(false)), Mode::Tunnel));
    assert_eq!(out.overhead, Some(Overhead { header: 36, icv: 16 }));
    assert!(out.is_outbound_packet_offload());
    assert!(!sa("newsa-in-offload").is_outbound_packet_offload());
    assert_eq!(sa("newsa-not-offloaded").offload, None);
    assert_eq!(sa("newsa-out-offload-esn").offload, Some(offload(false)));
    let updated = decode(&Bytes::from_static(captured("updsa-offload"))).unwrap_err();
    assert!(updated.to_string().contains("does not tell what it is now"), "{updated}");
    for name in ["delsa-offload", "expire-sa-hard"] {
        assert!(matches!(event(name), PolicyEvent::SaRemoved(id) if id.spi != 0), "{name}");
    }
    assert_eq!(contents("expire-sa-soft"), [Content::Ignored]);
    assert!(matches!(event("flushsa"), PolicyEvent::SasFlushed(_)));
}

/// A message with one attribute more.
fn with_attribute(name: &str, kind: u16, value: &[u8]) -> Bytes {
    let mut message = captured(name).to_vec();
    append(&mut message, kind, value);
    message.into()
}

fn append(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
    let length = u32::try_from(message.len()).unwrap();
    message[..4].copy_from_slice(&length.to_ne_bytes());
}

#[test]
fn an_association_says_which_processor_it_is_for() {
    const XFRMA_SA_PCPU: u16 = 35;
    assert_eq!(sa("newsa-out-offload").cpu, None);
    let message = with_attribute("newsa-out-offload", XFRMA_SA_PCPU, &3_u32.to_ne_bytes());
    let expected = SecurityAssociation { cpu: Some(3), ..sa("newsa-out-offload") };
    assert_eq!(decode(&message).unwrap()[0].content, Content::Event(PolicyEvent::Sa(expected)));
    assert!(decode(&with_attribute("newsa-out-offload", XFRMA_SA_PCPU, &[3, 0])).is_err());
}

#[test]
fn an_association_that_protects_nothing_that_leaves_says_so() {
    const XFRMA_SEC_CTX: u16 = 8;
    const XFRMA_SA_DIR: u16 = 33;
    const XFRM_STATE_WILDRECV: u8 = 8;
    let told = |message: Bytes| match decode(&message).unwrap().remove(0).content {
        Content::Event(PolicyEvent::Sa(sa)) => (sa.receives_only, sa.has_security_context),
        other => panic!("{other:?}"),
    };
    let with = |kind, value: &[u8]| told(with_attribute("newsa-out-offload", kind, value));
    assert_eq!(told(Bytes::from_static(captured("newsa-out-offload"))), (false, false));
    assert_eq!(with(XFRMA_SA_DIR, &[1]), (true, false), "inbound");
    assert_eq!(with(XFRMA_SA_DIR, &[2]), (false, false), "outbound");
    assert_eq!(with(XFRMA_SEC_CTX, &[8, 0, 8, 0, 1, 1, 0, 0]), (false, true));
    let mut wildcard = captured("newsa-out-offload").to_vec();
    // After the header, `flags` of `struct xfrm_usersa_info`.
    wildcard[16 + 216] |= XFRM_STATE_WILDRECV;
    assert_eq!(told(wildcard.into()), (true, false));
}

#[test]
fn an_association_says_whether_its_packets_get_a_mark() {
    const XFRMA_SET_MARK: u16 = 29;
    const XFRMA_SET_MARK_MASK: u16 = 30;
    let with = |mark: u32, mask: Option<u32>| {
        let mut message = with_attribute("newsa-out-offload", XFRMA_SET_MARK, &mark.to_ne_bytes()).to_vec();
        if let Some(mask) = mask {
            append(&mut message, XFRMA_SET_MARK_MASK, &mask.to_ne_bytes());
        }
        match decode(&message.into()).unwrap().remove(0).content {
            Content::Event(PolicyEvent::Sa(sa)) => sa.sets_mark,
            other => panic!("{other:?}"),
        }
    };
    assert!(!sa("newsa-out-offload").sets_mark);
    assert!(with(5, None));
    assert!(with(5, Some(u32::MAX)));
    assert!(with(5, Some(4)));
    assert!(!with(5, Some(2)), "a packet without a mark keeps it");
    assert!(!with(0, Some(0xff)), "nor is it given one");
    assert!(decode(&with_attribute("newsa-out-offload", XFRMA_SET_MARK, &[5, 0])).is_err());
}

#[test]
fn dumps_and_defaults_and_what_changes_nothing() {
    assert_eq!(contents("dump-getpolicy-7-mixed-part1").len(), 7);
    assert_eq!(contents("dump-getpolicy-7-mixed-done"), [Content::Done(0)]);
    assert_eq!(contents("dump-getsa-2").len(), 2);
    assert_eq!(contents("dump-getsa-2-done"), [Content::Done(0)]);
    assert!(
        matches!(event("getdefault-notify"), PolicyEvent::DefaultPolicy(p) if p != DefaultPolicy::default())
    );
    assert_eq!(contents("acquire-offload"), [Content::Ignored]);
}

#[test]
fn every_captured_message_is_decoded_but_updates_of_offloaded_associations() {
    for (name, bytes) in CAPTURED {
        assert_eq!(decode(&Bytes::from_static(bytes)).is_ok(), *name != "updsa-offload", "{name}");
    }
}

#[test]
fn a_message_cut_short_anywhere_is_read_or_refused_without_panic() {
    for (_, message) in CAPTURED {
        for length in 0..message.len() {
            // Once as the datagram was cut, once as the message says of itself.
            let _ = decode(&Bytes::from_static(&message[..length]));
            let mut shorter = message[..length].to_vec();
            if let Some(field) = shorter.first_chunk_mut() {
                *field = u32::try_from(length).unwrap().to_ne_bytes();
            }
            let _ = decode(&shorter.into());
        }
    }
}

#[test]
fn a_million_damaged_messages_are_read_or_refused_without_panic() {
    let mut random = SmallRng::seed_from_u64(1);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..1_000_000 {
        let (_, message) = CAPTURED[random.random_range(0..CAPTURED.len())];
        let mut damaged = message.to_vec();
        for _ in 0..random.random_range(1..8) {
            let position = random.random_range(0..damaged.len());
            damaged[position] = random.random();
        }
        if random.random_ratio(1, 4) {
            damaged.truncate(random.random_range(0..damaged.len()));
        }
        match decode(&damaged.into()) {
            Ok(_) => read += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(read > 10_000 && refused > 10_000, "{read} read, {refused} refused");
}

#[test]
fn what_has_a_hard_limit_in_seconds_says_when_it_ends() {
    // Bytes of `struct xfrm_lifetime_cfg` and `xfrm_lifetime_cur` in an association and a policy: after header and
    // selector, and in the association after its identity and source too.
    let with = |name: &str, at: usize, [hard_add, hard_use, add_time]: [u64; 3]| {
        let mut message = captured(name).to_vec();
        for (field, value) in [(40, hard_add), (56, hard_use), (80, add_time)] {
            message[at + field..at + field + 8].copy_from_slice(&value.to_ne_bytes());
        }
        match decode(&message.into()).unwrap().remove(0).content {
            Content::Event(PolicyEvent::Sa(sa)) => (sa.expires, false),
            Content::Event(PolicyEvent::Policy(policy)) => (policy.expires, policy.use_limited),
            other => panic!("{other:?}"),
        }
    };
    for (limits, sa, policy) in [
        ([0, 0, 1000], None, (None, false)),
        ([60, 0, 1000], Some(1060), (Some(1060), false)),
        ([60, 20, 1000], Some(1020), (Some(1060), true)),
        ([0, 20, 1000], Some(1020), (None, true)),
        ([u64::MAX, 0, 1000], Some(u64::MAX), (Some(u64::MAX), false)),
    ] {
        assert_eq!(with("newsa-out-offload", 16 + 56 + 40, limits).0, sa, "{limits:?}");
        assert_eq!(with("newpolicy-out-offload", 16 + 56, limits), policy, "{limits:?}");
    }
}

#[test]
fn a_larval_association_is_none_yet() {
    let spi = 16 + 56 + 16;
    let mut asked_for = captured("newsa-out-offload").to_vec();
    asked_for[spi..spi + 4].fill(0);
    // Only its SPI is reserved: without the attribute that says which algorithm it has.
    let mut reserved = captured("newsa-out-offload").to_vec();
    let algorithm = reserved.windows(12).position(|window| window.ends_with(b"rfc4106(")).unwrap();
    // Type 0 is none.
    reserved[algorithm + 2..algorithm + 4].fill(0);
    for message in [asked_for, reserved] {
        assert!(matches!(decode(&message.into()).unwrap()[0].content, Content::Larval(_)));
    }
}
