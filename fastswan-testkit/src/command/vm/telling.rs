//! The scenarios of one kernel, over as many boots of its guest as they take.
//!
//! What the guests say comes in, which scenarios to boot the next one for goes out; nothing here runs QEMU, and time is an
//! argument. A guest that dies takes one scenario with it, the one that it was in: the others are left to the next boot. If it
//! is the emulator's fault, that scenario is left, too.

use std::time::{Duration, Instant};

use fastswan_testkit::{
    guest::{Outcome, Progress, Scenario},
    vm::{Run, VmError},
};

/// How often a kernel is booted for its scenarios.
const MOST_BOOTS: u32 = 5;

/// What has become of scenarios so far.
#[derive(Debug)]
pub(super) struct Telling<'a> {
    scenarios: &'a [Scenario],
    outcomes: Vec<Outcome>,
    /// What went wrong and is no scenario's failure.
    trouble: Vec<String>,
    /// Boots so far.
    boots: u32,
    is_over: bool,
    /// Whether a scenario has begun since the last boot.
    has_begun: bool,
    /// The one that the guest is in, and since when.
    current: Option<(&'a Scenario, Instant)>,
    /// How long the guests ran that came to their end.
    took: Duration,
}

/// What became of scenarios.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) outcomes: Vec<Outcome>,
    /// Names of those that have no outcome.
    pub(super) missing: Vec<&'static str>,
    /// What went wrong and is no scenario's failure.
    pub(super) trouble: Vec<String>,
    /// How long the guest ran that came to its end.
    pub(super) took: Duration,
}

impl<'a> Telling<'a> {
    pub(super) fn new(scenarios: &'a [Scenario]) -> Self {
        Self {
            scenarios,
            outcomes: Vec::new(),
            trouble: Vec::new(),
            boots: 0,
            is_over: false,
            has_begun: false,
            current: None,
            took: Duration::ZERO,
        }
    }

    /// The scenarios that the guest is to be booted for now; `None` if it is not to be booted again.
    pub(super) fn boot(&mut self) -> Option<Vec<&'a Scenario>> {
        let left = self.left();
        if self.is_over || left.is_empty() {
            return None;
        }
        self.boots += 1;
        self.has_begun = false;
        Some(left)
    }

    /// Notes what a guest says. Returns the outcome if a scenario has come to its end.
    pub(super) fn hear(&mut self, progress: Progress, now: Instant) -> Option<&Outcome> {
        match progress {
            Progress::Begun(name) => {
                self.has_begun = true;
                let begun = self.scenarios.iter().find(|scenario| scenario.name == name);
                self.current = begun.map(|scenario| (scenario, now));
                None
            }
            Progress::Ended(outcome) => {
                self.current = None;
                self.outcomes.push(outcome);
                self.outcomes.last()
            }
        }
    }

    /// Notes what became of a guest. Returns the outcome of the scenario that it has taken with it.
    pub(super) fn end(&mut self, ended: Result<Run, VmError>, now: Instant) -> Option<&Outcome> {
        let current = self.current.take();
        let error = match ended {
            Ok(run) => {
                self.is_over = true;
                self.took = run.took;
                if run.status != 0 {
                    self.trouble.push(format!("the guest failed: {}", run.output));
                }
                self.trouble.extend(run.complaints.iter().map(|line| format!("the kernel said: {line}")));
                return None;
            }
            Err(error) => error,
        };
        let is_of_the_emulator = error.is_of_the_emulator();
        // One that comes to no scenario has been started often enough.
        let can_go_on = matches!(error, VmError::Guest { .. }) && (self.has_begun || is_of_the_emulator);
        self.is_over = !can_go_on || self.boots >= MOST_BOOTS;
        if is_of_the_emulator && !self.is_over {
            eprintln!("{error}\nThat is the emulator's fault: once more, with the scenarios that are left");
            return None;
        }
        let Some((scenario, since)) = current else {
            self.trouble.push(error.to_string());
            return None;
        };
        self.outcomes.push(scenario.died(error.to_string(), now.saturating_duration_since(since)));
        self.outcomes.last()
    }

    /// What has become of them.
    pub(super) fn told(self) -> Told {
        let missing = self.left().into_iter().map(|scenario| scenario.name).collect();
        let Self { outcomes, trouble, took, .. } = self;
        Told { outcomes, missing, trouble, took }
    }

    /// The scenarios that have no outcome.
    fn left(&self) -> Vec<&'a Scenario> {
        let has_run =
            |scenario: &&Scenario| self.outcomes.iter().any(|outcome| outcome.name == scenario.name);
        self.scenarios.iter().filter(|scenario| !has_run(scenario)).collect()
    }
}

#[cfg(test)]
mod tests {
    use fastswan_testkit::{guest::Verdict, vm::Kernel};

    use super::*;

    fn scenarios() -> Vec<Scenario> {
        let mut scenarios = Scenario::all();
        scenarios.truncate(4);
        scenarios
    }

    fn begun(scenario: &Scenario) -> Progress {
        Progress::Begun(scenario.name.to_owned())
    }

    fn passed(scenario: &Scenario) -> Progress {
        Progress::Ended(Outcome {
            name: scenario.name.to_owned(),
            ok: true,
            verdict: Verdict::Passed,
            reason: None,
            seconds: 1.0,
            failures: Vec::new(),
            figures: std::collections::BTreeMap::default(),
        })
    }

    fn died(stale_breakpoint: bool) -> VmError {
        VmError::Guest {
            kernel: Kernel::V7,
            what: "ended early".to_owned(),
            console: "Kernel panic - not syncing".to_owned(),
            stale_breakpoint,
        }
    }

    fn came_to_its_end() -> Run {
        let took = Duration::from_secs(60);
        Run { status: 0, output: String::new(), complaints: Vec::new(), took }
    }

    /// Boots a guest in which these scenarios pass and the next one does what is said.
    fn boot(telling: &mut Telling<'_>, passing: usize, end: Result<Run, VmError>) {
        let start = Instant::now();
        let left = telling.boot().unwrap();
        for scenario in &left[..passing] {
            assert!(telling.hear(begun(scenario), start).is_none());
            assert_eq!(telling.hear(passed(scenario), start).unwrap().name, scenario.name);
        }
        if let Some(scenario) = left.get(passing) {
            telling.hear(begun(scenario), start);
        }
        telling.end(end, start + Duration::from_secs(3));
    }

    fn names(outcomes: &[Outcome], verdict: Verdict) -> Vec<&str> {
        let those = outcomes.iter().filter(|outcome| outcome.verdict == verdict);
        those.map(|outcome| &*outcome.name).collect()
    }

    #[test]
    fn a_guest_that_dies_takes_one_scenario_with_it_and_the_next_boot_has_the_others() {
        let scenarios = scenarios();
        let [first, second, third, fourth] = [0, 1, 2, 3].map(|index| scenarios[index].name);
        let mut telling = Telling::new(&scenarios);
        boot(&mut telling, 1, Err(died(false)));
        assert_eq!(telling.left().iter().map(|scenario| scenario.name).collect::<Vec<_>>(), [third, fourth]);
        boot(&mut telling, 2, Ok(came_to_its_end()));
        assert!(telling.boot().is_none());

        let Told { outcomes, missing, trouble, took } = telling.told();
        assert_eq!(names(&outcomes, Verdict::Passed), [first, third, fourth]);
        assert_eq!(names(&outcomes, Verdict::Failed), [second]);
        let dead = outcomes.iter().find(|outcome| outcome.name == second).unwrap();
        assert!(!dead.ok && dead.failures[0].contains("Kernel panic"), "{dead:?}");
        assert_eq!(dead.seconds.to_bits(), 3_f64.to_bits());
        assert!(missing.is_empty() && trouble.is_empty(), "one event, one failure: {missing:?} {trouble:?}");
        assert_eq!(took, Duration::from_secs(60));
    }

    #[test]
    fn what_is_the_emulators_fault_is_tried_again_and_fails_in_the_last_boot() {
        let scenarios = scenarios();
        let mut telling = Telling::new(&scenarios);
        boot(&mut telling, 1, Err(died(true)));
        assert_eq!(telling.left().len(), 3, "the scenario that it was in is left");
        for _ in 2..MOST_BOOTS {
            boot(&mut telling, 0, Err(died(true)));
        }
        assert_eq!(telling.left().len(), 3);
        boot(&mut telling, 0, Err(died(true)));
        assert!(telling.boot().is_none());
        let Told { outcomes, missing, trouble, .. } = telling.told();
        assert_eq!(names(&outcomes, Verdict::Failed), [scenarios[1].name]);
        assert_eq!(missing, [scenarios[2].name, scenarios[3].name]);
        assert!(trouble.is_empty(), "{trouble:?}");
    }

    #[test]
    fn a_kernel_that_dies_of_each_scenario_is_not_booted_without_end() {
        let scenarios = Scenario::all();
        let mut telling = Telling::new(&scenarios);
        for _ in 0..MOST_BOOTS {
            boot(&mut telling, 0, Err(died(false)));
        }
        assert!(telling.boot().is_none());
        let Told { outcomes, missing, .. } = telling.told();
        assert_eq!(outcomes.len(), MOST_BOOTS as usize);
        assert_eq!(missing.len(), scenarios.len() - outcomes.len());
    }

    #[test]
    fn a_guest_that_comes_to_no_scenario_is_no_scenarios_failure_and_not_booted_again() {
        let scenarios = scenarios();
        let no_qemu = VmError::Missing {
            program: "qemu-system-x86_64",
            package: "qemu-system-x86",
            error: std::io::ErrorKind::NotFound.into(),
        };
        for (end, says) in [(Err(died(false)), "ended early"), (Err(no_qemu), "qemu-system-x86")] {
            let mut telling = Telling::new(&scenarios);
            assert!(telling.boot().is_some());
            assert!(telling.end(end, Instant::now()).is_none());
            assert!(telling.boot().is_none());
            let Told { outcomes, missing, trouble, .. } = telling.told();
            assert!(outcomes.is_empty() && missing.len() == scenarios.len());
            assert!(trouble.len() == 1 && trouble[0].contains(says), "{trouble:?}");
        }
    }

    #[test]
    fn a_guest_that_dies_between_scenarios_is_trouble_and_the_others_are_told() {
        let scenarios = scenarios();
        let mut telling = Telling::new(&scenarios);
        telling.boot();
        telling.hear(begun(&scenarios[0]), Instant::now());
        telling.hear(passed(&scenarios[0]), Instant::now());
        telling.end(Err(died(false)), Instant::now());
        boot(&mut telling, 3, Ok(came_to_its_end()));
        let Told { outcomes, missing, trouble, .. } = telling.told();
        assert_eq!(names(&outcomes, Verdict::Passed).len(), 4);
        assert!(missing.is_empty() && trouble.len() == 1, "{missing:?} {trouble:?}");
    }

    #[test]
    fn what_the_guest_or_its_kernel_complains_of_is_trouble() {
        let scenarios = scenarios();
        let mut telling = Telling::new(&scenarios);
        let complaints = vec!["WARNING: CPU: 0".to_owned()];
        let run = Run { status: 3, output: "no".to_owned(), complaints, took: Duration::ZERO };
        boot(&mut telling, 4, Ok(run));
        assert_eq!(telling.told().trouble, ["the guest failed: no", "the kernel said: WARNING: CPU: 0"]);
    }
}
