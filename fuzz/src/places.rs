//! Where the metadata of a sound image is, for changes to be aimed at it.

use qcow2_ublk::qcow2::spec::header::Prefix;
use qcow2_ublk::qcow2::spec::snapshot::{self, Snapshot};
use qcow2_ublk::qcow2::spec::{Header, HostOffset};
use qcow2_ublk::storage::sim::Image;

/// A table or a part of one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    pub offset: u64,
    pub len: u64,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn words(image: &Image, place: Place) -> Vec<u64> {
    image
        .bytes(place.offset, place.len)
        .chunks_exact(8)
        .map(|word| u64::from_be_bytes(word.try_into().expect("8 bytes")))
        .collect()
}

/// The header, refcounts, L1 and L2 tables, snapshots and bitmaps; in that
/// order. None if this is no image.
pub fn places(image: &Image) -> Vec<Place> {
    found(image).unwrap_or_default()
}

fn found(image: &Image) -> Option<Vec<Place>> {
    let prefix = Prefix::parse(&image.bytes(0, 512)).ok()?;
    let cluster0 = image.bytes(0, prefix.cluster_size() as u64);
    let header = Header::parse(&cluster0, image.len()).ok()?;
    let geometry = header.geometry();
    let cluster = geometry.cluster_size();
    let place = |offset: HostOffset, len| Place {
        offset: offset.0,
        len,
    };
    let end = header.encode().ok()?.len() as u64;
    let mut found = vec![place(HostOffset(0), end)];
    let reftable = place(header.refcount_table_offset, header.reftable_bytes());
    let used = |table: Place| {
        let words = words(image, table);
        let len = words
            .iter()
            .rposition(|&word| word != 0)
            .map_or(1, |n| n + 1);
        (len as u64 * 8, words)
    };
    let tables_of = |table: Place, found: &mut Vec<Place>| {
        let (len, words) = used(table);
        found.push(Place { len, ..table });
        for word in words {
            if word & OFFSET != 0 {
                let table = place(HostOffset(word & OFFSET), cluster);
                let len = used(table).0;
                found.push(Place { len, ..table });
            }
        }
    };
    tables_of(reftable, &mut found);
    tables_of(place(header.l1_table_offset, header.l1_bytes()), &mut found);
    let mut at = header.snapshots_offset;
    for _ in 0..header.nb_snapshots {
        let head = image.bytes(at.0, snapshot::HEAD_LEN as u64);
        let len = snapshot::entry_len(&head, at).ok()? as u64;
        let (snapshot, _) = Snapshot::parse(&image.bytes(at.0, len), at, &geometry).ok()?;
        found.push(place(at, len));
        tables_of(
            place(snapshot.l1_table_offset, snapshot.l1_bytes()),
            &mut found,
        );
        at += len;
    }
    if let Some(bitmaps) = header.bitmaps() {
        found.push(place(bitmaps.directory_offset, bitmaps.directory_size));
        let directory = image.bytes(bitmaps.directory_offset.0, bitmaps.directory_size);
        let all = qcow2_ublk::qcow2::spec::bitmap::Bitmap::parse_directory(
            &directory, bitmaps, &geometry,
        );
        for bitmap in all.ok()? {
            found.push(place(bitmap.table_offset, u64::from(bitmap.table_size) * 8));
        }
    }
    if let Some((offset, _)) = header.crypto_header() {
        found.push(place(offset, 592));
    }
    Some(found)
}
