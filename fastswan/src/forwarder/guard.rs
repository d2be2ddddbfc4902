//! The guard: programs in the kernel that shut the fast path before anything is removed.
//!
//! The kernel removes a policy or an association from a device first, and notifies afterwards. A program at the entry of
//! each function that every removal passes through counts it first, in the control record that the XDP program reads too.
//! Packets are fast only if all removals are acknowledged, which [`Gateway`](crate::Gateway) does when it has caught up.

use std::io;

use aya::{
    Btf, BtfError, Ebpf,
    programs::{FEntry, ProgramError, fentry::FEntryLink},
};

use super::{
    XdpForwarder,
    error::{chain, errno},
};
use crate::table::{begin_removal, verify};

/// The programs of the object, and the kernel's functions that they are attached to. What is on a device that goes down
/// passes through the first two as well, but only after its driver was told to stop.
const HOOKS: [(&str, &str); 3] = [
    ("fastswan_guard_policy", "__xfrm_policy_unlink"),
    ("fastswan_guard_sa", "__xfrm_state_delete"),
    ("fastswan_guard_device", "__dev_close_many"),
];

/// The same for a move of policies and associations to other addresses: it changes the policies before it removes the old
/// associations. A kernel without `CONFIG_XFRM_MIGRATE` has no such function, and moves nothing.
const MIGRATION: (&str, &str) = ("fastswan_guard_migration", "xfrm_migrate");

/// Shuts the fast path before the kernel removes policies, associations or devices, or moves policies and associations to
/// other addresses, as long as it is kept.
///
/// Needs Linux 6.12 with BTF and function tracing.
///
/// ```no_run
/// use fastswan::{XdpForwarder, table::TableConfig};
///
/// let (mut forwarder, table) = XdpForwarder::load(TableConfig::default())?;
/// let guard = forwarder.attach_guard();
/// if let Err(error) = &guard {
///     println!("packets follow removals with a lag: {error}");
/// }
/// # drop((table, guard));
/// # Ok::<(), fastswan::forwarder::ForwarderError>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it detaches the guard"]
pub struct Guard {
    _links: Vec<FEntryLink>,
}

/// The guard could not be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// The kernel does not describe its functions.
    #[error("the kernel tells no types of its functions ({}): the guard needs CONFIG_DEBUG_INFO_BTF", chain(.error.as_ref()))]
    NoBtf {
        /// What reading them gave.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A function that removals pass through is not there, or was inlined.
    #[error("the kernel has no function {function} that the guard could be attached to")]
    MissingFunction {
        /// Its name.
        function: &'static str,
    },
    /// The kernel refuses tracing programs.
    #[error(
        "the kernel refuses the guard at {function}: {error}; it takes CAP_BPF, CAP_PERFMON, and a kernel that is not \
         locked down and has CONFIG_FUNCTION_TRACER, on an architecture where BPF can trace functions"
    )]
    Refused {
        /// The function that it was to be attached to.
        function: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// Something else failed.
    #[error("attaching the guard failed: {}", chain(.error.as_ref()))]
    Bpf {
        /// Why.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl XdpForwarder {
    /// Attaches the guard, for the table of this forwarder: from now on packets pass to the kernel from before a removal
    /// begins until the [`Gateway`](crate::Gateway) has caught up with it. Without it, a device that sends clear packets
    /// under a missing policy or association does so for as long as the gateway lags.
    ///
    /// Attach it before the gateway runs. At first everything passes, so that what began before is caught up with, too.
    /// A removal in another network namespace shuts the fast path as well. Several guards may be attached at a time.
    /// A driver without a gateway acknowledges removals ([`OffloadTable::acknowledge`]).
    ///
    /// [`OffloadTable::acknowledge`]: crate::OffloadTable::acknowledge
    ///
    /// Needs a kernel with BTF and function tracing, `CAP_BPF` and `CAP_PERFMON`.
    ///
    /// # Errors
    ///
    /// [`GuardError`]. The forwarder works without.
    pub fn attach_guard(&mut self) -> Result<Guard, GuardError> {
        let btf = Btf::from_sys_fs().map_err(|error| GuardError::NoBtf { error: error.into() })?;
        let mut links = HOOKS
            .map(|(program, function)| attach(&mut self.ebpf, &btf, program, function))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let (program, function) = MIGRATION;
        match attach(&mut self.ebpf, &btf, program, function) {
            Ok(link) => links.push(link),
            Err(GuardError::MissingFunction { .. }) => {}
            Err(error) => return Err(error),
        }
        begin_removal(&self.ebpf).map_err(|error| GuardError::Bpf { error: error.into() })?;
        Ok(Guard { _links: links })
    }
}

fn attach(
    ebpf: &mut Ebpf,
    btf: &Btf,
    program: &str,
    function: &'static str,
) -> Result<FEntryLink, GuardError> {
    let error = |error: ProgramError| match &error {
        ProgramError::Btf(BtfError::UnknownBtfTypeName { .. }) => GuardError::MissingFunction { function },
        _ => match errno(&error) {
            Some(code) => GuardError::Refused { function, error: io::Error::from_raw_os_error(code) },
            None => GuardError::Bpf { error: error.into() },
        },
    };
    let program: &mut FEntry = ebpf
        .program_mut(program)
        .ok_or(ProgramError::NotLoaded)
        .and_then(TryInto::try_into)
        .map_err(error)?;
    match verify(|| program.load(function, btf)) {
        // By an earlier guard.
        Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
        Err(failure) => return Err(error(failure)),
    }
    let link = program.attach().map_err(error)?;
    program.take_link(link).map_err(error)
}
