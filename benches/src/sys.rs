//! BPF maps of the kernel that are written one system call at a time, or in batches (Linux 5.6).
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_F_NO_PREALLOC: u32 = 1;

/// The kinds of map that policies could be kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// `BPF_MAP_TYPE_HASH`
    Hash = 1,
    /// `BPF_MAP_TYPE_LPM_TRIE`: a key begins with its length in bits, in host order.
    LpmTrie = 11,
}

/// A map with keys of `K` bytes and values of 8.
#[derive(Debug)]
pub struct KernelMap<const K: usize>(OwnedFd);

impl<const K: usize> KernelMap<K> {
    /// Creates a map for `capacity` entries.
    ///
    /// # Errors
    ///
    /// The errno of `bpf(2)`: `EPERM` without `CAP_BPF`.
    pub fn create(kind: Kind, capacity: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Create {
            kind: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            flags: u32,
        }
        let flags = if kind == Kind::LpmTrie { BPF_F_NO_PREALLOC } else { 0 };
        let key_size = u32::try_from(K).map_err(io::Error::other)?;
        let mut create = Create { kind: kind as u32, key_size, value_size: 8, max_entries: capacity, flags };
        // SAFETY: the attributes of this command begin with these fields; what is left out counts as zero.
        let fd = unsafe { bpf(BPF_MAP_CREATE, &mut create) }?;
        // SAFETY: the kernel just returned this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sets one entry with a system call of its own.
    ///
    /// # Errors
    ///
    /// The errno of `bpf(2)`.
    pub fn update(&self, key: &[u8; K], value: u64) -> io::Result<()> {
        #[repr(C)]
        struct Update {
            map: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let mut update = Update {
            map: self.0.as_raw_fd().cast_unsigned(),
            padding: 0,
            key: key.as_ptr() as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        // SAFETY: the map has keys of `K` and values of 8 bytes, and both live through the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut update) }.map(drop)
    }

    /// Sets many entries with one system call.
    ///
    /// # Errors
    ///
    /// The errno of `bpf(2)`; `InvalidInput` if there are more keys than values or the other way round.
    pub fn update_batch(&self, keys: &[[u8; K]], values: &[u64]) -> io::Result<()> {
        #[repr(C)]
        struct Batch {
            start: u64,
            next: u64,
            keys: u64,
            values: u64,
            count: u32,
            map: u32,
            element_flags: u64,
            flags: u64,
        }
        if keys.len() != values.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut batch = Batch {
            start: 0,
            next: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: u32::try_from(keys.len()).map_err(io::Error::other)?,
            map: self.0.as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: there are `count` keys of `K` and values of 8 bytes, and both live through the call.
        unsafe { bpf(BPF_MAP_UPDATE_BATCH, &mut batch) }.map(drop)
    }
}

/// # Safety
///
/// `T` is the beginning of the attributes that `command` reads, and the pointers in it are valid for it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the attributes; the rest is up to the caller.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}
