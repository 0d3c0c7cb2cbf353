//! Feature bits and the table that names them.

use std::borrow::Cow;

use bitflags::bitflags;

bitflags! {
    /// Features that must be understood to open the image. Unknown bits are
    /// kept here, but [`Header::parse`](super::Header::parse) refuses them.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong: rebuild them before the first write.
        const DIRTY = 1 << 0;
        /// Metadata may be wrong: do not write but to repair.
        const CORRUPT = 1 << 1;
        /// Guest data is in another, raw file.
        const DATA_FILE = 1 << 2;
        /// The compression type is not deflate.
        const COMPRESSION = 1 << 3;
        /// L2 entries are 16 bytes long.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }

    /// Features that may be ignored; unknown bits are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Compatible: u64 {
        /// A writer may postpone refcount updates, setting
        /// [`Incompatible::DIRTY`] meanwhile.
        const LAZY_REFCOUNTS = 1 << 0;
        const _ = !0;
    }

    /// Features whose bit any writer that does not know them must clear
    /// before its first write; unknown bits are kept until then.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Autoclear: u64 {
        /// The bitmaps agree with the image.
        const BITMAPS = 1 << 0;
        /// The external data file is a raw image by itself.
        const DATA_FILE_RAW = 1 << 1;
        const _ = !0;
    }
}

impl Incompatible {
    /// The bits that the format defines.
    pub const KNOWN: Self = Self::DIRTY
        .union(Self::CORRUPT)
        .union(Self::DATA_FILE)
        .union(Self::COMPRESSION)
        .union(Self::EXTENDED_L2);
}

impl Autoclear {
    /// The bits that the format defines; a writer clears all others.
    pub const KNOWN: Self = Self::BITMAPS.union(Self::DATA_FILE_RAW);
}

/// Which of the three feature fields a [`FeatureName`] speaks of.
pub const INCOMPATIBLE: u8 = 0;
/// See [`INCOMPATIBLE`].
pub const COMPATIBLE: u8 = 1;
/// See [`INCOMPATIBLE`].
pub const AUTOCLEAR: u8 = 2;

/// Bytes of a name, padded with NUL where shorter.
const NAME_LEN: usize = 46;
/// Bytes of an entry on disk: kind, bit, name.
pub(super) const FEATURE_NAME_LEN: usize = 2 + NAME_LEN;

/// An entry of the feature name table: what to call a feature that the reader
/// does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// [`INCOMPATIBLE`], [`COMPATIBLE`] or [`AUTOCLEAR`]; anything else means
    /// nothing.
    pub kind: u8,
    /// Which bit.
    pub bit: u8,
    name: [u8; NAME_LEN],
}

impl FeatureName {
    /// An entry; `name` is cut after 46 bytes.
    pub fn new(kind: u8, bit: u8, name: &str) -> Self {
        let mut field = [0; NAME_LEN];
        for (to, from) in field.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self {
            kind,
            bit,
            name: field,
        }
    }

    /// The name, fit to be shown: an image's author chose it.
    pub fn name(&self) -> Cow<'_, str> {
        let len = self.name.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
        let name = String::from_utf8_lossy(&self.name[..len]);
        if name.chars().any(char::is_control) {
            return name.escape_debug().to_string().into();
        }
        name
    }

    pub(super) fn decode(entry: &[u8; FEATURE_NAME_LEN]) -> Self {
        let [kind, bit, name @ ..] = *entry;
        Self { kind, bit, name }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.kind, self.bit]);
        out.extend_from_slice(&self.name);
    }

    /// The table that a new image gets: every feature the format defines.
    /// The names are those other implementations show for the same bits.
    pub fn all() -> Vec<Self> {
        [
            (INCOMPATIBLE, 0, "dirty bit"),
            (INCOMPATIBLE, 1, "corrupt bit"),
            (INCOMPATIBLE, 2, "external data file"),
            (INCOMPATIBLE, 3, "compression type"),
            (INCOMPATIBLE, 4, "extended L2 entries"),
            (COMPATIBLE, 0, "lazy refcounts"),
            (AUTOCLEAR, 0, "bitmaps"),
            (AUTOCLEAR, 1, "raw external data"),
        ]
        .into_iter()
        .map(|(kind, bit, name)| Self::new(kind, bit, name))
        .collect()
    }
}

/// What the image itself, or else we, call the incompatible features `bits`.
pub(super) fn incompatible_names(bits: Incompatible, table: &[FeatureName]) -> Vec<String> {
    let named = |bit, table: &[FeatureName]| {
        let mut entries = table.iter();
        entries
            .find(|entry| entry.kind == INCOMPATIBLE && u32::from(entry.bit) == bit)
            .map(|entry| entry.name().into_owned())
            .filter(|name| !name.is_empty())
    };
    (0..u64::BITS)
        .filter(|bit| bits.bits() >> bit & 1 != 0)
        .map(|bit| {
            named(bit, table)
                .or_else(|| named(bit, &FeatureName::all()))
                .unwrap_or_else(|| format!("unknown incompatible feature, bit {bit}"))
        })
        .collect()
}
