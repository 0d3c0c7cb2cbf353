//! The disks of a case: making them, and opening what is on them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use qcow2_ublk::chain::{Chain, Layer};
use qcow2_ublk::codec::CompressionType;
use qcow2_ublk::crypto::{Effort, Keyring, Secret, luks1, luks2};
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::create::{Backing, CreateOptions, Preallocation};
use qcow2_ublk::qcow2::{Image, ImageOptions};
use qcow2_ublk::runtime::{Buf, Runtime};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, Rng, SimDisk};
use qcow2_ublk::{Error, Result};

use super::common::{half_random, lab};
use super::model::stamp;
use super::shape::{Below, Data, Shape};

pub(crate) const PASSPHRASE: &[u8] = b"power";

/// A passphrase besides [`PASSPHRASE`].
pub(crate) fn passphrase(name: char) -> Secret {
    Secret::new(format!("power {name}").into_bytes())
}

/// Runs a future on this thread's own executor.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    thread_local! {
        static RUNTIME: Runtime = Runtime::inline().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// The disks of one machine.
#[derive(Clone)]
pub(crate) struct Disks {
    pub(crate) image: SimDisk,
    pub(crate) data: Option<SimDisk>,
    pub(crate) below: Option<SimDisk>,
}

impl Disks {
    /// A machine with disks that hold this, in the order of
    /// [`Self::images`].
    pub(crate) fn with(shape: &Shape, images: &[sim::Image]) -> Self {
        let image = SimDisk::with_image(images[0].clone());
        let mut others = images[1..].iter();
        let mut next = |wanted: bool| {
            wanted.then(|| image.beside(others.next().expect("as many as it has").clone()))
        };
        let data = next(shape.data != Data::Inside);
        let below = next(shape.below != Below::Nothing);
        Self { image, data, below }
    }

    /// What they hold: image, data file, layer below.
    pub(crate) fn images(&self) -> Vec<sim::Image> {
        let disks = [Some(&self.image), self.data.as_ref(), self.below.as_ref()];
        disks.into_iter().flatten().map(SimDisk::image).collect()
    }
}

pub(crate) fn image_options(shape: &Shape) -> ImageOptions {
    let keys: Arc<dyn Keyring> = Arc::new(Secret::new(PASSPHRASE.to_vec()));
    ImageOptions {
        queues: shape.queues,
        l2_cache: if shape.tiny { 0 } else { 32 << 20 },
        punch: shape.punch,
        keys: (shape.luks != 0).then_some(keys),
        barrier: shape.barrier,
        ..ImageOptions::default()
    }
}

/// The image of a machine, repaired if it has to be.
pub(crate) async fn open_image(disks: &Disks, shape: &Shape) -> Result<Image> {
    let options = image_options(shape);
    let storage = |disk| Storage::simulated(disk, shape.alignment);
    let data = disks.data.as_ref().map(storage);
    let image = Image::open_with_data(storage(&disks.image), data, &options).await?;
    image.repaired(&options).await
}

/// The layer below; for writing, if something is to be committed to it.
pub(crate) async fn open_below(disks: &Disks, shape: &Shape) -> Result<Vec<Layer>> {
    let Some(disk) = &disks.below else {
        return Ok(Vec::new());
    };
    let storage = Storage::simulated(disk, 1);
    Ok(vec![match shape.below {
        Below::Raw => Layer::Raw(storage),
        _ => {
            let options = ImageOptions::default();
            let image = Image::open(storage, &options).await?;
            Layer::Qcow2(Box::new(image.repaired(&options).await?))
        }
    }])
}

pub(crate) async fn open(disks: &Disks, shape: &Shape) -> Result<Engine> {
    let image = open_image(disks, shape).await?;
    let chain = Chain::new(image, open_below(disks, shape).await?);
    let options = engine::Options {
        request_unit: 512,
        detect_zeroes: shape.detect,
        ..engine::Options::default()
    };
    Ok(Engine::new(chain, options))
}

/// All that the disk shows.
pub(crate) async fn read_all(engine: &Engine) -> Result<Vec<u8>> {
    lab::read(engine, 0, 0, engine.size()).await
}

/// `len` bytes of it from `offset` on, into memory that is used again.
pub(crate) async fn read_some(engine: &Engine, offset: u64, len: u64) -> Result<Buf> {
    let mut bytes = Buf::take(len as usize);
    lab::read_into(engine, 0, offset, &mut bytes).await?;
    Ok(bytes)
}

/// Bytes of what is below: shorter than the disk, to an odd sector.
pub(crate) fn below_content(shape: &Shape) -> Vec<u8> {
    let sectors = (shape.sectors * 3 / 4).max(1);
    half_random((sectors * 512) as usize, 77)
}

/// Makes the disks of a case, with what is on them at first.
pub(crate) fn make(shape: &Shape) -> Result<Disks> {
    let images = new_images(shape)?;
    let disks = Disks::with(shape, &images);
    block_on(async {
        let engine = open(&disks, shape).await?;
        let size = shape.sectors * 512;
        if engine.size() < size {
            engine.grow_preallocated(size, shape.space).await?;
        }
        if shape.fill != 0 {
            fill(&engine, shape).await?;
        }
        engine.close().await
    })?;
    disks.image.forget();
    Ok(disks)
}

/// The new files, empty.
fn new_images(shape: &Shape) -> Result<Vec<sim::Image>> {
    // Space is taken when a disk grows: it has none at first.
    let grown = shape.space != Preallocation::Off || shape.data == Data::RawFile;
    let size = if grown { 0 } else { shape.sectors * 512 };
    let format = match shape.below {
        Below::Nothing => None,
        Below::Raw => Some("raw"),
        Below::Qcow2 => Some("qcow2"),
    };
    let options = CreateOptions {
        cluster_size: shape.cluster,
        version: shape.version,
        refcount_bits: shape.refcount_bits,
        compression_type: if shape.zstd {
            CompressionType::Zstd
        } else {
            CompressionType::Deflate
        },
        lazy_refcounts: shape.lazy,
        extended_l2: shape.extended,
        luks: luks_header(shape.luks)?,
        backing: format.map(|format| Backing {
            file: "below".into(),
            format: Some(format.to_owned()),
        }),
        data_file: (shape.data != Data::Inside).then(|| "data".into()),
        data_file_raw: shape.data == Data::RawFile,
        ..CreateOptions::new(size)
    };
    let new = options.build()?;
    let mut image = sim::Image::new();
    for (offset, bytes) in &new.chunks {
        // Most of a LUKS header is zeros.
        for (at, part) in (offset.0..).step_by(4096).zip(bytes.chunks(4096)) {
            if part.iter().any(|&b| b != 0) {
                image.write(at, part);
            }
        }
    }
    image.set_len(new.file_len.next_multiple_of(shape.cluster));
    let mut images = vec![image];
    if shape.data != Data::Inside {
        let mut data = sim::Image::new();
        data.set_len(size);
        images.push(data);
    }
    match shape.below {
        Below::Nothing => {}
        Below::Raw => images.push(sim::Image::from_bytes(&below_content(shape))),
        Below::Qcow2 => images.push(qcow2_below(shape)?),
    }
    Ok(images)
}

/// One header is made for all images: its keys are random, and nothing
/// depends on them.
fn luks_header(version: u8) -> Result<Option<Arc<[u8]>>> {
    static HEADERS: [OnceLock<Arc<[u8]>>; 2] = [OnceLock::new(), OnceLock::new()];
    if version == 0 {
        return Ok(None);
    }
    let place = &HEADERS[usize::from(version) - 1];
    if let Some(header) = place.get() {
        return Ok(Some(Arc::clone(header)));
    }
    let format = luks1::Format {
        // The least that the format allows.
        effort: Effort(Duration::ZERO),
        ..luks1::Format::default()
    };
    let bytes = match version {
        1 => format.make(PASSPHRASE)?,
        _ => luks2::make(&format, PASSPHRASE)?,
    };
    Ok(Some(Arc::clone(place.get_or_init(|| bytes.into()))))
}

/// An image below, partly compressed.
fn qcow2_below(shape: &Shape) -> Result<sim::Image> {
    thread_local! {
        static MADE: RefCell<HashMap<u64, sim::Image>> = RefCell::default();
    }
    if let Some(image) = MADE.with_borrow(|made| made.get(&shape.sectors).cloned()) {
        return Ok(image);
    }
    let content = below_content(shape);
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(content.len() as u64)
    };
    let new = options.build()?;
    let mut image = sim::Image::new();
    for (offset, bytes) in &new.chunks {
        image.write(offset.0, bytes);
    }
    image.set_len(new.file_len.next_multiple_of(4096));
    let disk = SimDisk::with_image(image);
    block_on(async {
        let storage = Storage::simulated(&disk, 1);
        let image = Image::open(storage, &ImageOptions::default()).await?;
        let engine = Engine::new(Chain::new(image, Vec::new()), engine::Options::default());
        // A few clusters: they are inflated for every state.
        let part = content.len().min(3 * 4096);
        engine
            .write_compressed(0, 0, &content[..part], None)
            .await?;
        lab::write(&engine, 0, part as u64, &content[part..], false).await?;
        engine.close().await
    })?;
    let image = disk.image();
    MADE.with_borrow_mut(|made| made.insert(shape.sectors, image.clone()));
    Ok(image)
}

/// Puts something on the disk: data, compressed clusters and zeros, or data
/// everywhere.
async fn fill(engine: &Engine, shape: &Shape) -> Result<()> {
    let mut rng = Rng::new(shape.fill);
    let sectors = shape.sectors;
    let cluster = shape.cluster / 512;
    let bytes = |at: u64, len: u64| -> Vec<u8> {
        (at..at + len).flat_map(|sector| stamp(0, sector)).collect()
    };
    if shape.full {
        return lab::write(engine, 0, 0, &bytes(0, sectors), false).await;
    }
    let mut at = rng.below(4) * cluster;
    while at < sectors {
        let len = (cluster * (1 + rng.below(3))).min(sectors - at);
        let offset = at * 512;
        match rng.below(6) {
            0..2 => lab::write(engine, 0, offset, &bytes(at, len), false).await?,
            2..4 => {
                let data = bytes(at, len);
                match engine.write_compressed(0, offset, &data, None).await {
                    Err(error) if is_refusal(&error) => {
                        lab::write(engine, 0, offset, &data, false).await?;
                    }
                    other => other?,
                }
            }
            4 => engine.write_zeroes(0, offset, len * 512, false).await?,
            _ => {}
        }
        at += len + rng.below(3) * cluster;
    }
    Ok(())
}

/// True for what the format, or we, do not do.
pub(crate) fn is_refusal(error: &Error) -> bool {
    use qcow2_ublk::ErrorKind::{NotFound, Unsupported, Usage};
    matches!(error.kind(), Unsupported | Usage | NotFound)
}
