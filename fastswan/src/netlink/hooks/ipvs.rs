//! Virtual services of IPVS. Answers of their servers that are forwarded get another source.

use std::{fs, io};

use crate::{
    host::{Hook, HookKind, HookPlace},
    policy::Family,
};

/// That of the calling thread's network namespace.
const SERVICES: &str = "/proc/thread-self/net/ip_vs";

/// Reads what services there are. The kernel does not tell of them.
pub(super) fn read() -> io::Result<Vec<Hook>> {
    match fs::read_to_string(SERVICES) {
        Ok(services) => Ok(services.lines().filter_map(service).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A line that begins with a protocol or `FWM` is a service; those of servers begin with an arrow.
fn service(line: &str) -> Option<Hook> {
    let mut words = line.split_whitespace();
    let protocol = words.next().filter(|word| matches!(*word, "TCP" | "UDP" | "SCTP" | "FWM"))?;
    let address = words.next()?;
    let family = match protocol {
        // A mark may be of either.
        "FWM" => None,
        _ if address.starts_with('[') => Some(Family::V6),
        _ => Some(Family::V4),
    };
    Some(Hook {
        kind: HookKind::Ipvs,
        place: HookPlace::Forwarding(family),
        name: format!("service {protocol} {address}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_told_from_their_servers() {
        let text = "IP Virtual Server version 1.2.1 (size=4096)\n\
                    Prot LocalAddress:Port Scheduler Flags\n\
                    \x20 -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n\
                    TCP  C0000201:0050 rr \n\
                    \x20 -> 0A010005:0050      Masq    1      0          0         \n\
                    UDP  [2001:0db8:0000:0000:0000:0000:0000:0001]:0035 wlc \n\
                    FWM  00000001 rr \n";
        let hooks: Vec<_> = text.lines().filter_map(service).collect();
        let families = hooks.iter().map(|hook| hook.place);
        let expected = [Some(Family::V4), Some(Family::V6), None].map(HookPlace::Forwarding);
        assert!(families.eq(expected), "{hooks:?}");
        assert_eq!(hooks[0].name, "service TCP C0000201:0050");
    }
}
