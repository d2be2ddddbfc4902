//! Packets and bytes of one CPU.

#[repr(C)]
pub(super) struct Counter {
    packets: u64,
    bytes: u64,
}

impl Counter {
    /// Counts a packet with so many bytes.
    ///
    /// # Safety
    ///
    /// The pointer is that of an array's element that no other CPU has.
    #[inline(always)]
    pub(super) unsafe fn count(counter: *mut Self, bytes: u64) {
        // SAFETY: the caller says so.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += bytes;
        }
    }
}
