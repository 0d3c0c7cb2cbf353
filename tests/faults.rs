//! P6: an error of the host becomes an errno for the request it hit; nothing
//! is dropped because its write failed; a failed fsync stays. Every operation
//! of some work fails once, in every way there is, and when the fault is gone
//! everything that was acknowledged is there.

mod common;

use common::check::Checked;
use common::lab::{self, Below, How};
use qcow2_ublk::ErrorKind;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::storage::sim::{self, Fault, Rng, SimDisk, SimKind, crash_images};

const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write { offset: u64, len: u64, byte: u8 },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
    Grow(u64),
}

/// One image and what is done to it.
struct Work {
    name: &'static str,
    image: sim::Image,
    how: How,
    steps: Vec<Step>,
    original: Vec<u8>,
    cluster: u64,
    zero_flag: bool,
}

impl Work {
    fn new(name: &'static str, image: sim::Image, below: &[u8], seed: u64) -> Self {
        let checked = Checked::open(&image).unwrap();
        let original = checked.active_content(below);
        let cluster = checked.header.cluster_size();
        let zero_flag = checked.header.version >= 3;
        let how = match below {
            [] => How::default(),
            below => How {
                below: Below::Raw(sim::Image::from_bytes(below)),
                ..How::default()
            },
        };
        let size = original.len() as u64;
        let mut rng = Rng::new(seed);
        let mut steps = Vec::new();
        for i in 0..14 {
            let offset = rng.below(size / 512) * 512;
            let largest = (size - offset).min(12 * cluster.max(4096));
            let len = (1 + rng.below(largest / 512)) * 512;
            steps.push(match rng.below(8) {
                0 => Step::Zero {
                    offset,
                    len,
                    unmap: rng.chance(1, 2),
                },
                1 | 2 => {
                    let start = offset.next_multiple_of(cluster).min(size);
                    let end = (offset + len).next_multiple_of(cluster).min(size);
                    Step::Discard {
                        offset: start,
                        len: end - start,
                    }
                }
                3 => Step::Flush,
                _ => Step::Write {
                    offset,
                    len,
                    byte: 0x41 + i,
                },
            });
            if i == 8 {
                steps.push(Step::Flush);
                steps.push(Step::Grow(size + size / 2 / 512 * 512));
            }
        }
        Self {
            name,
            image,
            how,
            steps,
            original,
            cluster,
            zero_flag,
        }
    }

    async fn begin(&self) -> (SimDisk, Engine) {
        let disk = SimDisk::with_image(self.image.clone());
        let engine = lab::open(&disk, &self.how).await.unwrap();
        (disk, engine)
    }

    /// Number of operations of the work when nothing fails.
    fn operations(&self) -> (u64, u64) {
        lab::block_on(async {
            let (disk, engine) = self.begin().await;
            let first = disk.operations();
            let mut model = Model::new(self);
            for &step in &self.steps {
                let result = model.run(&engine, step).await;
                assert!(result.is_ok(), "{}: {step:?}: {result:?}", self.name);
            }
            engine.flush().await.unwrap();
            let tables = |image: &sim::Image| {
                let checked = Checked::open(image).unwrap();
                checked.header.refcount_table_clusters
            };
            if self.name.contains("table that grows") {
                assert!(tables(&disk.image()) > tables(&self.image), "it does not");
            }
            (first, disk.operations())
        })
    }
}

/// The values each sector may have: one byte, repeated, or what it was.
struct Model {
    allowed: Vec<Vec<Option<u8>>>,
    original: Vec<u8>,
    size: u64,
    zero_flag: bool,
}

impl Model {
    fn new(work: &Work) -> Self {
        Self {
            allowed: vec![vec![None]; work.original.len() / SECTOR],
            original: work.original.clone(),
            size: work.original.len() as u64,
            zero_flag: work.zero_flag,
        }
    }

    /// Runs a step; what failed may have happened in part.
    async fn run(&mut self, engine: &Engine, step: Step) -> qcow2_ublk::Result<()> {
        let (result, offset, len, value) = match step {
            Step::Write { offset, len, byte } => {
                let bytes = vec![byte; len as usize];
                let result = lab::write(engine, 0, offset, &bytes, false).await;
                (result, offset, len, byte)
            }
            Step::Zero { offset, len, unmap } => {
                let result = engine.write_zeroes(0, offset, len, unmap).await;
                (result, offset, len, 0)
            }
            Step::Discard { offset, len } => (engine.discard(0, offset, len).await, offset, len, 0),
            Step::Flush => (engine.flush().await, 0, 0, 0),
            Step::Grow(size) => {
                let result = engine.grow(size).await;
                if result.is_ok() {
                    self.size = size;
                    self.original.resize(size as usize, 0);
                    self.allowed.resize(size as usize / SECTOR, vec![None]);
                }
                (result, 0, 0, 0)
            }
        };
        let sectors = offset as usize / SECTOR..(offset + len) as usize / SECTOR;
        // In version 2 a discard may leave what the layer below shows.
        let certain = self.zero_flag || !matches!(step, Step::Discard { .. });
        for sector in &mut self.allowed[sectors] {
            if result.is_ok() && certain {
                sector.clear();
            }
            sector.push(Some(value));
        }
        result
    }

    fn check(&self, content: &[u8], what: &str) {
        assert!(content.len() as u64 >= self.size, "{what}: too small");
        for (sector, values) in self.allowed.iter().enumerate() {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            let bytes = &content[range.clone()];
            let fits = values.iter().any(|value| match value {
                None => bytes == &self.original[range.clone()],
                Some(byte) => bytes.iter().all(|b| b == byte),
            });
            assert!(
                fits,
                "{what}: sector {sector} is none of {values:02x?}: {:02x?}",
                &bytes[..16]
            );
        }
    }
}

async fn content(image: sim::Image, how: &How) -> Vec<u8> {
    let engine = lab::open(&SimDisk::with_image(image), how).await.unwrap();
    lab::read(&engine, 0, 0, engine.size()).await.unwrap()
}

fn assert_sound(image: &sim::Image, what: &str) {
    let checked = Checked::open(image).unwrap_or_else(|e| panic!("{what}: {e}"));
    let found = checked.check();
    assert!(
        found.corruptions.is_empty(),
        "{what}: {:#?}",
        found.corruptions
    );
}

/// What the disk holds for certain when the power fails now.
fn durable(disk: &SimDisk) -> sim::Image {
    let history = disk.history();
    let end = history.records.len();
    crash_images(&history, 1, 0)
        .filter(|crash| crash.point == end)
        .nth(usize::from(!matches!(
            history.records.last().map(|r| &r.change),
            Some(sim::Change::Sync) | None
        )))
        .unwrap()
        .images
        .remove(0)
}

fn works() -> Vec<Work> {
    let text = |len, seed| common::half_random(len, seed);
    let mut snapshot = lab::converted(&text(96 << 10, 3), &["-o", "cluster_size=512"]);
    lab::with_file(&mut snapshot, |path| {
        common::qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    });
    let compressed = lab::converted(&text(256 << 10, 4), &["-c", "-o", "cluster_size=4096"]);
    let small = lab::created("cluster_size=512,refcount_bits=64", 160 << 10);
    let version_2 = lab::created("compat=0.10,cluster_size=4096", 256 << 10);
    let wide = lab::created("cluster_size=65536", 1 << 20);
    vec![
        Work::new("512-byte clusters", small.clone(), &[], 1),
        Work::new("512-byte clusters", small, &[], 2),
        Work::new("snapshot", snapshot, &[], 3),
        Work::new("compressed", compressed, &[], 4),
        Work::new("over a raw file", version_2, &text(200 << 10, 6), 5),
        Work::new("64K clusters", wide, &[], 6),
    ]
}

/// A work in which the refcount table grows.
fn table_grows() -> Work {
    // The refcount table is about to be full.
    let mut full = lab::created("cluster_size=512,refcount_bits=64", 2 << 20);
    lab::with_file(&mut full, |path| {
        common::qemu_io(path, &["write -P 0x33 0 1940k"]);
        common::qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    });
    Work::new("a refcount table that grows", full, &[], 7)
}

/// One fault at operation `at`; what the requests and the disk make of it.
fn one_fault(work: &Work, at: u64, fault: Fault) {
    let mut what = format!("{}: {fault:?} at operation {at}", work.name);
    let (disk, failed) = lab::block_on(async {
        let (disk, engine) = work.begin().await;
        let mut hit_sync = false;
        let (told, heard) = std::sync::mpsc::channel();
        disk.inject(move |request| {
            (request.number == at).then(|| {
                let _ = told.send((request.kind, request.offset));
                fault
            })
        });
        let mut model = Model::new(work);
        let mut errors = Vec::new();
        for &step in &work.steps {
            let result = model.run(&engine, step).await;
            if let Ok((kind, offset)) = heard.try_recv() {
                what = format!("{what} ({kind:?} at {offset:#x} in {step:?})");
                hit_sync |= kind == SimKind::Sync && matches!(fault, Fault::Errno(_));
            }
            if let Err(error) = result {
                errors.push((step, error));
            }
            // Reads go on, whatever happened, unless the fault is theirs.
            if let Step::Write { offset, len, .. } = step {
                let seen = lab::read(&engine, 0, offset, len).await;
                let ours = heard.try_recv().is_ok();
                assert!(seen.is_ok() || ours, "{what}: a read failed: {seen:?}");
            }
        }
        disk.clear_faults();
        let errno = match fault {
            Fault::Errno(errno) | Fault::Partial { errno, .. } => errno,
            _ => 0,
        };
        let harmless = matches!(fault, Fault::Short(_)) || errno == libc::EINTR;
        if harmless {
            assert!(errors.is_empty(), "{what}: {errors:?}");
        }
        let seen = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
        model.check(&seen, &format!("{what}: as it reads"));
        if hit_sync && !harmless {
            assert!(!errors.is_empty(), "{what}: nobody was told");
            let result = lab::write(&engine, 0, 0, &[1; 512], false).await;
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Latched, "{what}");
            assert_eq!(
                engine.flush().await.unwrap_err().kind(),
                ErrorKind::Latched,
                "{what}"
            );
            let Err(error) = engine.discard(0, 0, work.cluster).await else {
                panic!("{what}: a discard after a failed sync");
            };
            assert_eq!(error.kind(), ErrorKind::Latched, "{what}");
            let after = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
            assert!(after == seen, "{what}: reads changed");
            return (disk, true);
        }
        for (step, error) in &errors {
            assert_eq!(error.errno(), errno, "{what}: {step:?}: {error:?}");
        }
        assert!(
            errors.len() <= 1,
            "{what}: more than one failed: {errors:?}"
        );
        // The fault is over: all that was acknowledged becomes durable.
        engine
            .flush()
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let safe = durable(&disk);
        assert_sound(&safe, &format!("{what}: after the flush"));
        model.check(
            &content(safe, &work.how).await,
            &format!("{what}: after the flush"),
        );
        engine
            .close()
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let closed = disk.image();
        assert_sound(&closed, &format!("{what}: closed"));
        model.check(
            &content(closed, &work.how).await,
            &format!("{what}: closed"),
        );
        (disk, !errors.is_empty())
    });
    // And the power may fail on top of it.
    let stride = if work.original.len() > 1 << 20 { 30 } else { 5 };
    if failed && at.is_multiple_of(stride) {
        for crash in crash_images(&disk.history(), at, 1) {
            assert_sound(&crash.images[0], &format!("{what}; {crash}"));
        }
    }
}

fn every_operation(works: &[Work], runs: u64, faults: &[Fault]) {
    for work in works {
        let (first, end) = work.operations();
        eprintln!("{}: {} operations", work.name, end - first);
        // In a bounded number of runs.
        let stride = ((end - first) * faults.len() as u64).div_ceil(runs);
        let mut turn = 0;
        for at in first..end {
            for &fault in faults {
                turn += 1;
                if turn % stride == 0 {
                    one_fault(work, at, fault);
                }
            }
        }
    }
}

#[test]
fn an_error_at_every_operation() {
    lab::watched(120, || {
        every_operation(
            &works(),
            250,
            &[Fault::Errno(libc::EIO), Fault::Errno(libc::ENOSPC)],
        );
    });
}

#[test]
fn a_write_that_fails_half_way_at_every_operation() {
    lab::watched(120, || {
        every_operation(
            &works(),
            250,
            &[
                Fault::Partial {
                    stored: 512,
                    errno: libc::EIO,
                },
                Fault::Partial {
                    stored: 1 << 20,
                    errno: libc::EIO,
                },
            ],
        );
    });
}

#[test]
fn an_error_while_the_refcount_table_grows() {
    let stored = Fault::Partial {
        stored: 1 << 20,
        errno: libc::EIO,
    };
    lab::watched(120, || {
        every_operation(&[table_grows()], 70, &[stored, Fault::Errno(libc::EIO)]);
    });
}

#[test]
fn short_and_interrupted_transfers_are_nobodys_business() {
    lab::watched(120, || {
        every_operation(
            &works(),
            250,
            &[
                Fault::Errno(libc::EINTR),
                Fault::Short(1),
                Fault::Short(700),
            ],
        );
    });
}

#[test]
fn every_transfer_short_and_every_other_operation_interrupted() {
    lab::watched(120, || {
        for work in &works() {
            lab::block_on(async {
                let (disk, engine) = work.begin().await;
                let mut rng = Rng::new(8);
                disk.inject(move |request| match request.kind {
                    _ if request.number.is_multiple_of(2) => Some(Fault::Errno(libc::EINTR)),
                    SimKind::Read | SimKind::Write => Some(Fault::Short(1 + rng.below(1500))),
                    _ => None,
                });
                let mut model = Model::new(work);
                for &step in &work.steps {
                    let result = model.run(&engine, step).await;
                    assert!(result.is_ok(), "{}: {step:?}: {result:?}", work.name);
                }
                engine.close().await.unwrap();
                disk.clear_faults();
                assert_sound(&disk.image(), work.name);
                model.check(&content(disk.image(), &work.how).await, work.name);
            });
        }
    });
}

/// The disk fails for a while: every operation from one on, until it is well
/// again.
#[test]
fn everything_fails_for_a_while() {
    lab::watched(120, || {
        for work in &works() {
            let (first, end) = work.operations();
            for (turn, at) in (first..end).step_by(7).enumerate() {
                let errno = [libc::EIO, libc::ENOSPC][turn % 2];
                let what = format!("{}: everything fails from {at} on", work.name);
                lab::block_on(async {
                    let (disk, engine) = work.begin().await;
                    disk.inject(move |request| {
                        let bad = (at..at + 40).contains(&request.number);
                        let spared = matches!(request.kind, SimKind::Sync | SimKind::Read);
                        (bad && !spared).then_some(Fault::Errno(errno))
                    });
                    let mut model = Model::new(work);
                    for &step in &work.steps {
                        if let Err(error) = model.run(&engine, step).await {
                            assert_eq!(error.errno(), errno, "{what}: {step:?}: {error:?}");
                        }
                    }
                    disk.clear_faults();
                    let seen = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
                    model.check(&seen, &format!("{what}: as it reads"));
                    engine.flush().await.unwrap();
                    let safe = durable(&disk);
                    assert_sound(&safe, &what);
                    model.check(&content(safe, &work.how).await, &what);
                    engine.close().await.unwrap();
                    assert_sound(&disk.image(), &what);
                    model.check(&content(disk.image(), &work.how).await, &what);
                });
            }
        }
    });
}

/// Row 20: the file system fills up in the middle of an allocation. At most
/// leaks, old data intact; and with space again, all goes on.
#[test]
fn row_20_enospc_in_mid_allocation() {
    lab::watched(120, || {
        for work in &works() {
            for room in (0..48).map(|n| n * 4096) {
                let what = format!("{}: {room} bytes left", work.name);
                lab::block_on(async {
                    let (disk, engine) = work.begin().await;
                    disk.set_capacity(work.image.allocated() + room);
                    let mut model = Model::new(work);
                    for &step in &work.steps {
                        if let Err(error) = model.run(&engine, step).await {
                            assert_eq!(error.errno(), libc::ENOSPC, "{what}: {step:?}: {error:?}");
                            assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}");
                        }
                    }
                    let seen = lab::read(&engine, 0, 0, engine.size()).await.unwrap();
                    model.check(&seen, &format!("{what}: as it reads"));
                    assert_sound(&durable(&disk), &format!("{what}: full"));
                    disk.set_capacity(u64::MAX);
                    engine.close().await.unwrap();
                    assert_sound(&disk.image(), &what);
                    model.check(&content(disk.image(), &work.how).await, &what);
                });
            }
        }
    });
}

/// T11: the failed write of an L2 table is reported once, and the next flush
/// really writes it.
#[test]
fn t11_a_failed_metadata_write_stays_dirty() {
    let image = lab::created("cluster_size=65536", 8 << 20);
    lab::block_on(async {
        let disk = SimDisk::with_image(image);
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        lab::write(&engine, 0, 0, &[0x77; 4096], false)
            .await
            .unwrap();
        // Every operation of the flush in turn.
        for at in 0.. {
            let before = disk.operations();
            disk.fail_nth(at, libc::EIO);
            // A sync that fails is another matter.
            let kinds = disk.clone();
            let number = before + at;
            let syncs = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            let seen = std::sync::Arc::clone(&syncs);
            kinds.clear_faults();
            kinds.inject(move |request| {
                if request.number != number {
                    return None;
                }
                if request.kind == SimKind::Sync {
                    seen.store(true, std::sync::atomic::Ordering::SeqCst);
                    return None;
                }
                Some(Fault::Errno(libc::EIO))
            });
            let result = engine.flush().await;
            if disk.operations() <= number {
                break;
            }
            if !syncs.load(std::sync::atomic::Ordering::SeqCst) {
                assert_eq!(lab::errno(&result), Some(libc::EIO), "operation {at}");
            }
            engine.flush().await.unwrap();
            let safe = durable(&disk);
            assert_sound(&safe, "after the second flush");
            let content = content(safe, &How::default()).await;
            assert!(content[..4096].iter().all(|&b| b == 0x77), "operation {at}");
            // Something to flush for the next round.
            lab::write(&engine, 0, (at + 1) << 16, &[0x78; 4096], false)
                .await
                .unwrap();
        }
    });
}
