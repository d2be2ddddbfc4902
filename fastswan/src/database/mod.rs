//! What the kernel has right now, as far as the sources have told.
//!
//! [`PolicyEvent`]s come from a [`PolicySource`](crate::PolicySource); the [`Compiler`](crate::Compiler) reads
//! the result. All policies are kept, not only offloaded ones, because the others shadow them. Nothing here
//! does I/O.

use std::{collections::BTreeSet, fmt, thread};

use self::{
    journal::Journal,
    key::Key,
    stored::{Item, Stored},
};
pub(crate) use self::{
    journal::{Change, Revision},
    request::Request,
};
use crate::{
    event::{PolicyEvent, PolicyOrder, Snapshot, StaleCause},
    policy::{
        DefaultPolicy, Direction, Family, IPPROTO_ESP, OffloadDev, OffloadKind, Policy, PolicyId, SaId,
        SecurityAssociation, Selector, Template,
    },
};

mod journal;
mod key;
mod request;
mod stored;

/// Seconds before the kernel deletes something for its age, by the wall clock, that it counts as gone. The kernel's
/// clock for this has whole seconds, a gateway looks four times in one, and if it hangs, its lease of one second, unless
/// set otherwise, runs out before.
const AHEAD: u64 = 2;

/// From so many policies and as many associations on, a second thread takes less time than it costs.
const MANY: usize = 10_000;

/// So many differences that an audit finds are logged by name.
const MOST_NAMED: usize = 8;

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
///
/// It also remembers what has changed lately, so that a [`Compiler`](crate::Compiler) need not look at everything.
///
/// ```
/// use fastswan::{Database, Policy, PolicyEvent, PolicyId, Selector, Snapshot, policy::Direction};
///
/// let mut database = Database::default();
/// assert!(!database.is_current(), "nothing was told so far");
/// database.apply(PolicyEvent::Snapshot(Snapshot::default()));
///
/// let selector = Selector::between("10.1.0.0/16".parse()?, "10.2.0.0/16".parse()?)?;
/// let policy = Policy::new(PolicyId::new(Direction::Out, selector));
/// database.apply(PolicyEvent::Policy(policy.clone()));
/// assert_eq!(database.policy(&policy.id), Some(&policy));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Database {
    policies: Stored<PolicyKey, Policy>,
    /// By policy key: see [`Self::age`].
    ages: Vec<u32>,
    /// The newest age.
    newest: u32,
    order: PolicyOrder,
    sas: Stored<SaKey, SecurityAssociation>,
    default_policy: DefaultPolicy,
    freshness: Freshness,
    audit_repairs: u64,
    /// What the kernel will delete for its age, by when.
    expiring: BTreeSet<(u64, Expiring)>,
    /// What expires up to then counts as gone.
    horizon: u64,
    /// The packet-offloaded outbound policies of each family.
    offloaded_v4: Offloaded,
    offloaded_v6: Offloaded,
    journal: Journal,
    /// The packet-offloaded outbound policies that were removed since the last question; `None` without
    /// questions.
    departed: Option<Vec<(PolicyKey, PolicyId)>>,
}

/// The number of a policy, as long as it is in the database. Afterwards another one may get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PolicyKey(pub(crate) u32);

/// The number of an association.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct SaKey(u32);

impl Key for PolicyKey {
    fn new(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

impl Key for SaKey {
    fn new(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

impl Item for Policy {
    type Id = PolicyId;

    fn id(&self) -> &PolicyId {
        &self.id
    }

    /// What the only template of a policy that may be fast asks for.
    fn request(&self) -> Option<Request> {
        let [template] = &self.templates[..] else { return None };
        is_candidate(self).then(|| Request::of(self, template))
    }
}

impl Item for SecurityAssociation {
    type Id = SaId;

    fn id(&self) -> &SaId {
        &self.id
    }

    fn request(&self) -> Option<Request> {
        Some(self.into())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Expiring {
    Policy(PolicyKey),
    Sa(SaKey),
}

/// The packet-offloaded outbound policies of a family.
#[derive(Clone, Copy, Debug, Default)]
struct Offloaded {
    count: usize,
    /// The highest priority number that one of them, or one that is gone, had since the last snapshot, or since
    /// there were none.
    highest: u32,
}

impl Offloaded {
    fn add(&mut self, priority: u32) {
        self.count += 1;
        self.highest = self.highest.max(priority);
    }
}

impl Database {
    /// Applies an event. A policy or an association with a known identity replaces the one that was there,
    /// and removing what is not there changes nothing.
    pub fn apply(&mut self, event: PolicyEvent) {
        match event {
            PolicyEvent::Snapshot(snapshot) => self.replace(snapshot),
            PolicyEvent::Audit(snapshot) => self.audit(snapshot),
            PolicyEvent::Policy(policy) => {
                let (key, is_noted) = self.insert_policy(policy);
                self.renew_age(key);
                if !is_noted {
                    self.note_age(key);
                }
            }
            PolicyEvent::PolicyRemoved(id) => self.remove_policy(&id),
            PolicyEvent::PoliciesFlushed(table) => {
                let flushed = self.policies().filter(|policy| policy.id.policy_type == table);
                let flushed: Vec<PolicyId> = flushed.map(|policy| policy.id.clone()).collect();
                for id in &flushed {
                    self.remove_policy(id);
                }
            }
            PolicyEvent::Sa(sa) => self.insert_sa(sa),
            PolicyEvent::SaRemoved(id) => self.remove_sa(&id),
            PolicyEvent::SasFlushed(protocol) => {
                let every = matches!(protocol, 0 | u8::MAX);
                let flushed = self.sas().map(|sa| sa.id).filter(|id| every || id.protocol == protocol);
                let flushed: Vec<SaId> = flushed.collect();
                for id in &flushed {
                    self.remove_sa(id);
                }
            }
            PolicyEvent::DefaultPolicy(default_policy) => self.set_default_policy(default_policy),
            PolicyEvent::Stale(cause) => self.freshness = Freshness::Stale(cause),
        }
    }

    /// Tells the time by the wall clock, in seconds since 1970. Policies and associations whose
    /// [`expires`](Policy::expires) is at most 2 s away stay, but make nothing fast from the next
    /// [`compile`](crate::Compiler::compile) on. Without this, nothing expires. The clock may be set back.
    ///
    /// Returns whether anything has come close enough to its end, or is no longer.
    pub fn set_time(&mut self, now: u64) -> bool {
        let before = std::mem::replace(&mut self.horizon, now.saturating_add(AHEAD));
        let (from, to) = (before.min(self.horizon), before.max(self.horizon));
        let first = (from.saturating_add(1), Expiring::Policy(PolicyKey(0)));
        let passed = self.expiring.range(first..).take_while(|(expires, _)| *expires <= to);
        let passed: Vec<_> = passed.map(|(_, which)| *which).collect();
        for which in &passed {
            self.journal.record(match *which {
                Expiring::Sa(key) => {
                    let Some(sa) = self.sas.get(key) else { continue };
                    Change::Sa(sa.into())
                }
                Expiring::Policy(key) => {
                    Change::Policy { key, before: self.policies.get(key).cloned().map(Box::new) }
                }
            });
        }
        !passed.is_empty()
    }

    /// Whether what [expires](Policy::expires) then makes nothing fast any longer.
    pub(crate) fn is_about_to_expire(&self, expires: Option<u64>) -> bool {
        expires.is_some_and(|expires| expires <= self.horizon)
    }

    /// Makes this what a snapshot says. What stays keeps its key.
    fn replace(&mut self, snapshot: Snapshot) {
        self.ages.clear();
        self.newest = 0;
        self.order = snapshot.order;
        self.store(snapshot.policies, snapshot.sas);
        self.recount();
        self.default_policy = snapshot.default_policy;
        self.freshness = Freshness::Current;
        self.journal.forget();
    }

    /// Stores these and nothing else: both kinds at the same time if there are many.
    fn store(&mut self, policies: Vec<Policy>, sas: Vec<SecurityAssociation>) {
        let is_worth_it = policies.len().min(sas.len()) >= MANY;
        let mut sas = Some(sas);
        let mut gone = Vec::new();
        thread::scope(|scope| {
            let store_sas = || self.sas.replace(sas.take().unwrap_or_default());
            if is_worth_it {
                // Where there can be no other thread, it is done below.
                let _ = thread::Builder::new().spawn_scoped(scope, store_sas);
            }
            gone = self.policies.replace(policies);
        });
        if let Some(sas) = sas {
            self.sas.replace(sas);
        }
        for (key, policy) in gone {
            self.note_departure(key, &policy);
        }
    }

    /// Counts the offloaded policies and puts what expires in order, from the start.
    fn recount(&mut self) {
        let (mut v4, mut v6) = <(Offloaded, Offloaded)>::default();
        let mut expiring = Vec::new();
        for (key, policy) in self.policies.iter() {
            expiring.extend(policy.expires.map(|expires| (expires, Expiring::Policy(key))));
            if is_candidate(policy) {
                let offloaded = match policy.id.selector.family() {
                    Family::V4 => &mut v4,
                    Family::V6 => &mut v6,
                };
                offloaded.add(policy.priority);
            }
        }
        let sas = self.sas.iter().filter_map(|(key, sa)| Some((sa.expires?, Expiring::Sa(key))));
        expiring.extend(sas);
        (self.offloaded_v4, self.offloaded_v6) = (v4, v6);
        self.expiring = expiring.into_iter().collect();
    }

    /// Takes over what an audit found, if it is not what is here. What was never told may have changed the order of
    /// policies as well, so it is taken like a snapshot.
    fn audit(&mut self, found: Snapshot) {
        if !self.is_current() {
            return;
        }
        let differing = self.differing(&found);
        if differing.is_empty() {
            return;
        }
        let repairs = differing.len();
        let which: Vec<String> = differing.iter().take(MOST_NAMED).map(ToString::to_string).collect();
        tracing::warn!(repairs, ?which, "an audit found what the source never told: repaired");
        self.audit_repairs += repairs as u64;
        self.replace(found);
    }

    /// The policies and associations that are not what an audit found.
    fn differing<'a>(&'a self, found: &'a Snapshot) -> Vec<&'a dyn fmt::Display> {
        let policies = self.policies.differing(&found.policies).into_iter();
        let mut differing: Vec<&dyn fmt::Display> = policies.map(|id| id as &dyn fmt::Display).collect();
        differing.extend(self.sas.differing(&found.sas).into_iter().map(|id| id as &dyn fmt::Display));
        if found.default_policy != self.default_policy {
            differing.push(&"the default policy");
        }
        differing
    }

    /// Returns whether this is noted, too: not if it is there already, the same in everything.
    fn insert_policy(&mut self, policy: Policy) -> (PolicyKey, bool) {
        let expires = policy.expires;
        let (family, offloaded) =
            (policy.id.selector.family(), is_candidate(&policy).then_some(policy.priority));
        let (key, before) = match self.policies.insert(policy) {
            Ok(changed) => changed,
            Err(same) => return (same, false),
        };
        if let Some(priority) = offloaded {
            self.offloaded_mut(family).add(priority);
        }
        // Only now, so that the highest number lives on if this was the only one.
        if let Some(before) = &before {
            self.forget_offloaded(before);
        }
        let ends = before.as_ref().and_then(|before| before.expires);
        self.expires_instead(Expiring::Policy(key), ends, expires);
        self.journal.record(Change::Policy { key, before: before.map(Box::new) });
        (key, true)
    }

    fn remove_policy(&mut self, id: &PolicyId) {
        let Some((key, before)) = self.policies.remove(id) else { return };
        self.forget_offloaded(&before);
        self.note_departure(key, &before);
        self.expires_instead(Expiring::Policy(key), before.expires, None);
        if let Some(age) = self.ages.get_mut(key.index()) {
            *age = 0;
        }
        self.journal.record(Change::Policy { key, before: Some(Box::new(before)) });
    }

    /// Says that a policy is the newest: the kernel puts a packet-offloaded one to the head of its chain when it is added or
    /// updated, even if nothing of it has changed.
    fn renew_age(&mut self, key: PolicyKey) {
        let Some(newest) = self.newest.checked_add(1) else {
            // The numbers have run out: the order is as unknown as after a snapshot.
            self.ages.clear();
            self.newest = 0;
            self.journal.forget();
            return;
        };
        self.newest = newest;
        if self.ages.len() <= key.index() {
            self.ages.resize(key.index() + 1, 0);
        }
        self.ages[key.index()] = newest;
    }

    /// Notes that a policy has another age and is the same otherwise, if that matters.
    fn note_age(&mut self, key: PolicyKey) {
        if let Some(policy) = self.policies.get(key).filter(|policy| is_candidate(policy)) {
            let before = Some(Box::new(policy.clone()));
            self.journal.record(Change::Policy { key, before });
        }
    }

    /// Remembers from now on which packet-offloaded outbound policies are removed, for [`Self::departed`].
    pub(crate) fn remember_departures(&mut self) {
        self.departed = Some(Vec::new());
    }

    /// Those that were removed since the last call. Their keys may belong to others after the next event.
    pub(crate) fn departed(&mut self) -> Vec<(PolicyKey, PolicyId)> {
        self.departed.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn note_departure(&mut self, key: PolicyKey, policy: &Policy) {
        if let Some(departed) = self.departed.as_mut().filter(|_| is_candidate(policy)) {
            departed.push((key, policy.id.clone()));
        }
    }

    /// Notes whether a policy that is here is held. That is no news of the kernel: what is known of its order stays.
    pub(crate) fn set_held(&mut self, id: &PolicyId, is_held: bool) {
        let Some(policy) = self.policy(id).filter(|policy| policy.held != is_held) else { return };
        let policy = Policy { held: is_held, ..policy.clone() };
        self.insert_policy(policy);
    }

    fn expires_instead(&mut self, which: Expiring, before: Option<u64>, now: Option<u64>) {
        if before != now {
            before.map(|expires| self.expiring.remove(&(expires, which)));
            now.map(|expires| self.expiring.insert((expires, which)));
        }
    }

    /// Takes a policy that is no longer there out of account.
    fn forget_offloaded(&mut self, old: &Policy) {
        if is_candidate(old) {
            let offloaded = self.offloaded_mut(old.id.selector.family());
            offloaded.count -= 1;
            if offloaded.count == 0 {
                offloaded.highest = 0;
            }
        }
    }

    fn offloaded_mut(&mut self, family: Family) -> &mut Offloaded {
        match family {
            Family::V4 => &mut self.offloaded_v4,
            Family::V6 => &mut self.offloaded_v6,
        }
    }

    fn set_default_policy(&mut self, default_policy: DefaultPolicy) {
        if self.default_policy != default_policy {
            self.default_policy = default_policy;
            self.journal.record(Change::DefaultPolicy);
        }
    }

    /// Everything, ordered by identity: equal databases give equal snapshots.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut policies: Vec<Policy> = self.policies().cloned().collect();
        policies.sort_by(|one, other| one.id.cmp(&other.id));
        let mut sas: Vec<SecurityAssociation> = self.sas().cloned().collect();
        sas.sort_by_key(|sa| sa.id);
        Snapshot { policies, sas, default_policy: self.default_policy, order: self.order }
    }

    /// Everything, in no particular order.
    pub(crate) fn into_snapshot(self) -> Snapshot {
        let (policies, sas) = (self.policies.into_all(), self.sas.into_all());
        Snapshot { policies, sas, default_policy: self.default_policy, order: self.order }
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

    /// How many policies and associations were not as a [`PolicyEvent::Audit`] found them, and were repaired. The
    /// default policy counts as one.
    #[must_use]
    pub fn audit_repairs(&self) -> u64 {
        self.audit_repairs
    }

    /// All policies, in no particular order.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.policies.iter().map(|(_, policy)| policy)
    }

    /// The policy with this identity.
    #[must_use]
    pub fn policy(&self, id: &PolicyId) -> Option<&Policy> {
        self.policies.get(self.policies.key(id)?)
    }

    /// The security association with this identity.
    #[must_use]
    pub fn sa(&self, id: &SaId) -> Option<&SecurityAssociation> {
        self.sas.get(self.sas.key(id)?)
    }

    /// All security associations, in no particular order.
    pub fn sas(&self) -> impl Iterator<Item = &SecurityAssociation> {
        self.sas.iter().map(|(_, sa)| sa)
    }

    /// What happens to packets without a policy.
    #[must_use]
    pub fn default_policy(&self) -> DefaultPolicy {
        self.default_policy
    }

    /// The highest priority number that a packet-offloaded outbound policy of a family had since the last snapshot,
    /// or since there was none.
    ///
    /// Those that are gone count: while they were there, the kernel may have put policies with this number or a lower
    /// one before others that are offloaded, and that order stays (`xfrm_policy_insert_list` for one that loses its
    /// offload, `xfrm_policy_inexact_list_reinsert` for others).
    #[must_use]
    pub fn highest_offloaded_priority(&self, family: Family) -> Option<u32> {
        let offloaded = match family {
            Family::V4 => self.offloaded_v4,
            Family::V6 => self.offloaded_v6,
        };
        (offloaded.count > 0).then_some(offloaded.highest)
    }

    /// Whether the source has told of a policy since the last snapshot. If it is packet-offloaded, the kernel put it at the
    /// head of its chain then: what is older than a snapshot stands in an unknown order.
    pub(crate) fn is_told(&self, policy: PolicyKey) -> bool {
        self.age(policy) > 0
    }

    /// A number that grows with each policy that is told of; 0 if that was in the last snapshot, or before.
    pub(crate) fn age(&self, policy: PolicyKey) -> u32 {
        self.ages.get(policy.index()).copied().unwrap_or(0)
    }

    /// By what the policies' choice goes.
    pub(crate) fn order(&self) -> PolicyOrder {
        self.order
    }

    /// The associations that the device of an offloaded policy without a mark may use for its only template, in no
    /// particular order; none if it has not exactly one. That which it is [assumed](Policy::assumed) to have is not here.
    ///
    /// During a rekey there are several, and the kernel does not tell which one the device takes. This is
    /// `xfrm_state_find` for a policy that is packet-offloaded, except that an unspecified address matches
    /// only itself. A reqid of 0 matches only itself there. The kernel compares an association's own selector with
    /// the inner packet: one counts if its selector covers the policy's.
    ///
    /// There are none while one of them [sets a mark](SecurityAssociation::sets_mark): which route the kernel takes to the
    /// tunnel's destination depends on the one that it chooses (`xfrm_bundle_create`).
    ///
    /// There are none either while one that is not packet-offloaded has the same addresses and reqid. The kernel stops looking at
    /// such a one, and though it means to keep them behind the others, it puts one that comes later before them
    /// (`XFRM_STATE_INSERT`; Linux 6.12 and 7.3).
    pub fn live_sas<'a>(
        &'a self,
        policy: &'a Policy,
    ) -> impl Iterator<Item = &'a SecurityAssociation> + Clone + use<'a> {
        let selector = &policy.id.selector;
        self.serving(policy).filter(move |sa| sa.selector.is_none_or(|of_sa| of_sa.covers(selector)))
    }

    /// One that would be among these, but its selector covers only some of the policy's packets, or none.
    pub(crate) fn narrow_sa(&self, policy: &Policy) -> Option<(SaId, Selector)> {
        let mut selectors = self.serving(policy).filter_map(|sa| Some((sa.id, sa.selector?)));
        selectors.find(|(_, of_sa)| !of_sa.covers(&policy.id.selector))
    }

    /// One that sets a mark, because of which there are none of these.
    pub(crate) fn marking_sa(&self, policy: &Policy) -> Option<SaId> {
        self.asked(policy).find(|sa| sa.sets_mark).map(|sa| sa.id)
    }

    /// The associations that the device of a policy may use for some packets.
    fn serving<'a>(
        &'a self,
        policy: &'a Policy,
    ) -> impl Iterator<Item = &'a SecurityAssociation> + Clone + use<'a> {
        let asked = self.asked(policy);
        let is_offloaded = |offload: OffloadDev| offload.kind == OffloadKind::Packet;
        let hidden = asked.clone().any(|sa| sa.sets_mark || !sa.offload.is_some_and(is_offloaded));
        let step = policy.templates.first().zip(policy.offload);
        asked.filter(move |sa| {
            !hidden && step.is_some_and(|(template, device)| serves(sa, policy, template, device.ifindex))
        })
    }

    /// The associations with the addresses and the reqid of an offloaded policy's only template.
    fn asked<'a>(
        &'a self,
        policy: &'a Policy,
    ) -> impl Iterator<Item = &'a SecurityAssociation> + Clone + use<'a> {
        let template = match policy.templates[..] {
            [ref template] if policy.offload.is_some() => Some(template),
            _ => None,
        };
        // Looked up here, and not each time that the answer is gone through.
        let asked = template.map(|template| {
            let asked = self.sas.of_request(Request::of(policy, template)).map(|(_, sa)| sa);
            asked.filter(|sa| sa.source == template.source)
        });
        asked.into_iter().flatten()
    }

    /// When this is.
    pub(crate) fn revision(&self) -> Revision {
        self.journal.revision()
    }

    /// What has changed since then; `None` if that is no longer known.
    pub(crate) fn changes_since(&self, revision: Revision) -> Option<impl Iterator<Item = &Change>> {
        self.journal.since(revision)
    }

    /// All policies with their keys.
    pub(crate) fn keyed_policies(&self) -> impl Iterator<Item = (PolicyKey, &Policy)> {
        self.policies.iter()
    }

    /// All policies with this key or a higher one, in order of keys.
    pub(crate) fn keyed_policies_from(&self, first: PolicyKey) -> impl Iterator<Item = (PolicyKey, &Policy)> {
        self.policies.from(first)
    }

    pub(crate) fn policy_with_key(&self, key: PolicyKey) -> Option<&Policy> {
        self.policies.get(key)
    }

    pub(crate) fn key_of(&self, policy: &PolicyId) -> Option<PolicyKey> {
        self.policies.key(policy)
    }

    /// Tells the policies apart that have had a key one after the other.
    pub(crate) fn generation(&self, key: PolicyKey) -> u32 {
        self.policies.generation(key)
    }

    /// The packet-offloaded outbound policies whose only template asks for this.
    pub(crate) fn policies_asking_for(&self, asked: Request) -> impl Iterator<Item = PolicyKey> {
        self.policies.of_request(asked).map(|(key, _)| key)
    }

    fn insert_sa(&mut self, sa: SecurityAssociation) {
        let (now, expires) = (Request::from(&sa), sa.expires);
        let Ok((key, before)) = self.sas.insert(sa) else { return };
        if let Some(was) = before.as_ref().map(Request::from).filter(|was| *was != now) {
            self.journal.record(Change::Sa(was));
        }
        self.expires_instead(Expiring::Sa(key), before.and_then(|before| before.expires), expires);
        self.journal.record(Change::Sa(now));
    }

    fn remove_sa(&mut self, id: &SaId) {
        let Some((key, sa)) = self.sas.remove(id) else { return };
        self.expires_instead(Expiring::Sa(key), sa.expires, None);
        self.journal.record(Change::Sa(Request::from(&sa)));
    }
}

/// Whether the kernel would take an association with the addresses and the reqid of a template for some packets of its
/// policy, if that is offloaded to this device and has no mark.
fn serves(sa: &SecurityAssociation, policy: &Policy, template: &Template, device: u32) -> bool {
    sa.is_outbound_packet_offload()
        && sa.offload.is_some_and(|offload| offload.ifindex == device)
        && sa.id.protocol == IPPROTO_ESP
        && template.protocol == IPPROTO_ESP
        && sa.id.spi != 0
        && (template.spi == 0 || sa.id.spi == template.spi)
        && sa.mode == template.mode
        && sa.if_id == policy.id.if_id
        && sa.id.mark.value == 0
        && sa.cpu.is_none()
        && !sa.receives_only
        // Policies with a context are never fast, and the others do not use one with a context.
        && !sa.has_security_context
}

fn is_candidate(policy: &Policy) -> bool {
    policy.id.direction == Direction::Out && policy.is_packet_offloaded()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Action, Direction, Mark, Mode, PolicyType, Selector};

    const NIC: u32 = 7;

    fn policy(destination: &str, policy_type: PolicyType) -> Policy {
        let selector =
            Selector::between("10.0.0.0/24".parse().unwrap(), destination.parse().unwrap()).unwrap();
        Policy::new(PolicyId { policy_type, ..PolicyId::new(Direction::Out, selector) })
    }

    fn sa(spi: u32) -> SecurityAssociation {
        SecurityAssociation {
            offload: Some(OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false }),
            ..SecurityAssociation::for_template(&template(), spi)
        }
    }

    fn template() -> Template {
        Template::esp_tunnel("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap(), 1)
    }

    fn live_spis(database: &Database, template: &Template) -> Vec<u32> {
        database.live_sas(&offloaded(template)).map(|sa| sa.id.spi).collect()
    }

    fn offloaded(template: &Template) -> Policy {
        let offload = Some(OffloadDev { ifindex: NIC, kind: OffloadKind::Packet, inbound: false });
        Policy { templates: [*template].into(), offload, ..policy("10.0.1.0/24", PolicyType::Main) }
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
    fn many_policies_and_associations_are_stored_like_a_few() {
        let numbers = 0..u32::try_from(MANY).unwrap();
        let address = |number: u32| std::net::Ipv4Addr::from(0x0a00_0000 | number);
        let policies =
            numbers.clone().map(|number| policy(&format!("{}/32", address(number)), PolicyType::Main));
        let told =
            Snapshot { policies: policies.collect(), sas: numbers.map(sa).collect(), ..Snapshot::default() };
        let mut database = Database::default();
        for told in [told.clone(), Snapshot { sas: vec![sa(7)], ..told.clone() }, Snapshot::default(), told] {
            database.apply(PolicyEvent::Snapshot(told.clone()));
            assert_eq!(database.sas().count(), told.sas.len());
            assert!(told.policies.iter().all(|policy| database.policy(&policy.id) == Some(policy)));
            assert!(told.sas.iter().all(|sa| database.sa(&sa.id) == Some(sa)));
        }
    }

    #[test]
    fn an_audit_that_finds_what_was_told_changes_nothing() {
        let mut database = Database::default();
        let told = Snapshot {
            policies: vec![policy("10.0.1.0/24", PolicyType::Main), policy("10.0.2.0/24", PolicyType::Main)],
            sas: vec![sa(1)],
            ..Snapshot::default()
        };
        database.apply(PolicyEvent::Snapshot(told.clone()));
        let before = database.revision();
        let mut found = told.clone();
        found.policies.reverse();
        database.apply(PolicyEvent::Audit(found));
        assert_eq!((database.audit_repairs(), database.revision()), (0, before));
        assert_eq!(database.snapshot(), told);
    }

    #[test]
    fn an_audit_repairs_what_was_never_told_and_counts_it() {
        let (one, two) = (policy("10.0.1.0/24", PolicyType::Main), policy("10.0.2.0/24", PolicyType::Main));
        let told = Snapshot { policies: vec![one.clone(), two], sas: vec![sa(1)], ..Snapshot::default() };
        let blocks = DefaultPolicy { forward: Action::Block, ..DefaultPolicy::default() };
        let repaired = [
            ("added", 1, Snapshot { sas: vec![sa(1), sa(2)], ..told.clone() }),
            ("removed", 2, Snapshot { policies: vec![one.clone()], sas: Vec::new(), ..told.clone() }),
            (
                "changed",
                3,
                Snapshot {
                    policies: vec![Policy { priority: 5, ..one }, policy("10.0.3.0/24", PolicyType::Main)],
                    ..told.clone()
                },
            ),
            ("default policy", 1, Snapshot { default_policy: blocks, ..told.clone() }),
        ];
        for (what, repairs, found) in repaired {
            let mut database = Database::default();
            database.apply(PolicyEvent::Snapshot(told.clone()));
            for policy in told.policies.clone() {
                database.apply(PolicyEvent::Policy(policy));
            }
            let (key, before) = (database.key_of(&told.policies[0].id).unwrap(), database.revision());
            assert!(database.is_told(key));
            database.apply(PolicyEvent::Audit(found.clone()));
            assert_eq!((database.snapshot(), database.audit_repairs()), (found, repairs), "{what}");
            assert!(database.changes_since(before).is_none(), "{what}: a compiler looks at everything");
            assert!(!database.is_told(key), "{what}: and relies on no order");
        }
    }

    #[test]
    fn an_audit_does_not_make_up_for_a_snapshot() {
        let mut database = Database::default();
        let found = Snapshot { sas: vec![sa(1)], ..Snapshot::default() };
        for event in [PolicyEvent::SasFlushed(0), PolicyEvent::Stale(StaleCause::Overrun)] {
            database.apply(event);
            database.apply(PolicyEvent::Audit(found.clone()));
            assert!(!database.is_current());
            assert_eq!((database.sas().count(), database.audit_repairs()), (0, 0));
        }
    }

    #[test]
    fn time_passes_for_what_is_here_now_and_only_once() {
        let mut database = Database::default();
        let ages = |expires| Policy { expires: Some(expires), ..policy("10.0.1.0/24", PolicyType::Main) };
        assert!(!database.set_time(90), "there is nothing that expires");
        database.apply(PolicyEvent::Policy(ages(100)));
        database.apply(PolicyEvent::Sa(SecurityAssociation { expires: Some(100), ..sa(1) }));
        assert!(!database.set_time(97));
        assert!(database.set_time(98), "within 2 s");
        assert!(database.is_about_to_expire(Some(100)) && !database.is_about_to_expire(Some(101)));
        assert!(!database.set_time(99), "that is known");
        assert!(database.set_time(97), "the clock was set back");

        database.apply(PolicyEvent::Policy(ages(200)));
        database.apply(PolicyEvent::SaRemoved(sa(1).id));
        assert!(!database.set_time(110), "neither is there any longer");
        assert!(database.set_time(u64::MAX));
        database.apply(PolicyEvent::Snapshot(Snapshot { policies: vec![ages(100)], ..Snapshot::default() }));
        assert!(database.set_time(0), "snapshots tell it too");
        database.apply(PolicyEvent::PolicyRemoved(ages(100).id));
        assert!(!database.set_time(u64::MAX));
    }

    #[test]
    fn a_reader_that_was_away_for_more_changes_than_are_kept_has_to_read_everything() {
        let mut database = Database::default();
        database.apply(PolicyEvent::Snapshot(Snapshot::default()));
        let start = database.revision();
        let kept = u32::try_from(journal::LENGTH).unwrap();
        (1..=kept).for_each(|spi| database.apply(PolicyEvent::Sa(sa(spi))));
        assert_eq!(database.changes_since(start).map(Iterator::count), Some(journal::LENGTH));
        database.apply(PolicyEvent::SaRemoved(sa(1).id));
        assert!(database.changes_since(start).is_none());
        assert_eq!(database.changes_since(database.revision()).map(Iterator::count), Some(0));
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
        assert_eq!(database.snapshot().policies, [new.clone(), other_bytes.clone()]);
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
        assert_eq!(live_spis(&database, &template()), [0x200, 0x100]);
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
        assert_eq!(live_spis(&database, &Template { reqid: 0, ..template() }), [0; 0], "0 is not any");
    }

    #[test]
    fn an_association_of_software_hides_those_of_the_device_that_have_its_addresses_and_reqid() {
        let software = |spi| SecurityAssociation { offload: None, ..sa(spi) };
        let elsewhere = "192.0.2.9".parse().unwrap();
        let mut database = Database::default();
        database.apply(PolicyEvent::Sa(sa(1)));
        database.apply(PolicyEvent::Sa(SecurityAssociation { source: elsewhere, ..software(2) }));
        database.apply(PolicyEvent::Sa(SecurityAssociation { reqid: 9, ..software(3) }));
        assert_eq!(live_spis(&database, &template()), [1]);
        database.apply(PolicyEvent::Sa(software(4)));
        assert_eq!(live_spis(&database, &template()), [0; 0]);
        database.apply(PolicyEvent::SaRemoved(software(4).id));
        assert_eq!(live_spis(&database, &template()), [1]);
    }

    #[test]
    fn an_association_that_sets_a_mark_hides_the_others_of_its_tunnel() {
        let marking = SecurityAssociation { sets_mark: true, ..sa(2) };
        let policy = offloaded(&template());
        let mut database = Database::default();
        database.apply(PolicyEvent::Sa(sa(1)));
        assert_eq!(database.marking_sa(&policy), None);
        database.apply(PolicyEvent::Sa(marking.clone()));
        assert_eq!(live_spis(&database, &template()), [0; 0], "the kernel may choose either");
        assert_eq!(database.marking_sa(&policy), Some(marking.id));
        database.apply(PolicyEvent::SaRemoved(marking.id));
        assert_eq!(live_spis(&database, &template()), [1]);
    }

    #[test]
    fn an_association_serves_only_the_policy_the_kernel_would_let_it_serve() {
        let offload = |ifindex, kind, inbound| Some(OffloadDev { ifindex, kind, inbound });
        let elsewhere = "192.0.2.9".parse().unwrap();
        let selector = |source: &str, destination: &str| {
            Some(Selector::between(source.parse().unwrap(), destination.parse().unwrap()).unwrap())
        };
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
            ("for one processor", SecurityAssociation { cpu: Some(0), ..sa(1) }),
            ("that receives only", SecurityAssociation { receives_only: true, ..sa(1) }),
            (
                "a narrow selector",
                SecurityAssociation { selector: selector("10.0.0.0/24", "10.0.1.0/25"), ..sa(1) },
            ),
            (
                "a selector of the other family",
                SecurityAssociation { selector: selector("::/0", "::/0"), ..sa(1) },
            ),
            ("a security context", SecurityAssociation { has_security_context: true, ..sa(1) }),
            ("one that sets a mark", SecurityAssociation { sets_mark: true, ..sa(1) }),
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

    #[test]
    fn an_association_with_a_selector_serves_a_policy_that_it_covers() {
        let covers = |source: &str, destination: &str, change: fn(&mut Selector)| {
            let mut selector =
                Selector::between(source.parse().unwrap(), destination.parse().unwrap()).unwrap();
            change(&mut selector);
            let mut database = Database::default();
            database.apply(PolicyEvent::Sa(SecurityAssociation { selector: Some(selector), ..sa(1) }));
            let is_narrow = database.narrow_sa(&offloaded(&template())).is_some();
            assert_eq!(live_spis(&database, &template()).is_empty(), is_narrow);
            !is_narrow
        };
        assert!(covers("0.0.0.0/0", "0.0.0.0/0", |_| {}));
        assert!(covers("10.0.0.5/24", "10.0.1.9/24", |_| {}), "host bits do not matter");
        assert!(covers("10.0.0.0/8", "10.0.1.0/24", |_| {}));
        assert!(!covers("10.0.0.5/32", "10.0.1.0/24", |_| {}));
        assert!(!covers("10.0.0.0/24", "10.0.2.0/24", |_| {}));
        assert!(!covers("10.0.0.0/24", "10.0.1.0/24", |selector| selector.protocol = 6));
        assert!(!covers("10.0.0.0/24", "10.0.1.0/24", |selector| selector.source_port.mask = 0xff));
        assert!(!covers("10.0.0.0/24", "10.0.1.0/24", |selector| selector.ifindex = NIC));
    }
}
