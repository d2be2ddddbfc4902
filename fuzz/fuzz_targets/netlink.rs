//! Datagrams of the kernel's, or not: no bytes make the parser or the database panic.
#![no_main]

use bytes::Bytes;
use fastswan::{
    Database, PolicyEvent, Snapshot,
    netlink::{Content, decode},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(messages) = decode(&Bytes::copy_from_slice(bytes)) else { return };
    let mut database = Database::default();
    database.apply(PolicyEvent::Snapshot(Snapshot::default()));
    for message in messages {
        if let Content::Event(event) = message.content {
            database.apply(event);
        }
    }
    // What was taken in can be told again.
    let mut copy = Database::default();
    copy.apply(PolicyEvent::Snapshot(database.snapshot()));
    assert_eq!(copy.snapshot(), database.snapshot());
});
