//! Version 3 to version 2: what only version 3 can say has to go first, zero
//! clusters above all. In version 2 a cluster reads as zeros when nothing is
//! mapped and nothing is below, or when zeros are stored: encrypted ones, on an
//! encrypted disk, for which there is no key here.

use std::collections::BTreeMap;

use super::{one_sector, refuse_external, usage};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::open::read_header;
use crate::qcow2::shadow::{Shadow, Tree, damaged, read_l2};
use crate::qcow2::snapshot;
use crate::qcow2::spec::header::{Autoclear, Compatible, CryptMethod, Extension, Incompatible};
use crate::qcow2::spec::{Header, HostOffset, L1Entry, L2Entry, RawL2Entry};
use crate::runtime::Buf;
use crate::storage::Storage;

/// Whether the header alone stands in the way.
pub(super) fn check(header: &Header) -> Result<()> {
    refuse_external(header)?;
    if header.incompatible != Incompatible::empty() {
        return Err(usage(
            "Cannot downgrade an image with incompatible features set",
        ));
    }
    if header.bitmaps().is_some() {
        return Err(usage("Cannot downgrade an image with bitmaps")
            .cure("remove them first, with `qcow2-ublk bitmap --remove`"));
    }
    Ok(())
}

fn as_version_2(header: &mut Header) {
    header.version = 2;
    header.compatible = Compatible::empty();
    header.autoclear = Autoclear::empty();
    header.unknown_fields = Vec::new();
    header
        .extensions
        .retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
}

/// Makes the image one of version 2.
pub(super) async fn downgrade(storage: &Storage) -> Result<()> {
    let header = read_header(storage).await?;
    check(&header)?;
    let mut new = header.clone();
    as_version_2(&mut new);
    one_sector(&new)?;
    let len_before = storage.len();
    let built = build(storage, header).await;
    if built.is_err() {
        Shadow::give_up(storage, len_before).await;
    }
    let ready = built?;
    ready.publish_header(storage).await?;
    ready.punch_freed(storage).await;
    Ok(())
}

/// Entries of the snapshots' L1 tables that are kept in memory: 128 MiB.
const MOST_ENTRIES: u64 = 16 << 20;

async fn build(storage: &Storage, header: Header) -> Result<crate::qcow2::shadow::Ready> {
    let size = header.virtual_size();
    let (mut snapshots, table_len) = snapshot::read_table(storage, &header).await?;
    if snapshots.iter().any(|snapshot| {
        u32::try_from(snapshot.vm_state_size).is_err()
            || snapshot.disk_size.is_some_and(|n| n & !511 != size)
    }) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "Internal snapshots prevent downgrade of image",
        )
        .cure("delete those of another size, and those with much VM state"));
    }
    // All of them are in memory at once.
    let entries: u64 = snapshots.iter().map(|s| u64::from(s.l1_size)).sum();
    if entries > MOST_ENTRIES {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("the snapshots' L1 tables have {entries} entries, which are too many at once"),
        )
        .cure("delete snapshots, or convert the image"));
    }
    let instead = match (&header.backing_file, header.crypt_method) {
        (None, _) => Instead::Nothing,
        (Some(_), CryptMethod::None) => Instead::Zeros,
        (Some(_), _) => Instead::Refusal,
    };
    let mut sh = Shadow::begin(storage, header).await?;

    // The active tree first.
    let (offset, entries) = (sh.header.l1_table_offset, sh.header.l1_size);
    let mut trees = vec![Tree::read(&sh, offset, entries).await?];
    let len = sh.header.l1_bytes();
    sh.free(offset, len).await?;
    for snapshot in &snapshots {
        trees.push(Tree::read(&sh, snapshot.l1_table_offset, snapshot.l1_size).await?);
        sh.free(snapshot.l1_table_offset, snapshot.l1_bytes())
            .await?;
    }
    without_zero_flags(&mut sh, &mut trees, instead).await?;
    sh.header.l1_table_offset = sh.write_table(&trees[0].encode()).await?;
    for (snapshot, tree) in snapshots.iter_mut().zip(&trees[1..]) {
        snapshot.l1_table_offset = sh.write_table(&tree.encode()).await?;
    }
    sh.free(sh.header.snapshots_offset, table_len).await?;
    let table = snapshot::encode_table(&snapshots)?;
    sh.header.snapshots_offset = sh.write_table(&table).await?;
    as_version_2(&mut sh.header);
    sh.finish().await
}

/// What there is to be instead of a zero flag.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Instead {
    /// No mapping.
    Nothing,
    /// Stored zeros, for what is below must not show.
    Zeros,
    /// They would have to be encrypted. (QEMU 10.0 stores plain ones, which
    /// then read as noise.)
    Refusal,
}

/// Replaces every L2 table that has zero flags.
async fn without_zero_flags(
    sh: &mut Shadow<'_>,
    trees: &mut [Tree],
    instead: Instead,
) -> Result<()> {
    // Snapshots share tables: each is replaced once, wherever it is.
    let mut uses: BTreeMap<HostOffset, Vec<(usize, usize)>> = BTreeMap::new();
    for (number, tree) in trees.iter().enumerate() {
        for (index, table) in tree.tables(sh)? {
            uses.entry(table).or_default().push((number, index));
        }
    }
    let geometry = sh.geometry();
    for (table, places) in uses {
        // No more than there are snapshots.
        let references = places.len() as i64;
        let mut bytes = read_l2(sh, table).await?;
        if !replace_zeros(sh, table, &mut bytes, references, instead).await? {
            continue;
        }
        let new = sh.write_table(&bytes).await?;
        if references > 1 {
            sh.adjust(new.cluster(geometry.cluster_bits), references - 1)
                .await?;
        }
        sh.adjust(table.cluster(geometry.cluster_bits), -references)
            .await?;
        let entry = L1Entry::Table {
            offset: new,
            copied: references == 1,
        };
        for (number, index) in places {
            trees[number].l1[index] = entry.encode(&geometry);
        }
    }
    Ok(())
}

/// Replaces the zero flags of a table that is used `references` times; whether
/// there were any.
async fn replace_zeros(
    sh: &mut Shadow<'_>,
    table: HostOffset,
    bytes: &mut Buf,
    references: i64,
    instead: Instead,
) -> Result<bool> {
    let geometry = sh.geometry();
    let cluster_size = geometry.cluster_size() as usize;
    let mut changed = false;
    let entries = bytes.chunks_exact_mut(geometry.l2_entry_bytes() as usize);
    for (index, bytes) in (0u64..).zip(entries) {
        let at = table + (index << geometry.l2_entry_bits());
        let entry = L2Entry::decode(RawL2Entry::read(bytes, &geometry), &geometry)
            .map_err(|bad| damaged(bad.into_error("L2 table", at), sh))?;
        match entry {
            L2Entry::Zero => {}
            L2Entry::ZeroAllocated { host, .. } => {
                sh.adjust(host.cluster(geometry.cluster_bits), -references)
                    .await?;
            }
            _ => continue,
        }
        let new = match instead {
            Instead::Nothing => L2Entry::Unallocated,
            Instead::Zeros => {
                let host = sh.write_table(&Buf::zeroed(cluster_size)).await?;
                if references > 1 {
                    sh.adjust(host.cluster(geometry.cluster_bits), references - 1)
                        .await?;
                }
                let copied = references == 1;
                L2Entry::Data { host, copied }
            }
            Instead::Refusal => return Err(needs_key()),
        };
        new.encode(&geometry).write(bytes, &geometry);
        changed = true;
    }
    Ok(changed)
}

fn needs_key() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "Version 2 has no zero clusters: an encrypted image over a backing file that has some \
         cannot be amended to it",
    )
    .cure("take it off its backing file first, with `qcow2-ublk rebase -b ''`")
}
