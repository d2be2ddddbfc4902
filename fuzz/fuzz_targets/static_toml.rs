//! Files of static policies: what is accepted is a policy of one family with its association, and nothing
//! else happens.
#![no_main]

use fastswan::{
    PolicyEvent, PolicySource as _, Selector, StaticSource, policy::Family, source::fixed::StaticSourceError,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut source = match StaticSource::from_toml(text) {
        Ok(source) => source,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            if let StaticSourceError::Toml { line, column, .. } = error {
                assert!(line >= 1 && line <= text.lines().count() + 1 && column >= 1);
            }
            return;
        }
    };
    let event = futures::executor::block_on(source.next_event());
    let Ok(Some(PolicyEvent::Snapshot(snapshot))) = event else { panic!("{event:?}") };
    assert!(snapshot.sas.is_empty());
    for policy in snapshot.policies {
        let Selector { source, destination, .. } = policy.id.selector;
        assert_eq!(Family::of(&source), Family::of(&destination));
        assert!(policy.is_packet_offloaded() && policy.assumed.is_some());
    }
});
