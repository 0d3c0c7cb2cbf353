//! How long a new file will be, before it is made: figures that agree with
//! `qemu-img measure`, so that what is provisioned by one suits the other.

use super::{Format, Source};
use crate::disk::blocking;
use crate::error::Result;
use crate::qcow2::create::{CreateOptions, Preallocation};
use crate::qcow2::spec::Geometry;
use crate::qcow2::spec::bitmap::Bitmap;
use crate::qcow2::{Image, info};

/// Lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// For what is to be stored now.
    pub required: u64,
    /// For when everything is written.
    pub fully_allocated: u64,
    /// For the source's bitmaps, where both can have some.
    pub bitmaps: Option<u64>,
}

impl Measure {
    fn raw(size: u64) -> Self {
        Self {
            required: size,
            fully_allocated: size,
            bitmaps: None,
        }
    }
}

/// A new disk of `size` bytes.
pub fn measure_size(size: u64, format: Format, options: &CreateOptions) -> Result<Measure> {
    let size = size.next_multiple_of(512);
    if format == Format::Raw {
        return Ok(Measure::raw(size));
    }
    new_image(size, 0, options)
}

/// A copy of the disk in `source`.
pub fn measure_image(source: &Source, format: Format, options: &CreateOptions) -> Result<Measure> {
    let size = source.size();
    if format == Format::Raw {
        return Ok(Measure::raw(size));
    }
    let cluster_size = options.cluster_size;
    let stored = if options.backing.is_some() {
        // How much of it the backing file has is not known: nothing.
        size.next_multiple_of(cluster_size)
    } else {
        blocking(stored(source, cluster_size))?
    };
    let mut measure = new_image(size, stored, options)?;
    if let Some(engine) = source.engine()
        && engine.chain().top().version() >= 3
        && options.version >= 3
    {
        let image = engine.chain().top();
        measure.bitmaps = Some(blocking(bitmaps(image, size, options))?);
    }
    Ok(measure)
}

/// What the bitmaps of `image` take in a new one: directory, tables, and every
/// bit of them.
async fn bitmaps(image: &Image, size: u64, options: &CreateOptions) -> Result<u64> {
    let found = info::info(image.storage()).await?.bitmaps;
    let geometry = CreateOptions {
        size,
        ..options.clone()
    }
    .build()?
    .header
    .geometry();
    let whole = |bytes: u64| bytes.next_multiple_of(geometry.cluster_size());
    let (mut directory, mut len) = (0, 0);
    for bitmap in &found {
        let clusters = Bitmap::table_entries_for(bitmap.granularity_bits, size, &geometry);
        len += clusters * geometry.cluster_size() + whole(clusters * 8);
        // An entry's fixed part, and its name.
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(len + whole(directory))
}

/// Bytes of the clusters that hold data.
async fn stored(source: &Source, cluster_size: u64) -> Result<u64> {
    let size = source.size();
    let mut stored = 0;
    let mut at = 0;
    while at < size {
        let entry = source.extent(at, size - at).await?;
        let end = at + entry.len;
        if entry.zero || !entry.data {
            at = end;
            continue;
        }
        let start = at - at % cluster_size;
        let end = end.next_multiple_of(cluster_size);
        stored += end - start;
        at = end;
    }
    Ok(stored)
}

/// An image of `size` bytes, `stored` of which are written at once.
fn new_image(size: u64, stored: u64, options: &CreateOptions) -> Result<Measure> {
    // The options are checked as for a real one.
    let image = CreateOptions {
        size,
        ..options.clone()
    }
    .build()?;
    let geometry = image.header.geometry();
    let size = size.next_multiple_of(geometry.cluster_size());
    // As for qemu-img, nothing counts the clusters of a LUKS header.
    let luks = options.luks.as_ref().map_or(0, |luks| luks.len() as u64);
    let luks = luks.next_multiple_of(geometry.cluster_size());
    let full = full_len(size, &geometry) + luks;
    let stored = match options.preallocation {
        Preallocation::Falloc | Preallocation::Full => size,
        Preallocation::Off | Preallocation::Metadata => stored,
    };
    Ok(Measure {
        required: full - size + stored,
        fully_allocated: full,
        bitmaps: None,
    })
}

/// The length of an image with all of its clusters and tables, when no refcount
/// block has room for more than there is.
fn full_len(size: u64, geometry: &Geometry) -> u64 {
    let cluster_size = geometry.cluster_size();
    let header = cluster_size;
    let l2 = geometry.clusters_for(size).div_ceil(geometry.l2_entries()) * cluster_size;
    let l1 = (l2 / cluster_size * 8).next_multiple_of(cluster_size);
    let counted = (header + l2 + l1 + size) / cluster_size;
    counted * cluster_size + refcount_len(counted, geometry)
}

/// What counts `clusters` and itself.
fn refcount_len(clusters: u64, geometry: &Geometry) -> u64 {
    let (mut blocks, mut tables) = (0, 0);
    loop {
        let wanted = (clusters + blocks + tables).div_ceil(geometry.refcounts_per_block());
        let entries = geometry.reftable_entries_per_cluster();
        let wanted_tables = wanted.div_ceil(entries);
        if (wanted, wanted_tables) == (blocks, tables) {
            return (blocks + tables) * geometry.cluster_size();
        }
        (blocks, tables) = (wanted, wanted_tables);
    }
}
