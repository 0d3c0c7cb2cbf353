//! L1 and L2 entries, extended ones too: what decodes encodes back, and the
//! engine reads what the tables say, or says that it cannot.

use qcow2_ublk::qcow2::spec::l2::RawL2Entry;
use qcow2_ublk::qcow2::spec::{Geometry, HostOffset, L1Entry, L2Entry};
use qcow2_ublk::storage::sim::SimDisk;

use super::common::{self, lab};
use super::input::Input;
use super::recipe;
use super::view::View;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    if input.flag() {
        entries(&mut input);
    } else {
        reads(&mut input);
    }
}

fn entries(input: &mut Input<'_>) {
    let flags = input.u8();
    let version = 2 + (flags & 1);
    let extended_l2 = version == 3 && flags & 2 != 0;
    let least = if extended_l2 { 14 } else { 9 };
    let geometry = Geometry {
        cluster_bits: least + u32::from(input.u8()) % (22 - least),
        refcount_order: 4,
        version,
        extended_l2,
        external_data: flags & 4 != 0,
    };
    while !input.is_empty() {
        let (descriptor, bitmap) = (input.u64(), input.u64());
        if let Ok(entry) = L1Entry::decode(descriptor, &geometry) {
            assert_eq!(entry.encode(&geometry), descriptor);
        }
        let raw = RawL2Entry {
            descriptor,
            bitmap: if extended_l2 { bitmap } else { 0 },
        };
        let Ok(entry) = L2Entry::decode(raw, &geometry) else {
            continue;
        };
        // Without an offset, the COPIED flag says nothing; nor does the lowest
        // bit beside a bitmap.
        let compressed = matches!(entry, L2Entry::Compressed(_));
        let idle = u64::from(extended_l2 && !compressed);
        if entry.host().is_some() || descriptor >> 63 == 0 {
            let descriptor = descriptor & !idle;
            assert_eq!(entry.encode(&geometry), RawL2Entry { descriptor, ..raw });
        }
        let mut bytes = [0; 16];
        raw.write(&mut bytes, &geometry);
        assert_eq!(RawL2Entry::read(&bytes, &geometry), raw);
        for copied in [false, true] {
            let changed = entry.with_copied(copied);
            assert_eq!(changed.subclusters(), entry.subclusters());
            // In an external data file, the flag tells the first cluster from
            // none at all.
            if changed.host() == Some((HostOffset(0), false)) {
                continue;
            }
            let raw = changed.encode(&geometry);
            assert_eq!(L2Entry::decode(raw, &geometry), Ok(changed));
        }
        if let Some((host, _)) = entry.host() {
            assert!(host.is_aligned(geometry.cluster_bits) && host < HostOffset(1 << 56));
        }
        if let L2Entry::Compressed(range) = entry {
            assert!(range.max_len <= 2 * geometry.cluster_size());
            let touched = range.clusters_touched(&geometry);
            assert!(touched.end() - touched.start() <= 2 * geometry.cluster_size() / 512);
        }
        let mut index = 0;
        while index < 32 {
            let (_, run) = entry.run(index);
            assert!(run > 0 && index + run <= 32);
            index += run;
        }
    }
}

/// Cluster by cluster, what the engine reads is what the tables say.
fn reads(input: &mut Input<'_>) {
    let image = recipe::image(input);
    let Some(view) = View::open(&image) else {
        return;
    };
    common::block_on(async {
        let disk = SimDisk::with_image(image.clone());
        // Read-only, that is: an image that is marked corrupt is read too.
        let Ok(engine) = super::images::open_to_read(&disk).await else {
            return;
        };
        let size = view.header.virtual_size();
        assert_eq!(engine.size(), size);
        for cluster in 0..view.clusters() {
            let at = cluster << view.geometry.cluster_bits;
            let len = (size - at).min(view.geometry.cluster_size());
            let seen = lab::read(&engine, 0, at, len).await;
            let said = view.cluster(cluster);
            match (&seen, &said) {
                (Ok(seen), Some(said)) => {
                    assert!(
                        seen == said,
                        "guest cluster {cluster}: {:?}",
                        view.entry(cluster)
                    );
                }
                (Err(error), None) => super::header::is_said_well(error),
                (seen, _) => panic!(
                    "guest cluster {cluster}, {:?}: the engine says {:?}",
                    view.entry(cluster),
                    seen.as_ref().map(|_| "it is fine")
                ),
            }
        }
        assert_eq!(disk.recorded(), 0, "nothing is written by reading");
    });
}
