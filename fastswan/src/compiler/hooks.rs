//! Which packets must not skip the kernel because of what hooks into its way of forwarding.

use std::collections::HashMap;

use crate::{
    host::{Hook, HookPlace, HostFacts},
    policy::Family,
};

/// One hook for everything that is kept from being fast by hooks. Those where packets come in are the ports' business.
#[derive(Debug, Default)]
pub(super) struct HooksAhead {
    v4: Option<Hook>,
    v6: Option<Hook>,
    /// By interface index.
    egress: HashMap<u32, Hook>,
}

impl HooksAhead {
    pub(super) fn new(host: &HostFacts) -> Self {
        let mut ahead = Self::default();
        for hook in &host.hooks {
            match hook.place {
                HookPlace::Forwarding(family) => {
                    if family != Some(Family::V6) {
                        ahead.v4.get_or_insert_with(|| hook.clone());
                    }
                    if family != Some(Family::V4) {
                        ahead.v6.get_or_insert_with(|| hook.clone());
                    }
                }
                HookPlace::Egress(device) => {
                    for device in with_those_above(device, host) {
                        ahead.egress.entry(device).or_insert_with(|| hook.clone());
                    }
                }
                HookPlace::Ingress(_) => {}
            }
        }
        ahead
    }

    /// What packets of a family that leave through a device would skip.
    pub(super) fn of(&self, family: Family, device: u32) -> Option<&Hook> {
        let everywhere = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        everywhere.as_ref().or_else(|| self.egress.get(&device))
    }
}

/// A device, and those whose packets leave by it: a VLAN device on it, or a bond that it is a member of.
fn with_those_above(device: u32, host: &HostFacts) -> Vec<u32> {
    let mut all = vec![device];
    let mut at = 0;
    while let Some(below) = all.get(at).copied() {
        at += 1;
        let controller = host.link(below).and_then(|link| link.controller);
        let on_it = host.links.iter().filter(|link| link.parent == Some(below)).map(|link| link.ifindex);
        for above in on_it.chain(controller) {
            if !all.contains(&above) {
                all.push(above);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{HookKind, Link};

    #[test]
    fn a_hook_concerns_its_family_or_its_device() {
        let hook = |place| Hook { kind: HookKind::NfTables, place, name: String::new() };
        let ahead = |place| HooksAhead::new(&HostFacts { hooks: vec![hook(place)], ..HostFacts::default() });
        let concerned = |place| {
            let ahead = ahead(place);
            [(Family::V4, 1), (Family::V4, 2), (Family::V6, 1), (Family::V6, 2)]
                .map(|(family, device)| ahead.of(family, device).is_some())
        };
        assert_eq!(concerned(HookPlace::Forwarding(None)), [true; 4]);
        assert_eq!(concerned(HookPlace::Forwarding(Some(Family::V4))), [true, true, false, false]);
        assert_eq!(concerned(HookPlace::Forwarding(Some(Family::V6))), [false, false, true, true]);
        assert_eq!(concerned(HookPlace::Egress(2)), [false, true, false, true]);
        assert_eq!(concerned(HookPlace::Ingress(2)), [false; 4]);
    }

    #[test]
    fn a_hook_concerns_the_devices_on_top_of_its_own() {
        let link = |ifindex, parent, controller| Link { ifindex, parent, controller, ..Link::default() };
        let links =
            vec![link(1, None, Some(2)), link(2, None, None), link(3, Some(2), None), link(4, None, None)];
        let hook = Hook { kind: HookKind::Tc, place: HookPlace::Egress(1), name: String::new() };
        let ahead = HooksAhead::new(&HostFacts { links, hooks: vec![hook], ..HostFacts::default() });
        assert_eq!(
            [1, 2, 3, 4].map(|device| ahead.of(Family::V4, device).is_some()),
            [true, true, true, false]
        );
    }
}
