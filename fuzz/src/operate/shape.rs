//! The image that is worked on.

use qcow2_ublk::codec::CompressionType;
use qcow2_ublk::qcow2::create::{Backing, CreateOptions};
use qcow2_ublk::storage::sim::{Image, Rng};

use super::super::common::check::Checked;
use super::super::common::lab::{Below, How};
use super::super::input::Input;
use super::super::recipe;
use super::super::view::View;

pub struct Shape {
    pub image: Image,
    pub how: How,
    /// What the disk shows.
    pub content: Vec<u8>,
    /// What is below it.
    pub below: Vec<u8>,
    /// What its snapshots show.
    pub snapshots: Vec<Vec<u8>>,
    /// Changes are marked, and refcounts not believed after a power cut.
    pub lazy: bool,
}

/// None if it is not to be worked on.
pub fn choose(input: &mut Input<'_>) -> Option<Shape> {
    let choice = input.u8();
    let (flags, more) = (input.u8(), input.u8());
    let mut how = How {
        alignment: if flags & 1 == 0 { 1 } else { 512 },
        punch: flags & 2 == 0,
        queues: 1 + usize::from(flags >> 2 & 1),
        ..How::default()
    };
    let (image, below) = if choice & 0x80 == 0 {
        let below = if flags & 8 == 0 {
            Vec::new()
        } else {
            let mut below = vec![0; 512 * (1 + usize::from(more) / 2)];
            Rng::new(choice.into()).fill(&mut below);
            how.below = Below::Raw(Image::from_bytes(&below));
            below
        };
        (created(choice, flags, more, !below.is_empty())?, below)
    } else {
        (
            recipe::base((choice & 0x7f).into()).image.clone(),
            Vec::new(),
        )
    };
    let view = View::open(&image)?;
    let checked = Checked::open(&image).ok()?;
    if view.header.virtual_size() > 256 << 10 {
        return None;
    }
    let compatible = view.header.compatible;
    Some(Shape {
        content: checked.active_content(&below),
        snapshots: (0..checked.snapshots().len())
            .map(|index| checked.snapshot_content(index, &below))
            .collect(),
        lazy: compatible.contains(qcow2_ublk::qcow2::spec::header::Compatible::LAZY_REFCOUNTS),
        image,
        how,
        below,
    })
}

fn created(choice: u8, flags: u8, more: u8, backed: bool) -> Option<Image> {
    let version = if choice & 0x40 == 0 { 3 } else { 2 };
    let extended = version == 3 && flags & 0x10 != 0;
    let cluster_bits = if extended { 14 } else { 9 + choice % 8 };
    let options = CreateOptions {
        cluster_size: 1 << cluster_bits,
        version,
        refcount_bits: if version == 3 {
            1 << (choice / 8 % 7)
        } else {
            16
        },
        compression_type: if version == 3 && flags & 0x20 != 0 {
            CompressionType::Zstd
        } else {
            CompressionType::Deflate
        },
        lazy_refcounts: version == 3 && flags & 0x40 != 0,
        extended_l2: extended,
        backing: backed.then(|| Backing {
            file: "below".into(),
            format: Some("raw".to_owned()),
        }),
        ..CreateOptions::new(512 * (1 + u64::from(more)))
    };
    let new = options.build().ok()?;
    let mut image = Image::new();
    for (at, bytes) in &new.chunks {
        image.write(at.0, bytes);
    }
    image.set_len(new.file_len);
    Some(image)
}
