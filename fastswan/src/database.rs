//! What the kernel has right now, as far as the sources have told.
//!
//! [`PolicyEvent`]s come from a [`PolicySource`](crate::PolicySource); the [`Compiler`](crate::Compiler) reads
//! the result. All policies are kept, not only offloaded ones, because the others shadow them. Nothing here
//! does I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    policy::{DefaultPolicy, Family, IPPROTO_ESP, Policy, PolicyId, SaId, SecurityAssociation, Template},
    source::{PolicyEvent, Snapshot, StaleCause},
};

/// Whether a database is what the kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Freshness {
    /// No [`PolicyEvent::Snapshot`] has come yet.
    #[default]
    Unknown,
    /// It was, when the last event was sent.
    Current,
    /// The source has lost track and will send another snapshot.
    Stale(StaleCause),
}

/// All policies and security associations, and what happens to packets without a policy.
#[derive(Clone, Debug, Default)]
pub struct Database {
    policies: BTreeMap<PolicyId, Policy>,
    sas: BTreeMap<SaId, SecurityAssociation>,
    /// The associations by what a template asks for: outer destination and reqid.
    sas_by_reqid: BTreeMap<(IpAddr, u32), BTreeSet<SaId>>,
    default_policy: DefaultPolicy,
    freshness: Freshness,
}

impl Database {
    /// Applies an event. A policy or an association with a known identity replaces the one that was there,
    /// and removing what is not there changes nothing.
    pub fn apply(&mut self, event: PolicyEvent) {
        match event {
            PolicyEvent::Snapshot(snapshot) => {
                *self = Self {
                    default_policy: snapshot.default_policy,
                    freshness: Freshness::Current,
                    ..Self::default()
                };
                for policy in snapshot.policies {
                    self.policies.insert(policy.id.clone(), policy);
                }
                for sa in snapshot.sas {
                    self.insert_sa(sa);
                }
            }
            PolicyEvent::Policy(policy) => {
                self.policies.insert(policy.id.clone(), policy);
            }
            PolicyEvent::PolicyRemoved(id) => {
                self.policies.remove(&id);
            }
            PolicyEvent::PoliciesFlushed(table) => self.policies.retain(|id, _| id.policy_type != table),
            PolicyEvent::Sa(sa) => self.insert_sa(sa),
            PolicyEvent::SaRemoved(id) => self.remove_sa(&id),
            PolicyEvent::SasFlushed(protocol) => {
                let every = matches!(protocol, 0 | u8::MAX);
                let flushed: Vec<_> =
                    self.sas.keys().filter(|id| every || id.protocol == protocol).copied().collect();
                for id in &flushed {
                    self.remove_sa(id);
                }
            }
            PolicyEvent::DefaultPolicy(default_policy) => self.default_policy = default_policy,
            PolicyEvent::Stale(cause) => self.freshness = Freshness::Stale(cause),
        }
    }

    /// Everything, ordered by identity: equal databases give equal snapshots.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            policies: self.policies.values().cloned().collect(),
            sas: self.sas.values().cloned().collect(),
            default_policy: self.default_policy,
        }
    }

    /// Whether this is what the kernel has. If it is not, nothing may be fast.
    #[must_use]
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }

    /// Whether this is what the kernel had when the last event was sent.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.freshness == Freshness::Current
    }

    /// All policies, ordered by identity.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.policies.values()
    }

    /// The policy with this identity.
    #[must_use]
    pub fn policy(&self, id: &PolicyId) -> Option<&Policy> {
        self.policies.get(id)
    }

    /// The security association with this identity.
    #[must_use]
    pub fn sa(&self, id: &SaId) -> Option<&SecurityAssociation> {
        self.sas.get(id)
    }

    /// All security associations, ordered by identity.
    pub fn sas(&self) -> impl Iterator<Item = &SecurityAssociation> {
        self.sas.values()
    }

    /// What happens to packets without a policy.
    #[must_use]
    pub fn default_policy(&self) -> DefaultPolicy {
        self.default_policy
    }

    /// The associations that a device may use for a step of a policy without a mark, ordered by identity.
    ///
    /// `family` is the policy's, `device` the interface index that it is offloaded to, `if_id` its interface id. During a
    /// rekey there are several, and the kernel does not tell which one the device takes. This is
    /// `xfrm_state_find` for a policy that is packet-offloaded, except that an unspecified address matches
    /// only itself.
    pub fn live_sas(
        &self,
        template: &Template,
        family: Family,
        if_id: u32,
        device: u32,
    ) -> impl Iterator<Item = &SecurityAssociation> {
        let reqids = match template.reqid {
            0 => 0..=u32::MAX,
            reqid => reqid..=reqid,
        };
        let (first, last) = ((template.destination, *reqids.start()), (template.destination, *reqids.end()));
        self.sas_by_reqid
            .range(first..=last)
            .flat_map(|(_, ids)| ids)
            .filter_map(|id| self.sas.get(id))
            .filter(move |sa| {
                sa.is_outbound_packet_offload()
                    && sa.offload.is_some_and(|offload| offload.ifindex == device)
                    && sa.id.protocol == IPPROTO_ESP
                    && template.protocol == IPPROTO_ESP
                    && sa.id.spi != 0
                    && (template.spi == 0 || sa.id.spi == template.spi)
                    && sa.source == template.source
                    && sa.mode == template.mode
                    && sa.if_id == if_id
                    && sa.id.mark.value == 0
                    // One that is for some packets only is not known to be for those of the policy.
                    && sa.selector.is_none_or(|selector| {
                        selector.family() == family && selector.matches_everything()
                    })
            })
    }

    fn insert_sa(&mut self, sa: SecurityAssociation) {
        self.remove_sa(&sa.id);
        self.sas_by_reqid.entry((sa.id.destination, sa.reqid)).or_default().insert(sa.id);
        self.sas.insert(sa.id, sa);
    }

    fn remove_sa(&mut self, id: &SaId) {
        let Some(sa) = self.sas.remove(id) else { return };
        let key = (id.destination, sa.reqid);
        if let Some(ids) = self.sas_by_reqid.get_mut(&key) {
            ids.remove(id);
            if ids.is_empty() {
                self.sas_by_reqid.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Action, Direction, Mark, Mode, OffloadDev, OffloadKind, PolicyType, Selector};

    const NIC: u32 = 7;

    fn policy(destination: &str, policy_type: PolicyType) -> Policy {
        let selector =
            Selector::between("10.0.0.0/24".parse().unwrap(), destination.parse().unwrap()).unwrap();
        Policy::new(PolicyId { policy_type, ..PolicyId::new(Direction::Out, selector) })
    }

    fn sa(spi: u32) -> SecurityAssociation {
        SecurityAssociation {
            id: SaId {
                destination: "192.0.2.2".parse().unwrap(),
                spi,
                protocol: IPPROTO_ESP,
                mark: Mark::default(),
            },
            source: "192.0.2.1".parse().unwrap(),
            reqid: 1,
            mode: Mode::Tunnel,
            if_id: 0,
            selector: None,
            offload: Some(OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false }),
            overhead: None,
        }
    }

    fn template() -> Template {
        Template {
            mode: Mode::Tunnel,
            protocol: IPPROTO_ESP,
            spi: 0,
            source: "192.0.2.1".parse().unwrap(),
            destination: "192.0.2.2".parse().unwrap(),
            reqid: 1,
            optional: false,
        }
    }

    fn live_spis(database: &Database, template: &Template) -> Vec<u32> {
        database.live_sas(template, Family::V4, 0, NIC).map(|sa| sa.id.spi).collect()
    }

    #[test]
    fn nothing_is_known_until_the_first_snapshot_and_after_the_source_lost_track() {
        let mut database = Database::default();
        assert_eq!(database.freshness(), Freshness::Unknown);
        database.apply(PolicyEvent::Policy(policy("10.0.1.0/24", PolicyType::Main)));
        assert!(!database.is_current());
        database.apply(PolicyEvent::Snapshot(Snapshot::default()));
        assert!(database.is_current());
        assert_eq!(database.snapshot(), Snapshot::default());
        database.apply(PolicyEvent::Stale(StaleCause::Overrun));
        assert_eq!(database.freshness(), Freshness::Stale(StaleCause::Overrun));
        database.apply(PolicyEvent::Sa(sa(1)));
        assert!(!database.is_current(), "an event does not make up for those that were lost");
    }

    #[test]
    fn an_updated_policy_replaces_the_one_with_the_same_identity() {
        let mut database = Database::default();
        let old = policy("10.0.1.0/24", PolicyType::Main);
        let other_bytes = policy("10.0.1.5/24", PolicyType::Main);
        let new = Policy { action: Action::Block, priority: 5, ..old.clone() };
        for policy in [&old, &other_bytes, &new] {
            database.apply(PolicyEvent::Policy(policy.clone()));
        }
        assert_eq!(database.policies().collect::<Vec<_>>(), [&new, &other_bytes]);
        assert_eq!(database.policy(&old.id), Some(&new));
        database.apply(PolicyEvent::PolicyRemoved(old.id.clone()));
        database.apply(PolicyEvent::PolicyRemoved(old.id));
        assert_eq!(database.policies().collect::<Vec<_>>(), [&other_bytes]);
    }

    #[test]
    fn a_flush_empties_only_its_table() {
        let mut database = Database::default();
        let sub = policy("10.0.1.0/24", PolicyType::Sub);
        database.apply(PolicyEvent::Policy(policy("10.0.1.0/24", PolicyType::Main)));
        database.apply(PolicyEvent::Policy(sub.clone()));
        database.apply(PolicyEvent::PoliciesFlushed(PolicyType::Main));
        assert_eq!(database.policies().collect::<Vec<_>>(), [&sub]);
    }

    #[test]
    fn a_flush_of_one_protocol_leaves_the_others_and_zero_is_all() {
        let ah = 51;
        for (protocol, left) in [(ah, 1), (IPPROTO_ESP, 0), (0, 0), (u8::MAX, 0)] {
            let mut database = Database::default();
            database.apply(PolicyEvent::Sa(sa(1)));
            database.apply(PolicyEvent::SasFlushed(protocol));
            assert_eq!(database.sas().count(), left, "protocol {protocol}");
            assert_eq!(live_spis(&database, &template()).len(), left, "protocol {protocol}");
        }
    }

    #[test]
    fn a_rekey_offers_both_associations_until_the_old_one_is_deleted() {
        let mut database = Database::default();
        database.apply(PolicyEvent::Sa(sa(0x100)));
        database.apply(PolicyEvent::Sa(sa(0x200)));
        assert_eq!(live_spis(&database, &template()), [0x100, 0x200]);
        assert_eq!(live_spis(&database, &Template { spi: 0x200, ..template() }), [0x200]);
        database.apply(PolicyEvent::SaRemoved(sa(0x100).id));
        assert_eq!(live_spis(&database, &template()), [0x200]);
    }

    #[test]
    fn an_association_that_changes_its_reqid_is_found_under_the_new_one_only() {
        let mut database = Database::default();
        database.apply(PolicyEvent::Sa(sa(1)));
        database.apply(PolicyEvent::Sa(SecurityAssociation { reqid: 9, ..sa(1) }));
        assert_eq!(live_spis(&database, &template()), [0; 0]);
        assert_eq!(live_spis(&database, &Template { reqid: 9, ..template() }), [1]);
        assert_eq!(live_spis(&database, &Template { reqid: 0, ..template() }), [1]);
    }

    #[test]
    fn an_association_serves_only_the_policy_the_kernel_would_let_it_serve() {
        let offload = |ifindex, kind, inbound| Some(OffloadDev { ifindex, kind, inbound });
        let elsewhere = "192.0.2.9".parse().unwrap();
        let wrong = [
            ("not offloaded", SecurityAssociation { offload: None, ..sa(1) }),
            (
                "only the cipher",
                SecurityAssociation { offload: offload(NIC, OffloadKind::Crypto, false), ..sa(1) },
            ),
            (
                "another device",
                SecurityAssociation { offload: offload(8, OffloadKind::Packet, false), ..sa(1) },
            ),
            ("inbound", SecurityAssociation { offload: offload(NIC, OffloadKind::Packet, true), ..sa(1) }),
            ("larval", sa(0)),
            ("another source", SecurityAssociation { source: elsewhere, ..sa(1) }),
            (
                "another destination",
                SecurityAssociation { id: SaId { destination: elsewhere, ..sa(1).id }, ..sa(1) },
            ),
            ("AH", SecurityAssociation { id: SaId { protocol: 51, ..sa(1).id }, ..sa(1) }),
            ("another mode", SecurityAssociation { mode: Mode::Transport, ..sa(1) }),
            ("another reqid", SecurityAssociation { reqid: 2, ..sa(1) }),
            ("an interface id", SecurityAssociation { if_id: 3, ..sa(1) }),
            (
                "a mark",
                SecurityAssociation { id: SaId { mark: Mark { value: 1, mask: 1 }, ..sa(1).id }, ..sa(1) },
            ),
        ];
        for (why, sa) in wrong {
            let mut database = Database::default();
            database.apply(PolicyEvent::Sa(sa));
            assert_eq!(live_spis(&database, &template()), [0; 0], "{why}");
        }
    }
}
