//! What each sector of the disk may hold, after errors and power cuts too.

pub const SECTOR: u64 = 512;

/// A sector filled with one byte, or what it held at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    Original,
    Filled(u8),
}

/// One sector.
#[derive(Clone, Debug)]
struct Sector {
    /// What a read may see.
    now: Vec<Value>,
    /// What may be there when the power fails.
    since_flush: Vec<Value>,
}

impl Sector {
    fn of(value: Value) -> Self {
        Self {
            now: vec![value],
            since_flush: vec![value],
        }
    }
}

/// How a change of sectors ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Acknowledged,
    /// And durable.
    Durable,
    /// It may have happened, wholly or in part, or not at all.
    Unknown,
}

/// The disk.
#[derive(Clone)]
pub struct Model {
    sectors: Vec<Sector>,
    original: Vec<u8>,
}

impl Model {
    pub fn new(original: Vec<u8>) -> Self {
        Self {
            sectors: vec![Sector::of(Value::Original); original.len() / SECTOR as usize],
            original,
        }
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The sectors from `first` on have been filled with `byte`.
    pub fn fill(&mut self, first: u64, count: u64, byte: u8, end: End) {
        let value = Value::Filled(byte);
        for sector in &mut self.sectors[first as usize..(first + count) as usize] {
            match end {
                End::Durable => *sector = Sector::of(value),
                End::Acknowledged => {
                    sector.now = vec![value];
                    add(&mut sector.since_flush, value);
                }
                End::Unknown => {
                    add(&mut sector.now, value);
                    add(&mut sector.since_flush, value);
                }
            }
        }
    }

    /// What was acknowledged is durable.
    pub fn flush(&mut self) {
        for sector in &mut self.sectors {
            sector.since_flush.clone_from(&sector.now);
        }
    }

    /// The power failed, or the program died.
    pub fn cut(&mut self) {
        for sector in &mut self.sectors {
            sector.now.clone_from(&sector.since_flush);
        }
    }

    /// The disk has become larger, by zeros.
    pub fn grow(&mut self, sectors: u64) {
        let zeros = Sector::of(Value::Filled(0));
        self.sectors.resize(sectors as usize, zeros);
        self.original.resize((sectors * SECTOR) as usize, 0);
    }

    /// `bytes` from sector `first` on are what may be seen there; it is what
    /// will be seen from now on.
    pub fn sees(&mut self, first: u64, bytes: &[u8], what: &str) {
        if let Err(reason) = self.fits(first, bytes) {
            panic!("{what}: {reason}");
        }
        for (number, seen) in numbered(first, bytes) {
            let original = &self.original;
            let sector = &mut self.sectors[number];
            if let [_, _, ..] = sector.now[..] {
                sector
                    .now
                    .retain(|&value| is(original, number, seen, value));
            }
        }
    }

    /// Whether `bytes` from sector `first` on may be seen.
    pub fn fits(&self, first: u64, bytes: &[u8]) -> Result<(), String> {
        for (number, seen) in numbered(first, bytes) {
            let may = &self.sectors[number].now;
            if !(may.iter()).any(|&value| is(&self.original, number, seen, value)) {
                let start = &seen[..16];
                return Err(format!("sector {number} is {start:02x?}, none of {may:?}"));
            }
        }
        Ok(())
    }
}

/// The sectors of `bytes`, with their numbers.
fn numbered(first: u64, bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    (first as usize..).zip(bytes.chunks_exact(SECTOR as usize))
}

fn is(original: &[u8], number: usize, seen: &[u8], value: Value) -> bool {
    match value {
        Value::Original => seen == &original[number * SECTOR as usize..][..SECTOR as usize],
        Value::Filled(byte) => seen == [byte; SECTOR as usize],
    }
}

fn add(values: &mut Vec<Value>, value: Value) {
    if !values.contains(&value) {
        values.push(value);
    }
}
