//! The image that is worked on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use qcow2_ublk::codec::CompressionType;
use qcow2_ublk::crypto::{Effort, Keyring, Secret, luks1, luks2};
use qcow2_ublk::qcow2::Barrier;
use qcow2_ublk::qcow2::create::{Backing, CreateOptions};
use qcow2_ublk::qcow2::spec::header::{Compatible, CryptMethod};
use qcow2_ublk::storage::sim::{Image, Rng, SimDisk};

use super::super::common::check::Checked;
use super::super::common::lab::{self, Below, How};
use super::super::input::Input;
use super::super::view::header_of;
use super::super::{common, recipe};

const PASSPHRASE: &[u8] = b"passphrase";

pub struct Shape {
    pub image: Image,
    /// The external data file.
    pub data: Option<Image>,
    pub how: How,
    /// What the disk shows.
    pub content: Vec<u8>,
    /// What is below it.
    pub below: Vec<u8>,
    /// What its snapshots show.
    pub snapshots: Vec<Vec<u8>>,
    /// Changes are marked, and refcounts not believed after a power cut.
    pub lazy: bool,
    /// The data file is the disk, byte for byte.
    pub raw: bool,
    /// What is in the file is not what the disk shows.
    pub encrypted: bool,
    /// Version 2 has no way to hide what is below without data.
    pub hides_below: bool,
    /// Nothing is mapped at first, nor given a place.
    pub empty: bool,
    /// Bitmaps are worked on too.
    pub with_bitmaps: bool,
}

/// What inputs of older days do not say.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct More {
    barrier: u8,
    kind: u8,
    bitmaps: bool,
}

impl More {
    const DATA_FILE: u8 = 2;
    const RAW_DATA_FILE: u8 = 3;
    const LUKS1: u8 = 4;
    const LUKS2: u8 = 5;

    fn read(input: &mut Input<'_>) -> Self {
        let byte = input.u8();
        Self {
            barrier: byte & 3,
            kind: byte >> 2 & 7,
            bitmaps: byte & 0x20 != 0,
        }
    }

    fn barrier(self) -> Barrier {
        [
            Barrier::Batched,
            Barrier::Metadata,
            Barrier::Full,
            Barrier::None,
        ][usize::from(self.barrier)]
    }

    fn has_data_file(self) -> bool {
        matches!(self.kind, Self::DATA_FILE | Self::RAW_DATA_FILE)
    }

    fn is_raw(self) -> bool {
        self.kind == Self::RAW_DATA_FILE
    }

    /// Version of LUKS, or 0.
    fn luks(self) -> u8 {
        match self.kind {
            Self::LUKS1 => 1,
            Self::LUKS2 => 2,
            _ => 0,
        }
    }
}

/// None if it is not to be worked on.
pub fn choose(input: &mut Input<'_>) -> Option<Shape> {
    let choice = input.u8();
    let (flags, size) = (input.u8(), input.u8());
    let more = if flags & 0x80 == 0 {
        More::default()
    } else {
        More::read(input)
    };
    let mut how = How {
        alignment: if flags & 1 == 0 { 1 } else { 512 },
        punch: flags & 2 == 0,
        queues: 1 + usize::from(flags >> 2 & 1),
        barrier: more.barrier(),
        ..How::default()
    };
    let created = choice & 0x80 == 0;
    let mut below = Vec::new();
    let (image, data) = if created {
        if flags & 8 != 0 && !more.is_raw() {
            below = vec![0; 512 * (1 + usize::from(size) / 2)];
            Rng::new(choice.into()).fill(&mut below);
            how.below = Below::Raw(Image::from_bytes(&below));
        }
        create(choice, flags & !7, size, more, !below.is_empty())?
    } else {
        let base = recipe::base((choice & 0x7f).into());
        (base.image.clone(), None)
    };
    let header = header_of(&image)?;
    let encrypted = header.crypt_method != CryptMethod::None;
    if encrypted {
        let keys: Arc<dyn Keyring> = Arc::new(Secret::new(PASSPHRASE.to_vec()));
        how.keys = Some(keys);
    }
    if header.virtual_size() > 256 << 10 {
        return None;
    }
    let checked = Checked::open(&image).ok()?.with_data(data.as_ref());
    Some(Shape {
        content: checked.active_content(&below),
        snapshots: (0..checked.snapshots().len())
            .map(|index| checked.snapshot_content(index, &below))
            .collect(),
        lazy: header.compatible.contains(Compatible::LAZY_REFCOUNTS),
        raw: more.is_raw() && created,
        encrypted,
        hides_below: header.version >= 3 || below.is_empty(),
        empty: created && !more.is_raw(),
        with_bitmaps: more.bitmaps,
        image,
        data,
        how,
        below,
    })
}

/// A new image, and its data file. The same input means the same image, but
/// for the keys of an encrypted one.
fn create(
    choice: u8,
    flags: u8,
    size: u8,
    more: More,
    backed: bool,
) -> Option<(Image, Option<Image>)> {
    type Made = HashMap<(u8, u8, u8, More), Option<(Image, Option<Image>)>>;
    thread_local! {
        static MADE: RefCell<Made> = RefCell::default();
    }
    let asked = (choice, flags, size, more);
    if let Some(made) = MADE.with_borrow(|made| made.get(&asked).cloned()) {
        return made;
    }
    let new = created(choice, flags, size, more, backed);
    MADE.with_borrow_mut(|made| {
        if made.len() >= 64 {
            made.clear();
        }
        made.insert(asked, new.clone());
    });
    new
}

fn created(
    choice: u8,
    flags: u8,
    size: u8,
    more: More,
    backed: bool,
) -> Option<(Image, Option<Image>)> {
    let version = if choice & 0x40 == 0 { 3 } else { 2 };
    let extended = version == 3 && flags & 0x10 != 0;
    let cluster_bits = match (extended, more.luks()) {
        (true, _) => 14,
        (false, 0) => 9 + choice % 8,
        // Its header takes so many clusters.
        (false, _) => 12 + choice % 5,
    };
    let size = 512 * (1 + u64::from(size));
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
        luks: luks_header(more.luks()),
        data_file: more.has_data_file().then(|| "data".into()),
        data_file_raw: more.is_raw(),
        // A raw data file is mapped when the disk grows.
        ..CreateOptions::new(if more.is_raw() { 0 } else { size })
    };
    let new = options.build().ok()?;
    let mut image = Image::new();
    for (offset, bytes) in &new.chunks {
        // Most of a LUKS header is zeros.
        for (at, part) in (offset.0..).step_by(4096).zip(bytes.chunks(4096)) {
            if part.iter().any(|&b| b != 0) {
                image.write(at, part);
            }
        }
    }
    image.set_len(new.file_len);
    if !more.has_data_file() {
        return Some((image, None));
    }
    let mut data = Image::new();
    data.set_len(options.size);
    if !more.is_raw() {
        return Some((image, Some(data)));
    }
    let disk = SimDisk::with_image(image);
    let data = disk.beside(data);
    let how = How {
        data: Some(data.clone()),
        ..How::default()
    };
    common::block_on(async {
        let engine = lab::open(&disk, &how).await.expect("it is new");
        engine.grow(size).await.expect("there is room");
        engine.close().await.expect("nothing fails");
    });
    Some((disk.image(), Some(data.image())))
}

/// One header is made for all images: its keys are random, and nothing
/// depends on them.
fn luks_header(version: u8) -> Option<Arc<[u8]>> {
    static HEADERS: [OnceLock<Arc<[u8]>>; 2] = [OnceLock::new(), OnceLock::new()];
    let place = HEADERS.get(usize::from(version).checked_sub(1)?)?;
    let header = place.get_or_init(|| {
        let format = luks1::Format {
            key_len: 32,
            // The least that the format allows.
            effort: Effort(Duration::ZERO),
            ..luks1::Format::default()
        };
        let made = if version == 1 {
            format.make(PASSPHRASE)
        } else {
            luks2::make(&format, PASSPHRASE)
        };
        made.expect("a header").into()
    });
    Some(Arc::clone(header))
}
