//! Asking the loaded program: what it does with a frame, and what it costs.

use aya::programs::{ProgramError, Xdp};

use super::{
    ForwarderError, XdpForwarder,
    load::{PROGRAM, program},
    test_run::test_run,
};

/// What the program does with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The frame's fate.
    pub action: RunAction,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

/// The fate of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAction {
    /// To the kernel (`XDP_PASS`).
    Pass,
    /// Out of the interface it came in on (`XDP_TX`).
    Transmit,
    /// To another interface (`XDP_REDIRECT`).
    Redirect,
    /// Something that the program never answers: `XDP_DROP`, `XDP_ABORTED`.
    Other(u32),
}

/// What the kernel's verifier says about the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Instructions of the program, as the kernel rewrote them.
    pub instructions: u32,
    /// Instructions that the verifier walked through, of 1,000,000 that it allows (Linux 5.16).
    pub verified_instructions: u32,
}

impl XdpForwarder {
    /// Runs the program on a frame that claims to come in on an interface of this network namespace, without
    /// sending anything (`BPF_PROG_TEST_RUN`). The frame is counted like any other.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Bpf`], for instance if the frame has less than 14 bytes.
    pub fn run(&self, frame: &[u8], ifindex: u32) -> Result<Run, ForwarderError> {
        let error = |error: ProgramError| ForwarderError::new("running the XDP program", error);
        let program = program(&self.ebpf, PROGRAM).map_err(error)?;
        // The program only ever shortens a frame.
        let mut output = vec![0; frame.len()];
        let result = test_run(program, frame, Some(&mut output), ifindex).map_err(error)?;
        output.truncate(result.data_size_out as usize);
        let action = match result.return_value {
            2 => RunAction::Pass,
            3 => RunAction::Transmit,
            4 => RunAction::Redirect,
            other => RunAction::Other(other),
        };
        Ok(Run { action, frame: output })
    }

    /// The program's number in the kernel, as `bpftool prog` shows it.
    #[must_use]
    pub fn program_id(&self) -> u32 {
        self.program.id
    }

    /// What the program costs the verifier.
    ///
    /// # Errors
    ///
    /// [`ForwarderError::Bpf`].
    pub fn cost(&self) -> Result<ProgramCost, ForwarderError> {
        let info = program(&self.ebpf, PROGRAM)
            .and_then(Xdp::info)
            .map_err(|error| ForwarderError::new("reading about the XDP program", error))?;
        Ok(ProgramCost {
            // An instruction has 8 bytes.
            instructions: info.size_translated().unwrap_or(0) / 8,
            verified_instructions: info.verified_instruction_count().unwrap_or(0),
        })
    }
}
