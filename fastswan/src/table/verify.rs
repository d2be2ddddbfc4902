//! The kernel's verifier.

use aya::programs::ProgramError;

/// Has the kernel verify a program. A signal interrupts the verifier (`EAGAIN`), and then it is to be asked again.
pub(crate) fn verify(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    const ATTEMPTS: u32 = 10;
    let mut attempt = 1;
    loop {
        match load() {
            Err(ProgramError::LoadError { io_error, .. })
                if attempt < ATTEMPTS && io_error.raw_os_error() == Some(libc::EAGAIN) =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}
