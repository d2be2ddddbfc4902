//! What the testkit and its XDP programs share: sizes, and the addresses in the frames.
//!
//! | program | what |
//! |---|---|
//! | `driver_v4`, `driver_v6` | write the headers of the next flow into the frame and run the program under test |
//! | `judge_v4` | does so as well, and judges what becomes of each packet while policies change |
//! | `generator_v4` | writes the headers of the next flow into a live frame and sends it from the device that it is said to come in on |
//! | `sink` | counts the IPv4 frames that arrive and drops them |
//! | `empty` | sends the frame back at once: what the driver and the kernel cost |
//! | `floor` | parses, decrements the TTL, writes Ethernet addresses: what no forwarding program goes below |
//! | `lpm` | finds the policy by two longest-prefix matches, the classical way |
//!
//! | map | value | index |
//! |---|---|---|
//! | `PROGRESS` | packets of this run so far, and the number of flows minus 1 | 0 |
//! | `FLOWS_V4` | source and destination, 4 bytes each | flow |
//! | `FLOWS_V6` | source and destination, 16 bytes each | flow |
//! | `TIMES` | nanoseconds of `bpf_ktime_get_ns` | packet / [`INTERVAL`] |
//! | `UNDER_TEST` | (program array) the program under test | 0 |
//! | `JUDGE_RUN` | of this run: packets so far and in all, the first flow, the number of flows minus 1; and of the packet that is not judged yet | 0 |
//! | `JUDGE_FLOWS` | source and destination, 4 bytes each, the group of the policy in host order, and nothing | flow |
//! | `JUDGE_VERSIONS` | [`Versions`](verdict::Versions), which user space maps into its memory | group |
//! | `JUDGED` | packets | [`Judgement`](verdict::Judgement) |
//! | `JUDGE_EVIDENCE` | the last verdict that was not right: flow, Ethernet addresses, TTL, versions | 0 |
//! | `PROGRESS_OF_CPU` | as `PROGRESS`, of the generator, of each CPU | 0 |
//! | `TIMES_OF_CPU` | as `TIMES`, of the generator, of each CPU | frame / [`LIVE_INTERVAL`], from 0 on again behind the last |
//! | `ARRIVED` | packets, and bytes from the IP header on, that the sink has counted, of each CPU | 0 |
//! | `EGRESS` | (map of devices) the device by which `floor` and `lpm` forward, if `REDIRECTS` is set; else it is that of ingress | 0 |
//! | `DESTINATIONS_V4`, `DESTINATIONS_V6` | number of the destination prefix | (LPM trie) destination |
//! | `POLICIES_V4`, `POLICIES_V6` | number of the policy | (LPM trie) number of the destination prefix, source |
//! | `COUNTERS` | packets, and bytes from the IP header on, of each CPU | policy |
//!
//! Addresses are in network order everywhere, and so is the number of a destination prefix, which is only compared.

#![no_std]

pub mod verdict;

/// Most flows that the driver goes through.
pub const MOST_FLOWS: u32 = 1 << 20;
/// Most packets of a run.
pub const MOST_PACKETS: u32 = 1 << 20;
/// Packets between two readings of the clock.
pub const INTERVAL: u32 = 1024;
/// The same of the generator: two of the batches that the kernel sends live frames in. Forwarding these takes the slowest
/// contestant a fraction of the time that a scheduler gives to another process, so that most intervals have no interruption on
/// a busy machine too.
pub const LIVE_INTERVAL: u32 = 128;

/// The Ethernet address that frames come from.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
/// The Ethernet address that frames are sent to, which is that of the port.
pub const PORT: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The Ethernet address that forwarded frames go to.
pub const NEXT_HOP: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// TTL or hop limit of the frames.
pub const TTL: u8 = 64;
