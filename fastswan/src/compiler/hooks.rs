//! Which packets must not skip the kernel because of what hooks into its way of forwarding.

use hashbrown::HashMap;

use super::obstacles::Obstacle;
use crate::{
    host::{Hook, HookPlace, Link},
    policy::Family,
};

/// What keeps packets from being fast once they have come in. Hooks where packets come in are the ports' business.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct HooksAhead {
    /// Those of a whole family, or of both.
    everywhere: Vec<Hook>,
    /// One for each device, by interface index.
    egress: HashMap<u32, Hook>,
}

impl HooksAhead {
    pub(super) fn new(hooks: &[Hook]) -> Self {
        let mut ahead = Self::default();
        for hook in hooks {
            match hook.place {
                HookPlace::Forwarding(_) => ahead.everywhere.push(hook.clone()),
                HookPlace::Egress(device) => {
                    ahead.egress.entry(device).or_insert_with(|| hook.clone());
                }
                HookPlace::Ingress(_) => {}
            }
        }
        ahead
    }

    /// What packets of a family that leave through a device would skip: there, or on a device that those of this one leave
    /// by, as those of a VLAN device and of a bond do.
    pub(super) fn of(&self, family: Family, device: u32, links: &HashMap<u32, Link>) -> Option<&Hook> {
        let is_of = |hook: &&Hook| match hook.place {
            HookPlace::Forwarding(of) => of.is_none_or(|of| of == family),
            _ => false,
        };
        if let Some(hook) = self.everywhere.iter().find(is_of) {
            return Some(hook);
        }
        if self.egress.is_empty() {
            return None;
        }
        let mut devices = vec![device];
        let mut at = 0;
        while let Some(device) = devices.get(at).copied() {
            if let Some(hook) = self.egress.get(&device) {
                return Some(hook);
            }
            at += 1;
            let below = links.get(&device).and_then(|link| link.parent);
            let members = links.values().filter(|link| link.controller == Some(device));
            for below in members.map(|link| link.ifindex).chain(below) {
                if !devices.contains(&below) {
                    devices.push(below);
                }
            }
        }
        None
    }

    /// Whether some are about devices.
    pub(super) fn are_on_devices(&self) -> bool {
        !self.egress.is_empty()
    }

    /// Those that keep a whole family from being fast.
    pub(super) fn obstacles(&self) -> Vec<Obstacle> {
        self.everywhere.iter().cloned().map(Obstacle::Hook).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HookKind;

    const FLOWS: [(Family, u32); 4] = [(Family::V4, 1), (Family::V4, 2), (Family::V6, 1), (Family::V6, 2)];

    fn concerned(place: HookPlace, links: &[Link]) -> [bool; 4] {
        let ahead = HooksAhead::new(&[Hook { kind: HookKind::NfTables, place, name: String::new() }]);
        let links = links.iter().map(|link| (link.ifindex, link.clone())).collect();
        FLOWS.map(|(family, device)| ahead.of(family, device, &links).is_some())
    }

    #[test]
    fn a_hook_concerns_its_family_or_its_device() {
        assert_eq!(concerned(HookPlace::Forwarding(None), &[]), [true; 4]);
        assert_eq!(concerned(HookPlace::Forwarding(Some(Family::V4)), &[]), [true, true, false, false]);
        assert_eq!(concerned(HookPlace::Forwarding(Some(Family::V6)), &[]), [false, false, true, true]);
        assert_eq!(concerned(HookPlace::Egress(2), &[]), [false, true, false, true]);
        assert_eq!(concerned(HookPlace::Ingress(2), &[]), [false; 4]);
    }

    #[test]
    fn a_hook_concerns_the_devices_on_top_of_its_own() {
        let link = |ifindex, parent, controller| Link { ifindex, parent, controller, ..Link::default() };
        // A VLAN device with index 1 on a bond, and one with index 2 on another device.
        let links =
            [link(1, Some(5), None), link(2, Some(6), None), link(5, None, None), link(7, None, Some(5))];
        assert_eq!(concerned(HookPlace::Egress(7), &links), [true, false, true, false]);
        assert_eq!(concerned(HookPlace::Egress(1), &links), [true, false, true, false]);
        assert_eq!(concerned(HookPlace::Egress(6), &links), [false, true, false, true]);
        // Two ends of a pair are each on the other.
        let pair = [link(1, Some(2), None), link(2, Some(1), None)];
        assert_eq!(concerned(HookPlace::Egress(3), &pair), [false; 4]);
    }
}
