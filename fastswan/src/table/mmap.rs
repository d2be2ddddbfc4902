//! Memory that user space and the XDP program share, as slices of words.
//!
//! A [`Region`] is either a mapping of a BPF array with `BPF_F_MMAPABLE` (Linux 5.5) or ordinary memory.
#![allow(unsafe_code)]

use std::ops::Deref;
#[cfg(feature = "bpf")]
use std::{os::fd::BorrowedFd, ptr::NonNull};

use fastswan_ebpf::Shared;
#[cfg(feature = "bpf")]
use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

/// The values of an array that the program and user space, or only user space, read and write.
#[derive(Debug)]
pub(super) enum Region<T: Shared> {
    /// In a BPF map.
    #[cfg(feature = "bpf")]
    Mapped(Mapping<T>),
    /// In ordinary memory.
    Owned(Box<[T]>),
}

impl<T: Shared> Region<T> {
    /// Maps the values of an array map that has `length` of them.
    #[cfg(feature = "bpf")]
    pub(super) fn map(fd: BorrowedFd<'_>, length: usize) -> Result<Self, Errno> {
        Mapping::new(fd, length).map(Self::Mapped)
    }

    /// Allocates `length` values that are all zero.
    pub(super) fn allocate(length: usize) -> Self {
        Self::Owned(bytemuck::zeroed_slice_box(length))
    }
}

impl<T: Shared> Deref for Region<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            #[cfg(feature = "bpf")]
            Self::Mapped(mapping) => mapping,
            Self::Owned(values) => values,
        }
    }
}

/// A mapping of the values of an array map.
#[cfg(feature = "bpf")]
#[derive(Debug)]
pub(super) struct Mapping<T> {
    start: NonNull<T>,
    length: usize,
}

#[cfg(feature = "bpf")]
impl<T: Shared> Mapping<T> {
    fn new(fd: BorrowedFd<'_>, length: usize) -> Result<Self, Errno> {
        // The kernel pads each value to a multiple of 8 bytes, which `T`, made of words, is already.
        let bytes = length.checked_mul(size_of::<T>()).ok_or(Errno::NOMEM)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use. The kernel
        // refuses it if the map is shorter than `bytes`, and keeps the map alive as long as the mapping.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0)? };
        Ok(Self { start: NonNull::new(start.cast()).ok_or(Errno::INVAL)?, length })
    }
}

#[cfg(feature = "bpf")]
impl<T: Shared> Deref for Mapping<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping has `length` values and lives as long as `self`; it starts at a page, so it is
        // aligned. `T: Shared` is valid for every bit pattern, and whoever else writes to it does so through
        // words, as this side does.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

#[cfg(feature = "bpf")]
impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no slice of it outlives `self`.
        // Unmapping a valid range cannot fail.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length * size_of::<T>()) };
    }
}

// SAFETY: a mapping is memory like any other; it belongs to no thread.
#[cfg(feature = "bpf")]
unsafe impl<T: Shared> Send for Mapping<T> {}
// SAFETY: it is only read and written through words, which are atomic.
#[cfg(feature = "bpf")]
unsafe impl<T: Shared> Sync for Mapping<T> {}
