//! The engine over simulated disks.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use qcow2_ublk::block::{BlockHandler, Op, Payload, Request};
use qcow2_ublk::chain::{Chain, Layer};
use qcow2_ublk::crypto::Keyring;
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::{Barrier, Image, ImageOptions, OverlapCheck};
use qcow2_ublk::runtime::Runtime;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk};
use qcow2_ublk::{Result, error::Error};

/// What is below the image.
#[derive(Clone, Default)]
pub enum Below {
    #[default]
    Nothing,
    Raw(sim::Image),
    Qcow2(sim::Image),
    /// Files of the image's own machine: images, top first, and a raw one.
    Disks(Vec<SimDisk>, Option<SimDisk>),
}

/// How an image is opened.
#[derive(Clone)]
pub struct How {
    pub below: Below,
    /// The disk with the image's external data file.
    pub data: Option<SimDisk>,
    pub alignment: u32,
    pub queues: usize,
    pub punch: bool,
    pub barrier: Barrier,
    pub overlap_check: OverlapCheck,
    pub keys: Option<Arc<dyn Keyring>>,
}

impl Default for How {
    fn default() -> Self {
        Self {
            below: Below::Nothing,
            data: None,
            alignment: 1,
            queues: 1,
            punch: true,
            barrier: Barrier::default(),
            overlap_check: OverlapCheck::default(),
            keys: None,
        }
    }
}

/// Opens the engine over the image on `disk`.
pub async fn open(disk: &SimDisk, how: &How) -> Result<Engine> {
    let options = ImageOptions {
        queues: how.queues,
        punch: how.punch,
        barrier: how.barrier,
        overlap_check: how.overlap_check,
        keys: how.keys.clone(),
        ..ImageOptions::default()
    };
    let data = how
        .data
        .as_ref()
        .map(|data| Storage::simulated(data, how.alignment));
    let storage = Storage::simulated(disk, how.alignment);
    let image = Image::open_with_data(storage, data, &options).await?;
    let image = image.repaired(&options).await?;
    let storage = |image: &sim::Image| Storage::simulated(&SimDisk::with_image(image.clone()), 1);
    let below = match &how.below {
        Below::Nothing => Vec::new(),
        Below::Raw(image) => vec![Layer::Raw(storage(image))],
        Below::Qcow2(image) => {
            let image = Image::open(storage(image), &ImageOptions::default()).await?;
            vec![Layer::Qcow2(Box::new(image))]
        }
        Below::Disks(images, raw) => {
            let mut layers = Vec::new();
            for disk in images {
                let storage = Storage::simulated(disk, how.alignment);
                let image = Image::open(storage, &ImageOptions::default()).await?;
                layers.push(Layer::Qcow2(Box::new(image)));
            }
            let raw = raw.as_ref().map(|disk| Storage::simulated(disk, 1));
            layers.extend(raw.map(Layer::Raw));
            layers
        }
    };
    let options = engine::Options {
        request_unit: 512,
        ..engine::Options::default()
    };
    Ok(Engine::new(Chain::new(image, below), options))
}

pub fn block_on<F: Future>(future: F) -> F::Output {
    Runtime::inline().unwrap().block_on(future)
}

/// Reads `len` bytes at `offset`.
pub async fn read(engine: &Engine, queue: u16, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    read_into(engine, queue, offset, &mut bytes).await?;
    Ok(bytes)
}

/// Fills `bytes`, which hold something else at first, from `offset` on.
pub async fn read_into(engine: &Engine, queue: u16, offset: u64, bytes: &mut [u8]) -> Result<()> {
    bytes.fill(0xee);
    // SAFETY: `bytes` is borrowed, untouched, until the read is complete.
    let payload = unsafe { Payload::memory(bytes.as_mut_ptr(), bytes.len() as u64) };
    engine.read(queue, offset, payload).await
}

/// Writes `bytes` at `offset`.
pub async fn write(
    engine: &Engine,
    queue: u16,
    offset: u64,
    bytes: &[u8],
    fua: bool,
) -> Result<()> {
    let len = bytes.len() as u64;
    // SAFETY: `bytes` is borrowed until the write is complete, which only
    // reads it.
    let payload = unsafe { Payload::memory(bytes.as_ptr().cast_mut(), len) };
    let request = Request {
        op: Op::Write { fua },
        offset,
        len,
        payload,
    };
    engine.handle(queue, request).await
}

/// An image made by `qemu-img create`, `options` after `-o`.
pub fn created(options: &str, size: u64) -> sim::Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path.to_str().unwrap(), &size]);
    super::qemu_img(&args);
    sim::Image::load(&path).unwrap()
}

/// An image that `qemu-img convert` makes of `content`; `arguments` come
/// before the names.
pub fn converted(content: &[u8], arguments: &[&str]) -> sim::Image {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("a.qcow2"));
    std::fs::write(&raw, content).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    args.extend(arguments);
    args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    super::qemu_img(&args);
    sim::Image::load(&path).unwrap()
}

/// Lets QEMU's programs work on a simulated image, in a file.
pub fn with_file(image: &mut sim::Image, work: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image.save(&path).unwrap();
    work(&path);
    *image = sim::Image::load(&path).unwrap();
}

/// Asserts that `qemu-img check` finds no corruption; leaks only if allowed.
pub fn qemu_check(path: &Path, leaks_allowed: bool) {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(path)
        .output()
        .expect("run qemu-img");
    let code = output.status.code();
    assert!(
        code == Some(0) || code == Some(3) && leaks_allowed,
        "qemu-img check: {code:?} {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Fails the test program when `work` takes too long: nothing may hang.
pub fn watched<T>(seconds: u64, work: impl FnOnce() -> T) -> T {
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    std::thread::spawn(move || {
        let late = std::sync::mpsc::RecvTimeoutError::Timeout;
        if waiting.recv_timeout(Duration::from_secs(seconds)) == Err(late) {
            eprintln!("{name} hangs");
            std::process::abort();
        }
    });
    let result = work();
    drop(done);
    result
}

/// The errno of a failed request.
pub fn errno<T>(result: &Result<T>) -> Option<i32> {
    result.as_ref().err().map(Error::errno)
}

/// A shared engine, for tasks.
pub type Shared = Arc<Engine>;
