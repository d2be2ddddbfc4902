//! Short numbers for what is stored.

/// The number of something stored, as long as it is there. Afterwards something else may get it.
pub(super) trait Key: Copy + Eq + Send {
    fn new(number: u32) -> Self;
    fn number(self) -> u32;

    fn index(self) -> usize {
        self.number() as usize
    }
}
