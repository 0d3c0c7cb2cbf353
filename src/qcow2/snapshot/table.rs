//! The snapshot table: reading it, finding snapshots in it, writing it anew.

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::shadow::Shadow;
use crate::qcow2::spec::Header;
use crate::qcow2::spec::header::MAX_SNAPSHOTS;
use crate::qcow2::spec::snapshot::{
    EXTRA_LEN_AT, HEAD_LEN, MAX_EXTRA, MAX_ID, MAX_NAME, MAX_TABLE_BYTES, Parts, Snapshot,
};
use crate::storage::Storage;

/// Longest entry of a table, in bytes.
const LONGEST: usize = HEAD_LEN + MAX_EXTRA + 2 * 65536;
/// Bytes of the table that are read at a time.
const WINDOW: usize = 1 << 20;

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// The one with this ID.
    Id(Vec<u8>),
    /// The first with this name.
    Name(Vec<u8>),
    /// The one with this ID, or else the first with this name.
    IdOrName(Vec<u8>),
    /// The one with this ID, if it has this name.
    Both {
        /// The ID.
        id: Vec<u8>,
        /// The name.
        name: Vec<u8>,
    },
}

impl Selector {
    /// An ID or a name; or `snapshot.id=ID`, `snapshot.name=NAME`, or both
    /// with a comma between them, as QEMU's programs take it.
    pub fn parse(text: &[u8]) -> Self {
        let exact = |part: &[u8], key: &str| part.strip_prefix(key.as_bytes()).map(<[u8]>::to_vec);
        let mut id = None;
        let mut name = None;
        for part in text.split(|&b| b == b',') {
            match (exact(part, "snapshot.id="), exact(part, "snapshot.name=")) {
                (Some(value), _) => id = Some(value),
                (_, Some(value)) => name = Some(value),
                _ => return Self::IdOrName(text.to_vec()),
            }
        }
        match (id, name) {
            (Some(id), Some(name)) => Self::Both { id, name },
            (Some(id), None) => Self::Id(id),
            (None, Some(name)) => Self::Name(name),
            (None, None) => Self::IdOrName(text.to_vec()),
        }
    }

    /// As [`Self::parse`], for what QEMU finds by name alone: deletion.
    pub fn parse_name(text: &[u8]) -> Self {
        match Self::parse(text) {
            Self::IdOrName(name) => Self::Name(name),
            other => other,
        }
    }

    /// Where the snapshot is in a table.
    pub fn find(&self, snapshots: &[Snapshot]) -> Option<usize> {
        let by_id = |id: &[u8]| snapshots.iter().position(|s| s.id == id);
        let by_name = |name: &[u8]| snapshots.iter().position(|s| s.name == name);
        match self {
            Self::Id(id) => by_id(id),
            Self::Name(name) => by_name(name),
            Self::IdOrName(text) => by_id(text).or_else(|| by_name(text)),
            Self::Both { id, name } => snapshots
                .iter()
                .position(|s| s.id == *id && s.name == *name),
        }
    }

    /// As [`Self::find`].
    ///
    /// # Errors
    ///
    /// `NotFound`, if there is none.
    pub fn require(&self, snapshots: &[Snapshot]) -> Result<usize> {
        self.find(snapshots).ok_or_else(|| {
            let error = Error::new(ErrorKind::NotFound, format!("there is no snapshot {self}"));
            match self {
                Self::Name(name) if snapshots.iter().any(|s| s.id == *name) => {
                    let id = String::from_utf8_lossy(name);
                    error.cure(format!(
                        "{id} is an ID; to go by that, say snapshot.id={id}"
                    ))
                }
                _ => error.cure("list them with `qcow2-ublk snapshot -l`"),
            }
        })
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes: &[u8]| format!("{:?}", String::from_utf8_lossy(bytes));
        match self {
            Self::Id(id) => write!(f, "with ID {}", text(id)),
            Self::Name(name) => write!(f, "named {}", text(name)),
            Self::IdOrName(either) => write!(f, "with ID or name {}", text(either)),
            Self::Both { id, name } => {
                write!(f, "with ID {} and name {}", text(id), text(name))
            }
        }
    }
}

/// Reads the snapshots of an image, and tells how long their table is.
pub(crate) async fn read(storage: &Storage, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let geometry = header.geometry();
    let start = header.snapshots_offset;
    let mut snapshots = Vec::new();
    let mut window = Vec::new();
    let mut at = 0;
    let mut window_at = 0;
    for _ in 0..header.nb_snapshots {
        if (at - window_at) as usize + LONGEST > window.len() {
            window_at = at;
            if start.0 + at >= storage.len() {
                // There would be as many entries as the header says.
                let what = "the snapshot table goes on behind the end of the file";
                return Err(Error::corrupt(what, start.0 + at)
                    .cure("The file was truncated: restore it from a copy"));
            }
            window = vec![0; WINDOW];
            storage.read(start.0 + at, &mut window).await?;
        }
        let bytes = &window[(at - window_at) as usize..];
        let (snapshot, len) = Snapshot::parse(bytes, start + at, &geometry)?;
        snapshots.push(snapshot);
        at += len as u64;
        if at > MAX_TABLE_BYTES {
            return Err(Error::corrupt("the snapshot table is too long", start.0));
        }
    }
    Ok((snapshots, at))
}

/// The table of `snapshots`, as bytes.
pub(crate) fn encode(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    let full = |what: &str| {
        Error::new(ErrorKind::Unsupported, what).cure("delete snapshots that are not needed")
    };
    if snapshots.len() > MAX_SNAPSHOTS as usize {
        return Err(full("an image has at most 65536 snapshots"));
    }
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        snapshot.encode(&mut bytes)?;
    }
    if bytes.len() as u64 > MAX_TABLE_BYTES {
        return Err(full("the snapshot table cannot be longer than 64 MiB"));
    }
    Ok(bytes)
}

/// Gives entries that have no disk size what version 3 requires; true if there
/// were any. `size` is the image's: everybody takes it for theirs.
pub(super) fn complete(snapshots: &mut [Snapshot], size: u64) -> bool {
    let mut any = false;
    for snapshot in snapshots.iter_mut().filter(|s| s.disk_size.is_none()) {
        any = true;
        snapshot.has_vm_state_64 = true;
        snapshot.disk_size = Some(size);
        // Nobody counted; and a part of a size is nothing to be kept.
        snapshot.icount = Some(u64::MAX);
        snapshot.unknown_extra.clear();
    }
    any
}

/// As [`read`], without the extra data beyond what anybody handles; also tells
/// whether there was some.
async fn read_cut(storage: &Storage, header: &Header) -> Result<(Vec<Snapshot>, u64, bool)> {
    let geometry = header.geometry();
    let start = header.snapshots_offset;
    let (mut snapshots, mut cut) = (Vec::new(), false);
    let mut at = start;
    for _ in 0..header.nb_snapshots {
        let mut entry = vec![0; HEAD_LEN];
        storage.read(at.0, &mut entry).await?;
        let parts = Parts::parse(&entry, at)?;
        let kept = parts.extra.min(MAX_EXTRA);
        cut |= kept < parts.extra;
        entry[EXTRA_LEN_AT..HEAD_LEN].copy_from_slice(&(kept as u32).to_be_bytes());
        entry.resize(HEAD_LEN + kept + parts.id + parts.name, 0);
        let (extra, rest) = entry[HEAD_LEN..].split_at_mut(kept);
        storage.read(at.0 + HEAD_LEN as u64, extra).await?;
        let behind = (HEAD_LEN + parts.extra) as u64;
        storage.read(at.0 + behind, rest).await?;
        snapshots.push(Snapshot::parse(&entry, at, &geometry)?.0);
        at += parts.padded() as u64;
        if at.0 - start.0 > MAX_TABLE_BYTES || at.0 > storage.len().next_multiple_of(8) {
            return Err(Error::corrupt("the snapshot table is too long", start.0));
        }
    }
    Ok((snapshots, at.0 - start.0, cut))
}

/// Lets all entries of an image's table have what version 3 requires, and no
/// more extra data than anybody handles: where one has not, the table gets a
/// new place.
pub(crate) async fn complete_table(sh: &mut Shadow<'_>) -> Result<()> {
    let (mut snapshots, len, cut) = read_cut(sh.storage(), &sh.header).await?;
    if !complete(&mut snapshots, sh.header.size) && !cut {
        return Ok(());
    }
    let table = encode(&snapshots)?;
    sh.free(sh.header.snapshots_offset, len).await?;
    sh.header.snapshots_offset = sh.write_table(&table).await?;
    Ok(())
}

/// A name that every reader takes whole.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() <= MAX_NAME && !name.contains(&0) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        format!("a snapshot's name has at most {MAX_NAME} bytes, none of them NUL"),
    ))
}

/// The ID of the next snapshot: the largest number there is, and 1.
pub(super) fn next_id(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    let largest = snapshots.iter().map(|s| leading_number(&s.id)).max();
    let next = largest.unwrap_or(0).checked_add(1);
    let next = next.ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "there is no number left for an ID")
            .cure("delete the snapshot with the largest ID")
    })?;
    let id = next.to_string().into_bytes();
    debug_assert!(id.len() <= MAX_ID);
    Ok(id)
}

/// The number that an ID begins with; 0 if with none.
fn leading_number(id: &[u8]) -> u64 {
    let digits = id.iter().take_while(|b| b.is_ascii_digit());
    digits.fold(0u64, |n, &digit| {
        n.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
    })
}
