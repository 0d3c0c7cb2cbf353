//! Kinds of images, and how they are opened. Each has a short text.

use std::fmt;

use qcow2_ublk::engine::DetectZeroes;
use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::qcow2::create::Preallocation;
use qcow2_ublk::storage::sim::Rng;

/// Where guest data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Inside,
    File,
    RawFile,
}

/// What lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    Raw,
    Qcow2,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) version: u8,
    pub(crate) cluster: u64,
    /// Size of the disk.
    pub(crate) sectors: u64,
    pub(crate) refcount_bits: u64,
    pub(crate) extended: bool,
    pub(crate) lazy: bool,
    pub(crate) data: Data,
    /// Version of LUKS, or 0.
    pub(crate) luks: u8,
    pub(crate) below: Below,
    pub(crate) space: Preallocation,
    pub(crate) zstd: bool,
    /// The least cache there can be.
    pub(crate) tiny: bool,
    pub(crate) barrier: Barrier,
    pub(crate) alignment: u32,
    pub(crate) queues: usize,
    pub(crate) punch: bool,
    pub(crate) detect: DetectZeroes,
    /// Seed of what is on the disk at first, or 0.
    pub(crate) fill: u64,
    /// The whole disk is filled, in order.
    pub(crate) full: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            version: 3,
            cluster: 4096,
            sectors: 256,
            refcount_bits: 16,
            extended: false,
            lazy: false,
            data: Data::Inside,
            luks: 0,
            below: Below::Nothing,
            space: Preallocation::Off,
            zstd: false,
            tiny: false,
            barrier: Barrier::Batched,
            alignment: 1,
            queues: 1,
            punch: true,
            detect: DetectZeroes::Off,
            fill: 0,
            full: false,
        }
    }
}

fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.below(of.len() as u64) as usize]
}

impl Shape {
    pub(crate) fn random(rng: &mut Rng) -> Self {
        if rng.chance(1, 40) {
            return Self::with_many_counts(rng);
        }
        let cluster = pick(rng, &[512, 512, 1024, 4096, 4096, 4096, 16384, 65536]);
        let mut shape = Self {
            version: if rng.chance(1, 6) { 2 } else { 3 },
            cluster,
            refcount_bits: pick(rng, &[1, 2, 4, 8, 16, 16, 16, 16, 32, 64]),
            lazy: rng.chance(1, 6),
            data: pick(
                rng,
                &[
                    Data::Inside,
                    Data::Inside,
                    Data::Inside,
                    Data::Inside,
                    Data::File,
                    Data::RawFile,
                ],
            ),
            luks: if rng.chance(1, 16) {
                1 + rng.below(2) as u8
            } else {
                0
            },
            below: pick(
                rng,
                &[
                    Below::Nothing,
                    Below::Nothing,
                    Below::Nothing,
                    Below::Raw,
                    Below::Qcow2,
                ],
            ),
            space: match rng.below(12) {
                0 => Preallocation::Metadata,
                1 => Preallocation::Falloc,
                2 => Preallocation::Full,
                _ => Preallocation::Off,
            },
            zstd: rng.chance(1, 5),
            tiny: rng.chance(1, 4),
            barrier: pick(
                rng,
                &[
                    Barrier::Batched,
                    Barrier::Batched,
                    Barrier::Batched,
                    Barrier::Batched,
                    Barrier::Batched,
                    Barrier::Metadata,
                    Barrier::Full,
                    Barrier::None,
                ],
            ),
            alignment: pick(rng, &[1, 1, 512, 4096]),
            queues: 1 + rng.below(4) as usize,
            punch: !rng.chance(1, 4),
            detect: pick(
                rng,
                &[
                    DetectZeroes::Off,
                    DetectZeroes::Off,
                    DetectZeroes::Off,
                    DetectZeroes::On,
                    DetectZeroes::Unmap,
                ],
            ),
            fill: if rng.chance(2, 3) {
                1 + rng.below(1 << 20)
            } else {
                0
            },
            ..Self::default()
        };
        if rng.chance(1, 6) {
            shape.extended = true;
            shape.cluster = shape.cluster.max(16384);
        }
        shape.sectors = match shape.cluster {
            512 | 1024 => 100 + rng.below(300),
            4096 => 128 + rng.below(384),
            16384 => 160 + rng.below(320),
            _ => 384 + rng.below(640),
        };
        if shape.tiny && shape.cluster == 512 && rng.chance(1, 2) {
            // More tables than such a cache has.
            shape.sectors = 6000 + rng.below(500);
        }
        shape.made_valid()
    }

    /// One whose refcount table has to grow.
    fn with_many_counts(rng: &mut Rng) -> Self {
        Self {
            cluster: 512,
            refcount_bits: 64,
            sectors: 3750 + rng.below(60),
            fill: 1 + rng.below(1 << 20),
            full: true,
            queues: 2,
            ..Self::default()
        }
    }

    /// Without what does not go together.
    pub(crate) fn made_valid(mut self) -> Self {
        if self.version == 2 {
            self.refcount_bits = 16;
            (self.extended, self.lazy, self.zstd) = (false, false, false);
            self.data = Data::Inside;
        }
        if self.extended {
            self.cluster = self.cluster.max(16384);
        }
        if self.data != Data::Inside {
            self.luks = 0;
            self.space = Preallocation::Off;
        }
        if self.data == Data::RawFile {
            self.below = Below::Nothing;
        }
        if self.luks != 0 {
            self.cluster = self.cluster.max(4096);
        }
        if self.cluster < 4096 {
            // Such images are opened without direct I/O.
            self.alignment = 1;
        }
        if self.luks != 0 || self.below != Below::Nothing {
            self.space = Preallocation::Off;
        }
        self
    }

    /// Simpler ones, each by one property.
    pub(crate) fn simpler(&self) -> Vec<Self> {
        let plain = Self::default();
        let mut all = Vec::new();
        let mut offer = |change: &dyn Fn(&mut Self)| {
            let mut other = self.clone();
            change(&mut other);
            let other = other.made_valid();
            if other != *self {
                all.push(other);
            }
        };
        offer(&|s| s.luks = 0);
        offer(&|s| s.below = Below::Nothing);
        offer(&|s| s.data = Data::Inside);
        offer(&|s| s.extended = false);
        offer(&|s| (s.fill, s.full) = (0, false));
        offer(&|s| s.space = Preallocation::Off);
        offer(&|s| s.lazy = false);
        offer(&|s| s.zstd = false);
        offer(&|s| s.detect = DetectZeroes::Off);
        offer(&|s| s.barrier = Barrier::Batched);
        offer(&|s| s.alignment = 1);
        offer(&|s| s.tiny = false);
        offer(&|s| s.queues = 1);
        offer(&|s| s.punch = true);
        offer(&|s| s.refcount_bits = plain.refcount_bits);
        offer(&|s| s.version = 3);
        all
    }
}

/// Words with defaults left out; `v3` is always there.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{} c={} s={}", self.version, self.cluster, self.sectors)?;
        let plain = Self::default();
        let numbers = [
            ("r", self.refcount_bits, plain.refcount_bits),
            ("luks", self.luks.into(), 0),
            ("align", self.alignment.into(), 1),
            ("q", self.queues as u64, 1),
            ("fill", self.fill, 0),
        ];
        for (key, value, default) in numbers {
            if value != default {
                write!(f, " {key}={value}")?;
            }
        }
        let words = [
            ("ext", self.extended),
            ("lazy", self.lazy),
            ("data", self.data == Data::File),
            ("raw", self.data == Data::RawFile),
            ("over-raw", self.below == Below::Raw),
            ("over-qcow2", self.below == Below::Qcow2),
            ("metadata", self.space == Preallocation::Metadata),
            ("falloc", self.space == Preallocation::Falloc),
            ("full-space", self.space == Preallocation::Full),
            ("zstd", self.zstd),
            ("tiny", self.tiny),
            ("barrier-none", self.barrier == Barrier::None),
            ("barrier-metadata", self.barrier == Barrier::Metadata),
            ("barrier-full", self.barrier == Barrier::Full),
            ("nopunch", !self.punch),
            ("detect", self.detect == DetectZeroes::On),
            ("detect-unmap", self.detect == DetectZeroes::Unmap),
            ("full", self.full),
        ];
        for (word, _) in words.iter().filter(|(_, on)| *on) {
            write!(f, " {word}")?;
        }
        Ok(())
    }
}

impl Shape {
    /// The shape of a text that [`fmt::Display`] made; None if a word is
    /// unknown.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut shape = Self::default();
        for word in text.split_whitespace() {
            if let Some((key, value)) = word.split_once('=') {
                let value: u64 = value.parse().ok()?;
                match key {
                    "c" => shape.cluster = value,
                    "s" => shape.sectors = value,
                    "r" => shape.refcount_bits = value,
                    "luks" => shape.luks = value as u8,
                    "align" => shape.alignment = value as u32,
                    "q" => shape.queues = value as usize,
                    "fill" => shape.fill = value,
                    _ => return None,
                }
                continue;
            }
            match word {
                "v2" => shape.version = 2,
                "v3" => shape.version = 3,
                "ext" => shape.extended = true,
                "lazy" => shape.lazy = true,
                "data" => shape.data = Data::File,
                "raw" => shape.data = Data::RawFile,
                "over-raw" => shape.below = Below::Raw,
                "over-qcow2" => shape.below = Below::Qcow2,
                "metadata" => shape.space = Preallocation::Metadata,
                "falloc" => shape.space = Preallocation::Falloc,
                "full-space" => shape.space = Preallocation::Full,
                "zstd" => shape.zstd = true,
                "tiny" => shape.tiny = true,
                "barrier-none" => shape.barrier = Barrier::None,
                "barrier-metadata" => shape.barrier = Barrier::Metadata,
                "barrier-full" => shape.barrier = Barrier::Full,
                "nopunch" => shape.punch = false,
                "detect" => shape.detect = DetectZeroes::On,
                "detect-unmap" => shape.detect = DetectZeroes::Unmap,
                "full" => shape.full = true,
                _ => return None,
            }
        }
        Some(shape)
    }
}
