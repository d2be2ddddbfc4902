//! Numbers for those who run a gateway, through the facade of the crate `metrics` (feature `metrics`).
//!
//! A [`Gateway`](crate::Gateway) counts what happens in its loop, and looks at all the rest every five seconds. Install a
//! recorder before the gateway is made, so that it learns the descriptions. Without the feature, nothing is counted and
//! nothing is paid.
//!
//! No metric has a policy or an address as a label: [`GatewayHandle::status`](crate::gateway::GatewayHandle::status) tells
//! each policy's traffic.
//!
//! | metric | kind | labels | what it is |
//! |---|---|---|---|
//! | `fastswan_policies` | gauge | `state`, `reason` | Packet-offloaded outbound policies: `fast`, or `kernel` with a [`PassReason`](crate::PassReason); the reason of fast ones is empty. |
//! | `fastswan_software_policies` | gauge | | Outbound policies that are not packet-offloaded. |
//! | `fastswan_table_used` | gauge | `what` | How full the table is: `slots`, and of each family `cells` and `exceptions`. |
//! | `fastswan_table_limit` | gauge | `what` | What the table has room for, likewise. |
//! | `fastswan_associations` | gauge | | Security associations. |
//! | `fastswan_current` | gauge | | 1 while the fast path is on: every input is current, and no kill switch is on. Else everything passes. |
//! | `fastswan_skipped_hooks` | gauge | `kind` | Hooks that fast packets skip, as [`Gateway::with_allowed_hooks`](crate::Gateway::with_allowed_hooks) allows. |
//! | `fastswan_queued_events` | gauge | | Events that the source holds and the loop has not read. |
//! | `fastswan_fast_packets_total` | counter | | Packets that were forwarded at XDP. |
//! | `fastswan_fast_bytes_total` | counter | | Their bytes, from the IP header on. |
//! | `fastswan_passed_packets_total` | counter | `reason` | Packets that were passed to the kernel. |
//! | `fastswan_fib_asked_total` | counter | | Packets that the kernel's own routes were asked about (`LoadConfig::ask_back`). |
//! | `fastswan_fib_differs_total` | counter | | Those of them that they lead elsewhere or nowhere: they passed, and the host is read again unless it was just changing. |
//! | `fastswan_neighbours` | gauge | `state` | Neighbours whose Ethernet addresses policies depend on: `resolved`, or `unresolved`. |
//! | `fastswan_solicitations_total` | counter | | Times that the kernel was to find a neighbour, or to keep one that fast packets go to. |
//! | `fastswan_failed_solicitations_total` | counter | | Requests for that which failed; a warning says why. |
//! | `fastswan_events_total` | counter | | Events that were applied. |
//! | `fastswan_stale_total` | counter | `input`, `cause` | Times that a source lost track: the one of `policies`, or of the `host`. |
//! | `fastswan_resyncs_total` | counter | `input`, `cause` | Snapshots that were applied, by what made them necessary: a [`StaleCause`](crate::source::StaleCause), `start`, or `snapshot` for one that was not announced. |
//! | `fastswan_audit_repairs_total` | counter | | Policies and associations that were not as an audit found them. |
//! | `fastswan_lease_expiries_total` | counter | | Renewals of the lease that came too late: packets passed for a while. |
//! | `fastswan_guard_shut_total` | counter | | Times that the guard has shut the fast path and the loop has opened it again. |
//! | `fastswan_table_writes_total` | counter | | Updates that were written to the table. |
//! | `fastswan_table_changes_total` | counter | | Cells, facts, guards, exceptions and slots in them. |
//! | `fastswan_batch_events` | histogram | | Events that were applied before the table was written. |
//! | `fastswan_compile_seconds` | histogram | | From a batch applied to what the table must hold. |
//! | `fastswan_lag_seconds` | histogram | | From the first event of a batch out of the source to all of it in the table. What an event has waited in the kernel and in the source, and a resynchronisation, come on top. |
//! | `fastswan_guard_open_seconds` | histogram | | From noticing that the guard has shut the fast path to opening it: the kernel settles, its notifications are applied. |

#[cfg(feature = "metrics")]
mod recorded;
#[cfg(not(feature = "metrics"))]
mod silent;

#[cfg(feature = "metrics")]
pub(crate) use self::recorded::{Meters, Moment};
#[cfg(not(feature = "metrics"))]
pub(crate) use self::silent::Meters;
