//! The rooms of the house: a lower one knows nothing of a higher one, and nothing goes in circles.

mod imports;

use std::path::{Path, PathBuf};

use self::imports::{Imports, files, of_crate};

/// The modules of `fastswan/src`, the lowest first. ARCHITECTURE.md tells what each is.
const ROOMS: [&str; 15] = [
    "text",
    "sys",
    "policy",
    "prefix_map",
    "event",
    "host",
    "database",
    "netlink",
    "table",
    "compiler",
    "mirror",
    "source",
    "metrics",
    "forwarder",
    "gateway",
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// What is wrong with the order of rooms.
fn upward(imports: &Imports, rooms: &[&str]) -> Vec<String> {
    let floor = |room: &str| rooms.iter().position(|known| *known == room);
    let unknown = imports.children(&[]).into_iter().filter(|room| floor(room).is_none());
    let unknown = unknown.map(|room| format!("{room} has no place in the order"));
    let between = imports.between(&[]);
    let upward = between.iter().filter(|((from, to), _)| floor(from) < floor(to));
    unknown.chain(upward.map(|(_, example)| example.clone())).collect()
}

#[test]
fn no_room_of_the_library_knows_of_a_higher_one() {
    let library = of_crate(&workspace().join("fastswan/src/lib.rs"));
    let wrong = upward(&library, &ROOMS);
    assert!(wrong.is_empty(), "imports from a lower room to a higher one:\n{}", wrong.join("\n"));
}

#[test]
fn nothing_in_the_library_and_the_testkit_goes_in_circles() {
    for root in ["fastswan/src/lib.rs", "fastswan-testkit/src/lib.rs", "fastswan-testkit/src/main.rs"] {
        let circles = of_crate(&workspace().join(root)).circles();
        assert!(circles.is_empty(), "circles of imports in {root}:\n{}", circles.join("\n"));
    }
}

#[test]
fn an_import_from_a_higher_room_is_found_however_it_is_written() {
    let rooms = ["low", "high"];
    let ways = [
        "use crate::high::Thing;",
        "use crate::{other::A, high::{self, Thing as Alias}};",
        "use super::high::Thing;",
        "pub use crate::Thing;",
        "fn f() { let _ = crate::high::thing(); }",
        "mod inner { fn f(_: super::super::high::Thing<'_>, _: char) { g('\"'); g('\\''); g(\"\\\"\") } }",
        "fn f<'a>(c: &'a str) -> bool { c == r#\"\"\"# && super::high::thing() }",
        "#[cfg(test)] mod tests { use std::fmt; } use super::high::Thing;",
        "#[cfg(test)] use std::fmt; fn f(a: [u8; 2]) -> crate::high::Thing { a }",
        "use super::child_of_high::Renamed;",
    ];
    for low in ways {
        let read = files(&[
            ("src/lib.rs", "pub mod high; mod low; pub use high::Thing; use high::child as child_of_high;"),
            ("src/low.rs", low),
            ("src/high/mod.rs", "pub struct Thing; pub mod child;"),
            ("src/high/child.rs", "use crate::low::*; pub use super::Thing as Renamed;"),
        ]);
        let imports = Imports::read(Path::new("src/lib.rs"), &read);
        assert_eq!(upward(&imports, &rooms).len(), 1, "{low}: {imports:#?}");
        assert_eq!(imports.circles().len(), 1, "{low}: {imports:#?}");
    }
}

#[test]
fn what_is_no_import_from_a_higher_room_is_no_complaint() {
    let ways = [
        "/// [`crate::high::Thing`]\nfn f() {} // crate::high::Thing\n/* crate::high */",
        "const TEXT: &str = \"crate::high::Thing\"; const RAW: &str = r#\"super::high\"#;",
        "#[cfg(test)] mod tests { use crate::high::Thing; fn f() { super::f() } }",
        "#[cfg(test)] #[allow(unused)] use crate::high::Thing;",
        "#[cfg(test)] mod stories;",
        "#[cfg(all(test, feature = \"a\"))] mod stories { use crate::high::Thing; }",
        "#[cfg(any(test, fuzzing))] pub(crate) mod stories { use super::super::high::Thing; }",
        "use std::high; use high::Thing;",
    ];
    for low in ways {
        let read = files(&[
            ("src/lib.rs", "pub mod high; mod low;"),
            ("src/low.rs", low),
            ("src/high.rs", "use crate::low;"),
        ]);
        let imports = Imports::read(Path::new("src/lib.rs"), &read);
        assert_eq!(upward(&imports, &["low", "high"]), Vec::<String>::new(), "{low}");
        assert_eq!(imports.circles(), Vec::<String>::new(), "{low}");
    }
}

#[test]
fn a_room_that_the_order_does_not_know_is_a_complaint() {
    let read = files(&[("src/lib.rs", "mod low; mod new;"), ("src/low.rs", ""), ("src/new.rs", "")]);
    let imports = Imports::read(Path::new("src/lib.rs"), &read);
    assert_eq!(upward(&imports, &["low"]), ["new has no place in the order"]);
}
