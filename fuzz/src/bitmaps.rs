//! Bitmap directories, tables and bits: what is read says the same when it is
//! written; bitmaps that record have all that was written; and a sound image
//! stays sound.

use qcow2_ublk::qcow2::spec::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_ublk::qcow2::{BitmapAction, BitmapInfo, ImageOptions};
use qcow2_ublk::storage::sim::{Image, SimDisk};

use super::common::{self, lab};
use super::input::Input;
use super::view::header_of;
use super::{images, recipe};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (action, at) = (input.u8(), u64::from(input.u16()));
    let image = recipe::image(&mut input);
    directory(&image);
    let disk = SimDisk::with_image(image);
    reading(&disk);
    let sound = common::block_on(images::is_sound(&disk));
    common::block_on(writing(&disk, action, at));
    if sound {
        assert!(
            common::block_on(images::is_sound(&disk)),
            "it was sound before"
        );
    }
    reading(&disk);
}

fn directory(image: &Image) {
    let Some(header) = header_of(image) else {
        return;
    };
    let Some(extension) = header.bitmaps() else {
        return;
    };
    let len = extension.directory_size.min(1 << 20);
    let bytes = image.bytes(extension.directory_offset.0, len);
    let geometry = header.geometry();
    let Ok(bitmaps) = Bitmap::parse_directory(&bytes, extension, &geometry) else {
        return;
    };
    let mut again = Vec::new();
    for bitmap in &bitmaps {
        bitmap.encode(&mut again).expect("it was read");
        let words = image.bytes(
            bitmap.table_offset.0,
            u64::from(bitmap.table_size.min(512)) * 8,
        );
        for word in words.chunks_exact(8) {
            let word = u64::from_be_bytes(word.try_into().expect("8 bytes"));
            if let Ok(entry) = BitmapTableEntry::decode(word, &geometry) {
                assert_eq!(entry.encode(), word);
            }
        }
    }
    assert!(again.len() as u64 <= extension.directory_size);
    let same = qcow2_ublk::qcow2::spec::bitmap::BitmapsExtension {
        directory_size: again.len() as u64,
        ..*extension
    };
    let parsed = Bitmap::parse_directory(&again, &same, &geometry);
    assert_eq!(parsed.expect("our own"), bitmaps);
}

/// Every bitmap, as far as it can be read.
fn reading(disk: &SimDisk) {
    let recorded = disk.recorded();
    common::block_on(async {
        let Ok(engine) = images::open_to_read(disk).await else {
            return;
        };
        let image = engine.chain().top();
        for BitmapInfo {
            name, granularity, ..
        } in image.bitmaps().await.unwrap_or_default()
        {
            if let Ok(content) = image.bitmap(&name).await {
                assert_eq!(content.granularity(), granularity);
                let mut sum = 0;
                let walked = content.ranges(|at, len| {
                    assert!(at + len <= content.size() && content.is_dirty(at));
                    sum += len;
                    Ok(())
                });
                assert!(walked.is_ok() && sum <= content.count().max(sum));
            }
        }
    });
    assert_eq!(disk.recorded(), recorded, "nothing is written by reading");
}

async fn writing(disk: &SimDisk, action: u8, at: u64) {
    let Ok(engine) = images::open_to_write(disk, &ImageOptions::default()).await else {
        return;
    };
    let image = engine.chain().top();
    let Ok(before) = image.bitmaps().await else {
        return;
    };
    let size = engine.size();
    let at = (at * 512) % size.max(1);
    let len = 512.min(size - at);
    let written = lab::write(&engine, 0, at, &vec![0xb1; len as usize], false).await;
    for bitmap in &before {
        let content = image.bitmap(&bitmap.name).await;
        if let (Ok(content), true, Ok(()), false) = (
            content,
            bitmap.enabled,
            &written,
            bitmap.inconsistent || len == 0,
        ) {
            assert!(content.is_dirty(at), "{bitmap:?} has not recorded {at}");
        }
    }
    let name = before
        .first()
        .map_or_else(|| b"new".to_vec(), |bitmap| bitmap.name.clone());
    let action = match action % 6 {
        0 => BitmapAction::Add { granularity: None },
        1 => BitmapAction::Remove,
        2 => BitmapAction::Clear,
        3 => BitmapAction::Enable,
        4 => BitmapAction::Disable,
        _ => BitmapAction::Add {
            granularity: Some(512),
        },
    };
    let name = match action {
        BitmapAction::Add { .. } => b"added".to_vec(),
        _ => name,
    };
    if let Err(error) = image.change_bitmap(&name, &action).await {
        assert!(error.to_string().len() > 8);
    }
    let _ = engine.close().await;
}
