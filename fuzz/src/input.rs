//! Bytes of the fuzzer taken for numbers. The coding is our own and fixed, so
//! that an input found today says the same tomorrow.

/// What is left of an input. Behind its end are zeros.
#[derive(Clone, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `N` bytes as a little-endian number.
    fn number<const N: usize>(&mut self) -> u64 {
        let taken = self.bytes(N);
        taken
            .iter()
            .rev()
            .fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    pub fn u8(&mut self) -> u8 {
        self.number::<1>() as u8
    }

    pub fn u16(&mut self) -> u16 {
        self.number::<2>() as u16
    }

    pub fn u32(&mut self) -> u32 {
        self.number::<4>() as u32
    }

    pub fn u64(&mut self) -> u64 {
        self.number::<8>()
    }

    /// A number below `limit`, which is at most 65536.
    pub fn below(&mut self, limit: u64) -> u64 {
        debug_assert!((1..=65536).contains(&limit));
        let number = if limit <= 256 {
            self.u8().into()
        } else {
            u64::from(self.u16())
        };
        number % limit
    }

    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// At most `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
