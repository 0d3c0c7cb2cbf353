//! Images of every kind there is, drawn at random, and ways to open them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::{convert, name};
use crate::common::{half_random, lab, qemu_img};
use qcow2_ublk::block::BlockHandler;
use qcow2_ublk::chain;
use qcow2_ublk::codec::CompressionType;
use qcow2_ublk::crypto::{Effort, Secret, luks1, luks2};
use qcow2_ublk::engine::{self, DetectZeroes, Engine};
use qcow2_ublk::qcow2::create::{Backing, CreateOptions, Preallocation};
use qcow2_ublk::qcow2::{Barrier, ImageOptions, OverlapCheck};
use qcow2_ublk::runtime::Runtime;
use qcow2_ublk::storage::CacheMode;
use qcow2_ublk::storage::sim::Rng;

const PASSPHRASE: &[u8] = b"a model";

/// Where guest data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Inside,
    File,
    RawFile,
}

/// What lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    Raw,
    Qcow2,
}

#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) version: u8,
    pub(crate) cluster: u64,
    pub(crate) sectors: u64,
    pub(crate) refcount_bits: u64,
    pub(crate) extended: bool,
    pub(crate) lazy: bool,
    pub(crate) zstd: bool,
    pub(crate) data: Data,
    /// Version of LUKS, or 0.
    pub(crate) luks: u8,
    pub(crate) below: Below,
    pub(crate) below_sectors: u64,
    pub(crate) space: Preallocation,
    /// qemu-img makes it.
    pub(crate) by_qemu: bool,
}

pub(crate) fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.below(of.len() as u64) as usize]
}

impl Shape {
    pub(crate) fn random(rng: &mut Rng) -> Self {
        let extended = rng.chance(1, 3);
        let cluster = if extended {
            pick(rng, &[16384, 16384, 32768, 65536, 65536, 131_072, 2 << 20])
        } else {
            pick(
                rng,
                &[512, 512, 1024, 4096, 4096, 16384, 65536, 65536, 2 << 20],
            )
        };
        let sectors = match cluster {
            ..4096 => 100 + rng.below(1200),
            4096 => 200 + rng.below(2000),
            4097..131_072 => 500 + rng.below(3500),
            _ => 5000 + rng.below(6000),
        };
        let below_sectors = match rng.below(3) {
            0 => sectors,
            1 => sectors + rng.below(500),
            _ => 1 + rng.below(sectors),
        };
        let data = match rng.below(6) {
            0 => Data::File,
            1 => Data::RawFile,
            _ => Data::Inside,
        };
        Self {
            version: if rng.chance(1, 6) { 2 } else { 3 },
            cluster,
            sectors,
            refcount_bits: pick(rng, &[1, 2, 4, 8, 16, 16, 16, 16, 32, 64]),
            extended,
            lazy: rng.chance(1, 4),
            zstd: rng.chance(1, 3),
            data,
            luks: pick(rng, &[0, 0, 0, 0, 1, 1, 2]),
            below: pick(
                rng,
                &[Below::Nothing, Below::Nothing, Below::Raw, Below::Qcow2],
            ),
            below_sectors,
            space: match rng.below(9) {
                0 => Preallocation::Metadata,
                1 => Preallocation::Falloc,
                2 => Preallocation::Full,
                _ => Preallocation::Off,
            },
            by_qemu: rng.chance(1, 3),
        }
        .made_valid()
    }

    /// Without what does not go together.
    fn made_valid(mut self) -> Self {
        if self.version == 2 {
            self.refcount_bits = 16;
            (self.extended, self.lazy, self.zstd) = (false, false, false);
            self.data = Data::Inside;
        }
        if self.data != Data::Inside {
            self.luks = 0;
        }
        if self.data == Data::RawFile {
            self.below = Below::Nothing;
        }
        if self.luks != 0 {
            self.by_qemu = false;
        }
        if self.below != Below::Nothing || self.luks != 0 {
            self.space = Preallocation::Off;
        }
        self
    }

    pub(crate) fn can_compress(&self) -> bool {
        self.luks == 0 && self.data == Data::Inside
    }

    pub(crate) fn can_have_snapshots(&self) -> bool {
        self.data == Data::Inside
    }

    /// QEMU opens it.
    pub(crate) fn is_qemus(&self) -> bool {
        self.luks != 2
    }

    pub(crate) fn data_path(&self, path: &Path) -> Option<PathBuf> {
        (self.data != Data::Inside).then(|| path.with_file_name("data"))
    }

    /// Makes the image, and what is below; what it shows.
    pub(crate) fn create(&self, path: &Path, seed: u64) -> Vec<u8> {
        let mut content = vec![0; (self.sectors * 512) as usize];
        if self.below != Below::Nothing {
            let mut below = half_random((self.below_sectors * 512) as usize, seed);
            let zeros = below.len() / 4..below.len() / 3;
            below[zeros].fill(0);
            let place = path.with_file_name("below");
            match self.below {
                Below::Raw => std::fs::write(place, &below).unwrap(),
                _ => convert(&below, &place, &["-O", "qcow2", "-c"]),
            }
            let len = below.len().min(content.len());
            content[..len].copy_from_slice(&below[..len]);
        }
        if self.by_qemu {
            self.create_by_qemu(path);
        } else {
            self.create_by_us(path);
        }
        content
    }

    fn below_format(&self) -> &'static str {
        match self.below {
            Below::Raw => "raw",
            _ => "qcow2",
        }
    }

    fn create_by_us(&self, path: &Path) {
        let options = CreateOptions {
            cluster_size: self.cluster,
            version: self.version,
            refcount_bits: self.refcount_bits,
            compression_type: if self.zstd {
                CompressionType::Zstd
            } else {
                CompressionType::Deflate
            },
            lazy_refcounts: self.lazy,
            extended_l2: self.extended,
            preallocation: self.space,
            luks: luks_header(self.luks),
            backing: (self.below != Below::Nothing).then(|| Backing {
                file: "below".into(),
                format: Some(self.below_format().to_owned()),
            }),
            // QEMU looks for a relative one where it is itself.
            data_file: self.data_path(path).map(PathBuf::into_os_string),
            data_file_raw: self.data == Data::RawFile,
            ..CreateOptions::new(self.sectors * 512)
        };
        lab::block_on(chain::create(path, &options)).unwrap();
    }

    fn create_by_qemu(&self, path: &Path) {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = format!("compat={compat},cluster_size={}", self.cluster);
        if self.version == 3 {
            options += &format!(
                ",refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={}",
                self.refcount_bits,
                on(self.extended),
                on(self.lazy),
                if self.zstd { "zstd" } else { "zlib" }
            );
        }
        options += match self.space {
            Preallocation::Off => "",
            Preallocation::Metadata => ",preallocation=metadata",
            Preallocation::Falloc => ",preallocation=falloc",
            Preallocation::Full => ",preallocation=full",
        };
        if let Some(data) = self.data_path(path) {
            let raw = on(self.data == Data::RawFile);
            options += &format!(",data_file={},data_file_raw={raw}", data.display());
        }
        if self.below != Below::Nothing {
            options += &format!(",backing_file=below,backing_fmt={}", self.below_format());
        }
        let size = (self.sectors * 512).to_string();
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            name(path),
            &size,
        ];
        qemu_img(&args);
    }

    /// The image as QEMU's programs take it: options, and a name.
    pub(crate) fn for_qemu(&self, path: &Path) -> (Vec<String>, String) {
        let path = name(path);
        if self.luks == 0 {
            return (vec!["-f".to_owned(), "qcow2".to_owned()], path.to_owned());
        }
        let passphrase = String::from_utf8_lossy(PASSPHRASE);
        let options = [
            "--object".to_owned(),
            format!("secret,id=s,data={passphrase}"),
            "--image-opts".to_owned(),
        ];
        let image =
            format!("driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={path}");
        (options.into(), image)
    }
}

fn on(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// One header is made for all images: nothing depends on its keys.
fn luks_header(version: u8) -> Option<Arc<[u8]>> {
    static HEADERS: [OnceLock<Arc<[u8]>>; 2] = [OnceLock::new(), OnceLock::new()];
    let place = &HEADERS[usize::from(version.checked_sub(1)?)];
    let make = || {
        let format = luks1::Format {
            // The least that the format allows.
            effort: Effort(Duration::ZERO),
            ..luks1::Format::default()
        };
        match version {
            1 => format.make(PASSPHRASE).unwrap().into(),
            _ => luks2::make(&format, PASSPHRASE).unwrap().into(),
        }
    };
    Some(Arc::clone(place.get_or_init(make)))
}

/// How an image is opened and worked with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) ring: bool,
    direct: bool,
    l2_cache: u64,
    pub(crate) queues: u16,
    barrier: Barrier,
    punch: bool,
    discard: bool,
    detect: DetectZeroes,
    overlap_check: OverlapCheck,
}

impl Way {
    pub(crate) fn random(rng: &mut Rng) -> Self {
        Self {
            ring: rng.chance(1, 2),
            direct: rng.chance(1, 3),
            l2_cache: pick(rng, &[0, 64 << 10, 32 << 20]),
            queues: 1 + rng.below(3) as u16,
            barrier: pick(
                rng,
                &[
                    Barrier::Batched,
                    Barrier::Batched,
                    Barrier::Metadata,
                    Barrier::Full,
                    Barrier::None,
                ],
            ),
            punch: rng.chance(2, 3),
            discard: rng.chance(5, 6),
            detect: pick(
                rng,
                &[DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap],
            ),
            overlap_check: pick(
                rng,
                &[
                    OverlapCheck::None,
                    OverlapCheck::Constant,
                    OverlapCheck::Cached,
                    OverlapCheck::All,
                ],
            ),
        }
    }

    /// Discards are recorded as changes, because they may be some.
    pub(crate) fn discards(self) -> bool {
        self.discard
    }

    pub(crate) fn runtime(self) -> Runtime {
        if self.ring {
            Runtime::uring(32).unwrap()
        } else {
            Runtime::inline().unwrap()
        }
    }

    pub(crate) fn options(self, writable: bool) -> chain::Options {
        chain::Options {
            writable,
            cache: if self.direct {
                CacheMode::None
            } else {
                CacheMode::Writeback
            },
            image: ImageOptions {
                queues: self.queues.into(),
                l2_cache: self.l2_cache,
                punch: self.punch,
                keys: Some(Arc::new(Secret::new(PASSPHRASE.to_vec()))),
                overlap_check: self.overlap_check,
                barrier: self.barrier,
                ..ImageOptions::default()
            },
            ..chain::Options::default()
        }
    }

    pub(crate) async fn open(self, path: &Path) -> Arc<Engine> {
        let chain = chain::open(path, &self.options(true)).await.unwrap();
        let options = engine::Options {
            discard: self.discard,
            detect_zeroes: self.detect,
            ..engine::Options::default()
        };
        let engine = Engine::new(chain, options);
        engine.queue_started(0).unwrap();
        Arc::new(engine)
    }
}
