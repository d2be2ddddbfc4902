//! The maps of a loaded object, by name.

use std::os::fd::{AsFd as _, BorrowedFd};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError},
    programs::ProgramError,
};
#[cfg(feature = "guard")]
use fastswan_ebpf::Control;
use fastswan_ebpf::Shared;

use super::mmap::Region;

/// The maps that a loaded object has are not the ones that this library knows.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapsError {
    #[error("the object has no map {0}")]
    Missing(&'static str),
    #[error("map {name} cannot be mapped: {error}")]
    Mmap { name: &'static str, error: rustix::io::Errno },
    #[error("map {name} has values of {size} bytes, which is another layout")]
    OtherLayout { name: &'static str, size: u32 },
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("the program that tells the time: {0}")]
    Clock(#[from] ProgramError),
}

/// Counts a removal, so that everything passes until it is acknowledged.
#[cfg(feature = "guard")]
pub(crate) fn begin_removal(ebpf: &Ebpf) -> Result<(), MapsError> {
    let control: Region<Control> = map(ebpf, "CONTROL", 1)?;
    control[0].removals.atomic().fetch_add(1, std::sync::atomic::Ordering::AcqRel);
    Ok(())
}

/// An array map of an object.
pub(crate) fn array<'e>(ebpf: &'e Ebpf, name: &'static str) -> Result<&'e MapData, MapsError> {
    match ebpf.map(name) {
        Some(Map::Array(data)) => Ok(data),
        _ => Err(MapsError::Missing(name)),
    }
}

/// The memory of an array map.
pub(super) fn map<T: Shared>(ebpf: &Ebpf, name: &'static str, length: usize) -> Result<Region<T>, MapsError> {
    let fd: BorrowedFd<'_> = array(ebpf, name)?.fd().as_fd();
    Region::map(fd, length).map_err(|error| MapsError::Mmap { name, error })
}
