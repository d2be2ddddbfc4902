//! Parts of the kernel that may be missing. Asking for one that is has the kernel look for its module, so that is done once,
//! and again when the module has been loaded.

use std::fs;

/// Parts that were missing when they were asked for, by the names of their modules.
#[derive(Debug, Default)]
pub(super) struct Missing(Vec<&'static str>);

impl Missing {
    pub(super) fn note(&mut self, module: &'static str) {
        if !self.0.contains(&module) {
            self.0.push(module);
        }
    }

    pub(super) fn has(&self, module: &str) -> bool {
        self.0.contains(&module)
    }

    /// Forgets those that have been loaded.
    pub(super) fn look_again(&mut self) {
        if self.0.is_empty() {
            return;
        }
        // A kernel without modules stays as it is.
        let loaded = fs::read_to_string("/proc/modules").unwrap_or_default();
        let is_loaded = |module: &str| loaded.lines().any(|line| line.split(' ').next() == Some(module));
        self.0.retain(|module| !is_loaded(module));
    }
}

pub(super) const NFNETLINK: &str = "nfnetlink";
pub(super) const NF_TABLES: &str = "nf_tables";
pub(super) const NFNETLINK_HOOK: &str = "nfnetlink_hook";
