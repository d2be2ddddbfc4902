//! What most scenarios begin and end with.

use std::{fs, time::Duration};

use anyhow::Context as _;

use crate::guest::{
    Story,
    gateways::Gateways,
    mirror::{Counted, Mirror},
    nic::Clear,
    swan::{Child, Connection, Swan},
    traffic::Traffic,
    wait_at_most, wait_for,
    wire::Wire,
};

/// What a kernel says of packets that it could do nothing with because a tunnel was not there at one of the ends, or was
/// just being deleted when it had found it.
const WITHOUT_TUNNEL: [&str; 4] = ["XfrmInNoStates", "XfrmInStateInvalid", "XfrmInNoPols", "XfrmOutPolBlock"];

/// An emulated processor may be away for so long between the program's look at the table and the NIC's at its own.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// What the gateways are to be like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    /// Addresses of A and B.
    pub(super) outer: (&'a str, &'a str),
    /// Tunnels, as A sees them.
    pub(super) children: &'a [Child<'a>],
    /// The NIC leaks as real ones do.
    pub(super) leak: bool,
    /// There will be times without a tunnel, and kernels refuse to forward in clear then.
    pub(super) refuse_clear: bool,
    /// So many packets the stack or the program may have looked up before policies or associations were removed, and given
    /// to the NIC when it knew of none for them any longer: such a packet leaves in clear whether there is a mirror or not.
    pub(super) in_flight: u64,
    /// Arguments of the mirror.
    pub(super) mirror: &'a [&'a str],
    /// Where the scene's logs go, inside those of the story.
    pub(super) logs: &'a str,
}

impl Default for Plan<'_> {
    fn default() -> Self {
        const NET: Child<'static> = Child {
            name: "net",
            inner: ("10.1.0.0/16", "10.2.0.0/16"),
            mode: "tunnel",
            proposal: "aes128gcm16",
        };
        Self {
            outer: ("192.0.2.1", "192.0.2.2"),
            children: &[NET],
            leak: false,
            refuse_clear: false,
            in_flight: 0,
            mirror: &[],
            logs: "",
        }
    }
}

/// Gateways with strongSwan at both ends and a mirror at A.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) gateways: Gateways,
    pub(super) swan_a: Swan,
    _swan_b: Swan,
    pub(super) mirror: Option<Mirror>,
    pub(super) traffic: Option<Traffic>,
    wire: Option<Wire>,
    refuses_clear: bool,
    in_flight: u64,
    logs: std::path::PathBuf,
}

impl Scene {
    /// Sets everything up but the tunnels and the traffic.
    pub(super) fn set_up(story: &Story, plan: Plan<'_>) -> anyhow::Result<Self> {
        let logs = story.logs().join(plan.logs);
        fs::create_dir_all(&logs)?;
        let gateways = Gateways::new()?;
        Gateways::PORT_A.set_leak(plan.leak)?;
        if plan.refuse_clear {
            gateways.refuse_clear()?;
        }
        let wire = Wire::follow(&gateways).context("following the wire")?;
        let (a, b) = plan.outer;
        let reversed: Vec<_> = plan.children.iter().map(|child| child.reversed()).collect();
        let connection_a = Connection { outer: (a, b), children: plan.children };
        let connection_b = Connection { outer: (b, a), children: &reversed };
        let swan_a = Swan::start(&gateways.a, "swan-a", connection_a, true, &logs)?;
        let swan_b = Swan::start(&gateways.b, "swan-b", connection_b, false, &logs)?;
        let mirror = Mirror::start(&gateways, "mirror", plan.mirror, &logs)?;
        Ok(Self {
            gateways,
            swan_a,
            _swan_b: swan_b,
            mirror: Some(mirror),
            traffic: None,
            wire: Some(wire),
            refuses_clear: plan.refuse_clear,
            in_flight: plan.in_flight,
            logs,
        })
    }

    /// The same, with tunnels that are up and traffic that is fast.
    pub(super) fn established(story: &Story, plan: Plan<'_>) -> anyhow::Result<Self> {
        let mut scene = Self::set_up(story, plan)?;
        for child in plan.children {
            scene.swan_a.initiate(child.name)?;
        }
        scene.traffic = Some(Traffic::start(&scene.gateways)?);
        scene.wait_until_fast()?;
        Ok(scene)
    }

    /// The traffic, which has started.
    pub(super) fn traffic(&mut self) -> anyhow::Result<&mut Traffic> {
        self.traffic.as_mut().context("there is no traffic")
    }

    /// Frames that XDP has sent to A's port.
    pub(super) fn redirected() -> u64 {
        Gateways::PORT_A.counter("xdp_xmit").unwrap_or(0)
    }

    /// The mirror's last report.
    pub(super) fn counted(&self) -> Counted {
        self.mirror.as_ref().map(Mirror::counted).unwrap_or_default()
    }

    /// Stops the mirror, whichever way it ends, and starts another.
    pub(super) fn restart_mirror(&mut self, name: &str) -> anyhow::Result<()> {
        drop(self.mirror.take());
        self.mirror = Some(Mirror::start(&self.gateways, name, &[], &self.logs)?);
        Ok(())
    }

    /// Waits until XDP sends packets, and some have arrived in both directions.
    pub(super) fn wait_until_fast(&mut self) -> anyhow::Result<()> {
        let before = Self::redirected();
        wait_for("packets on the fast path", || Self::redirected() >= before + 20)?;
        self.traffic()?.wait_for_arrivals(50)
    }

    /// Waits until nothing is fast any longer: for as long as takes 50 packets that are not.
    pub(super) fn wait_until_slow(&mut self) -> anyhow::Result<()> {
        let traffic = self.traffic.as_ref().context("there is no traffic")?;
        let (mut sent, mut redirected) = (traffic.sent()[0], Self::redirected());
        wait_for("the fast path to be off", || {
            let now = Self::redirected();
            if now != redirected {
                (sent, redirected) = (traffic.sent()[0], now);
            }
            traffic.sent()[0] > sent + 50
        })
    }

    /// Whether nothing is fast any longer one second from now.
    pub(super) fn is_slow_within_a_second() -> bool {
        std::thread::sleep(Duration::from_secs(1));
        let before = Self::redirected();
        let grows = || Self::redirected() != before;
        wait_at_most(Duration::from_millis(500), "frames from XDP", grows).is_err()
    }

    /// Ends it, and notes what must hold in every story.
    pub(super) fn finish(mut self, story: &mut Story) -> anyhow::Result<()> {
        let totals = self.traffic.take().map(Traffic::stop).transpose()?.unwrap_or_default();
        let guarded = self.mirror.as_ref().is_some_and(Mirror::is_guarded);
        let counted = self.mirror.take().map(Mirror::stop).transpose()?.unwrap_or_default();
        let seen = self.wire.take().map(Wire::seen).transpose()?.unwrap_or_default();
        let nic = Gateways::PORT_A.counters()?;
        let leaked = Gateways::PORT_A.clear()?;
        story.add("fast_packets", counted.fast_packets);
        story.add("shut", counted.times_shut);
        story.add("passed_removal", counted.passed.get("removal").copied().unwrap_or(0));
        story.add("sent", totals.sent.iter().sum());
        story.add("lost", totals.lost.iter().sum());
        story.add("esp_from_a", seen.esp[0]);
        story.add("clear_on_wire", seen.clear.iter().sum());
        let [lost_a, lost_b] = totals.lost;
        story.expect(lost_a + lost_b == 0, format!("lost {lost_a} packets from a and {lost_b} from b"));
        story.expect(totals.twice == 0, format!("{} packets arrived twice", totals.twice));
        let removed = leaked.iter().filter(|clear| clear.cause == "removed").count() as u64;
        let clear: u64 = seen.clear.iter().sum();
        let leaks = Gateways::PORT_A.leaks()?;
        if leaks {
            let lag = leaked.iter().filter_map(|clear| clear.since).max().unwrap_or(0);
            let mirror = if guarded { "guarded" } else { "leak" };
            story.figure(&format!("{mirror}_clear"), removed);
            story.figure(&format!("{mirror}_lag_us"), lag / 1000);
        }
        // The NIC notes all that leaves in clear from XDP, or drops it. What it does not note, the stack gave to it.
        let unnoted = clear.saturating_sub(leaked.len() as u64);
        let excused = if leaks && !guarded {
            leaked.iter().all(|clear| clear.cause == "removed") && unnoted <= self.in_flight
        } else {
            leaked.iter().all(was_looked_up_before) && unnoted + leaked.len() as u64 <= self.in_flight
        };
        story.expect(
            excused,
            format!("{clear} packets in clear on the wire: {:?}, of the NIC: {leaked:?}", seen.examples),
        );
        let mut errors = Gateways::ipsec_errors(&self.gateways.b);
        if self.refuses_clear {
            errors.retain(|error| !WITHOUT_TUNNEL.iter().any(|excused| error.starts_with(excused)));
        }
        story.expect(errors.is_empty(), format!("the judge's kernel complains: {}", errors.join(", ")));
        fs::write(self.logs.join("counted"), format!("{totals:#?}\n{counted:#?}\n{seen:#?}\n{nic:#?}\n"))?;
        Ok(())
    }
}

/// Whether the policy or the association may have been there when the packet was looked up.
fn was_looked_up_before(packet: &Clear) -> bool {
    packet.path == "stack" || packet.since.is_some_and(|since| Duration::from_nanos(since) <= LONGEST_PAUSE)
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::write(self.logs.join("kernels"), self.gateways.describe());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_of_the_program_is_excused_only_right_after_a_removal() {
        let clear = |path: &str, since| Clear { cause: "no_sa".to_owned(), path: path.to_owned(), since };
        assert!(was_looked_up_before(&clear("stack", None)));
        assert!(was_looked_up_before(&clear("xdp", Some(1_000_000))));
        assert!(!was_looked_up_before(&clear("xdp", Some(11_000_000))));
        assert!(!was_looked_up_before(&clear("xdp", None)));
    }
}
