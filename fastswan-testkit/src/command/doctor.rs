//! What this machine can run, and why not.

use std::{fs, process::Command as Process};

use fastswan::{XdpForwarder, forwarder::AttachConfig, table::TableConfig};
use fastswan_testkit::lab::Namespace;

use super::ebpf;

/// Prints a line for each thing that a tier needs.
pub(crate) fn run() {
    println!("tier 0: no privilege");
    tell("this binary was built", Ok("so are the tests".to_owned()));
    println!("tier 1: root, this kernel");
    for (what, found) in tier_1() {
        tell(what, found);
    }
    println!("what the fast path gains from this kernel");
    tell("the guard", guard());
    println!("tier 2: guests with other kernels and the software NIC");
    for (program, package) in GUEST_PROGRAMS {
        let found = version(program, &["--version"]);
        tell(program, found.map_err(|error| format!("{error}; run `apt-get install {package}`")));
    }
    println!("what `cargo testkit ci` needs besides");
    let missing = ebpf::missing();
    tell("the eBPF toolchain", if missing.is_empty() { Ok(String::new()) } else { Err(missing.join("; ")) });
    for (what, program, arguments) in CARGO_TOOLS {
        tell(what, version(program, arguments));
    }
}

/// Programs that building and running guests takes, and their Debian packages.
const GUEST_PROGRAMS: [(&str, &str); 3] =
    [("qemu-system-x86_64", "qemu-system-x86"), ("mmdebstrap", "mmdebstrap"), ("cpio", "cpio")];

/// Cargo's tools and how to ask for their versions.
const CARGO_TOOLS: [(&str, &str, &[&str]); 3] = [
    ("a nightly toolchain", "rustc", &["+nightly", "--version"]),
    ("cargo-deny", "cargo-deny", &["--version"]),
    ("cargo-fuzz", "cargo-fuzz", &["--version"]),
];

/// What tier 1 needs, each with what was found or why it is not there.
pub(crate) fn tier_1() -> Vec<(&'static str, Result<String, String>)> {
    let root = nix::unistd::geteuid().is_root();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let program = XdpForwarder::load(TableConfig::default());
    let cost = program.as_ref().ok().and_then(|(forwarder, _)| forwarder.cost().ok());
    let loaded = match (&program, cost) {
        (Ok(_), Some(cost)) => Ok(format!("{} verified instructions", cost.verified_instructions)),
        (Ok(_), None) => Ok(String::new()),
        (Err(error), _) => Err(error.to_string()),
    };
    vec![
        ("root", if root { Ok(String::new()) } else { Err("run as root, or with sudo".to_owned()) }),
        ("ip", version("ip", &["-V"])),
        ("the program loads", loaded.map(|cost| format!("Linux {kernel}, {cost}"))),
        ("namespaces, veth and XFRM", lab()),
    ]
}

/// Whether the fast path can be shut before the kernel removes anything.
fn guard() -> Result<String, String> {
    let (mut forwarder, _) = XdpForwarder::load(TableConfig::default()).map_err(|error| error.to_string())?;
    let guard = forwarder.attach_guard();
    guard
        .map(|_| "it shuts the fast path before anything is removed".to_owned())
        .map_err(|error| error.to_string())
}

fn lab() -> Result<String, String> {
    let namespace = Namespace::new("doctor").map_err(|error| error.to_string())?;
    namespace.ip("link add v0 type veth peer name v1").map_err(|error| error.to_string())?;
    namespace.ip("xfrm policy list").map_err(|error| error.to_string())?;
    let config = AttachConfig::new("v0").complete_frames(true);
    let attached = namespace.enter(|| {
        let (mut forwarder, _) = XdpForwarder::load(TableConfig::default())?;
        forwarder.attach(&config)
    });
    attached
        .map(|attachment| format!("XDP on veth: {:?}", attachment.mode))
        .map_err(|error| error.to_string())
}

fn version(program: &str, arguments: &[&str]) -> Result<String, String> {
    match Process::new(program).args(arguments).output() {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
        }
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

fn tell(what: &str, found: Result<String, String>) {
    match found {
        Ok(detail) if detail.is_empty() => println!("  yes  {what}"),
        Ok(detail) => println!("  yes  {what}: {detail}"),
        Err(reason) => println!("  NO   {what}: {reason}"),
    }
}
