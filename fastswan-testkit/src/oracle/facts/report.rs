//! What a run found.

use std::collections::BTreeMap;

use fastswan::PassReason;
use serde_json::{Value, json};

/// Wrong decisions of one kind that are described, and needlessly slow ones of one reason.
const EXAMPLES: usize = 4;

/// What became of the packets of one kind of configuration, or of one story.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KindReport {
    /// Its name.
    pub name: &'static str,
    /// It is about what can change a packet's fate behind routing.
    pub is_hook: bool,
    /// Packets of it are wrong so far, from a known cause.
    pub is_known_gap: bool,
    /// Times that the host was changed in this way.
    pub changes: u64,
    /// Times that this kernel refused.
    pub refused: u64,
    /// Times that the host source did not catch up.
    pub stuck: u64,
    /// Packets that were judged.
    pub decisions: u64,
    /// Packets that the program forwarded.
    pub fast: u64,
    /// Packets that it forwarded although the kernel would not, also after what is polled had to be known.
    pub wrong: u64,
    /// Packets that it forwarded although the kernel would not, but soon no longer.
    pub late: u64,
    /// Packets that the kernel sends to the policy's device, in a way that the policy's tunnel can take.
    pub eligible: u64,
    /// How many of them were fast.
    pub eligible_fast: u64,
    /// Why eligible packets were passed.
    pub eligible_passes: BTreeMap<PassReason, u64>,
    /// Some that were wrong or late.
    pub examples: Vec<String>,
    /// Some that were needlessly slow, by reason.
    pub slow_examples: BTreeMap<PassReason, Vec<String>>,
    /// Why this kernel refused, at first.
    pub refusal: Option<String>,
}

impl KindReport {
    pub(super) fn new(name: &'static str, is_hook: bool, is_known_gap: bool) -> Self {
        Self { name, is_hook, is_known_gap, ..Self::default() }
    }

    /// The share of eligible packets that were fast.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn fast_share(&self) -> f64 {
        self.eligible_fast as f64 / self.eligible.max(1) as f64
    }

    /// Adds what another run found of the same kind.
    pub(super) fn merge(&mut self, other: Self) {
        self.changes += other.changes;
        self.refused += other.refused;
        self.stuck += other.stuck;
        self.decisions += other.decisions;
        self.fast += other.fast;
        self.wrong += other.wrong;
        self.late += other.late;
        self.eligible += other.eligible;
        self.eligible_fast += other.eligible_fast;
        for (reason, packets) in other.eligible_passes {
            *self.eligible_passes.entry(reason).or_default() += packets;
        }
        self.examples.extend(other.examples);
        self.examples.truncate(EXAMPLES);
        for (reason, examples) in other.slow_examples {
            let own = self.slow_examples.entry(reason).or_default();
            own.extend(examples);
            own.truncate(EXAMPLES / 2);
        }
        self.refusal = self.refusal.take().or(other.refusal);
    }

    pub(super) fn example(&mut self, text: impl FnOnce() -> String) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(text());
        }
    }

    pub(super) fn slow(&mut self, reason: PassReason, text: impl FnOnce() -> String) {
        *self.eligible_passes.entry(reason).or_default() += 1;
        let examples = self.slow_examples.entry(reason).or_default();
        if examples.len() < EXAMPLES / 2 {
            examples.push(text());
        }
    }

    /// All of it; reasons are ranked.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut ranked: Vec<_> = self.eligible_passes.iter().collect();
        ranked.sort_by_key(|(_, packets)| std::cmp::Reverse(**packets));
        let reasons: Vec<Value> =
            ranked.into_iter().map(|(reason, packets)| json!([reason.name(), packets])).collect();
        let slow: BTreeMap<&str, &Vec<String>> =
            self.slow_examples.iter().map(|(reason, examples)| (reason.name(), examples)).collect();
        json!({
            "hook": self.is_hook,
            "known_gap": self.is_known_gap,
            "changes": self.changes,
            "refused": self.refused,
            "refusal": self.refusal,
            "stuck": self.stuck,
            "decisions": self.decisions,
            "fast": self.fast,
            "wrong": self.wrong,
            "late": self.late,
            "eligible": self.eligible,
            "fast_share": self.fast_share(),
            "eligible_pass_reasons": reasons,
            "examples": self.examples,
            "slow_examples": slow,
        })
    }
}

/// How a case from the field ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoryReport {
    /// The number or letter of the case, and what it is about.
    pub case: &'static str,
    /// What became of its packets.
    pub packets: KindReport,
    /// Its end is right.
    pub holds: bool,
    /// It is known not to be.
    pub is_known_gap: bool,
}

impl StoryReport {
    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut object = self.packets.json();
        object["case"] = self.case.into();
        object["story"] = self.packets.name.into();
        object["holds"] = self.holds.into();
        object["known_gap"] = self.is_known_gap.into();
        object
    }
}

/// What a run found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FactsReport {
    /// What it can be repeated with, but for its timing.
    pub seed: u64,
    /// By kind of configuration, `mixed` for several at once.
    pub kinds: Vec<KindReport>,
    /// Cases from the field.
    pub stories: Vec<StoryReport>,
}

impl FactsReport {
    /// One of nothing.
    #[must_use]
    pub fn empty(seed: u64) -> Self {
        Self { seed, kinds: Vec::new(), stories: Vec::new() }
    }

    /// Packets that were forwarded against the kernel, but soon no longer.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.sum(|kind| kind.late)
    }

    fn sum(&self, count: fn(&KindReport) -> u64) -> u64 {
        self.kinds.iter().map(count).sum()
    }

    /// Packets that were judged.
    #[must_use]
    pub fn decisions(&self) -> u64 {
        self.sum(|kind| kind.decisions)
    }

    /// Packets that were forwarded against the kernel.
    #[must_use]
    pub fn wrong(&self) -> u64 {
        self.sum(|kind| kind.wrong)
    }

    /// Kinds that packets were wrong in, without those where that is known.
    #[must_use]
    pub fn unexpectedly_wrong(&self) -> Vec<&'static str> {
        let wrong = self.kinds.iter().filter(|kind| kind.wrong > 0 && !kind.is_known_gap);
        wrong.map(|kind| kind.name).collect()
    }

    /// The share of eligible packets that were fast, over configurations without hooks.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn fast_share(&self) -> f64 {
        let without_hooks = |count: fn(&KindReport) -> u64| -> u64 {
            self.kinds.iter().filter(|kind| !kind.is_hook).map(count).sum()
        };
        without_hooks(|kind| kind.eligible_fast) as f64 / without_hooks(|kind| kind.eligible).max(1) as f64
    }

    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let kinds: BTreeMap<&str, Value> = self.kinds.iter().map(|kind| (kind.name, kind.json())).collect();
        let stories: Vec<Value> = self.stories.iter().map(StoryReport::json).collect();
        json!({
            "decisions": self.decisions(),
            "wrong": self.wrong(),
            "late": self.late(),
            "fast_share": self.fast_share(),
            "seed": self.seed,
            "kinds": kinds,
            "stories": stories,
        })
    }
}
