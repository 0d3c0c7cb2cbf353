//! Refcounts of every width; and images whose refcounts lie: whoever writes to
//! them may be refused, but never harms the metadata.

use qcow2_ublk::qcow2::ImageOptions;
use qcow2_ublk::qcow2::spec::{Geometry, ReftableEntry, refcount};
use qcow2_ublk::storage::sim::SimDisk;

use super::common::{self, lab};
use super::input::Input;
use super::{images, recipe};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    if input.flag() {
        blocks(&mut input);
    } else {
        writes(&mut input);
    }
}

/// A block against a plain vector.
fn blocks(input: &mut Input<'_>) {
    let order = u32::from(input.u8() % 7);
    let len = usize::from(input.u8());
    let mut block = input.bytes(len).to_vec();
    block.resize(block.len().next_multiple_of(8).max(8), 0);
    let count = (block.len() * 8) >> order;
    let read =
        |block: &[u8]| -> Vec<u64> { (0..count).map(|i| refcount::get(block, order, i)).collect() };
    let mut model = read(&block);
    let max = refcount::max(order);
    while !input.is_empty() {
        let index = input.below(count as u64) as usize;
        let value = input.u64();
        match value % 3 {
            0 => {
                model[index] = value & max;
                refcount::set(&mut block, order, index, value & max);
            }
            _ => {
                let delta = (value as i64) >> (input.u8() % 64);
                let wanted = i128::from(model[index]) + i128::from(delta);
                let result = refcount::adjust(&mut block, order, index, delta);
                let fits = (0..=i128::from(max)).contains(&wanted);
                assert_eq!(result.is_ok(), fits, "{wanted} of at most {max}");
                if fits {
                    model[index] = wanted as u64;
                }
            }
        }
        assert_eq!(read(&block), model);
        let geometry = Geometry {
            cluster_bits: 9 + (value % 13) as u32,
            refcount_order: order,
            version: 3,
            extended_l2: false,
            external_data: false,
        };
        if let Ok(entry) = ReftableEntry::decode(value, &geometry) {
            assert_eq!(entry.encode(), value);
        }
    }
}

/// Work on an image that cannot be trusted.
fn writes(input: &mut Input<'_>) {
    let work = input.bytes(8);
    let image = recipe::image(input);
    let Some(before) = super::view::header_of(&image) else {
        return;
    };
    let disk = SimDisk::with_image(image);
    common::block_on(async {
        let options = ImageOptions::default();
        let engine = match images::open_to_write(&disk, &options).await {
            Ok(engine) => engine,
            Err(error) => return super::header::is_said_well(&error),
        };
        let size = engine.size();
        let cluster = engine.chain().top().cluster_size();
        for (n, &what) in work.iter().enumerate() {
            let at = (u64::from(what) * cluster.min(4096) % size.max(1)) & !511;
            let len = (cluster + 512).min(size - at).min(1 << 20);
            let result = match what % 4 {
                0 | 1 => {
                    lab::write(&engine, 0, at, &vec![0xd0 + n as u8; len as usize], false).await
                }
                2 => engine.discard(0, at, len).await,
                _ => engine.flush().await,
            };
            if let Err(error) = result {
                super::header::is_said_well(&error);
            }
        }
        let _ = engine.close().await;
    });
    // Guest data has not been written over the header.
    let after = super::view::header_of(&disk.image()).expect("the header is still there");
    assert_eq!(
        (after.cluster_bits, after.size, after.l1_size),
        (before.cluster_bits, before.size, before.l1_size)
    );
}
