//! Judges what a power cut left.

use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::check::{self, Repair};
use qcow2_ublk::qcow2::spec::header::Incompatible;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, Crash, Rng};

use super::case::Case;
use super::common::check::Checked;
use super::common::lab;
use super::machine::{self, Disks, block_on};
use super::model::{Log, Taken, Value, World, stamp};
use super::run::{Ran, text};
use super::shape::{Below, Data, Shape};
use super::{Verdict, bitmaps, ensure};

/// A world, and the values that each of its sectors may have.
type Allowed<'a> = (&'a World, Vec<Vec<Value>>);

/// A history and what is found out about it once.
pub(crate) struct Judge<'a> {
    case: &'a Case,
    ran: &'a Ran,
    /// What sectors may hold at the point that was asked for last, for each
    /// world that may be there.
    allowed: (usize, Vec<Allowed<'a>>),
}

/// What a state turned out to be.
pub(crate) struct Found {
    /// All that its disk shows.
    pub(crate) content: Vec<u8>,
    /// It was marked dirty.
    pub(crate) dirty: bool,
}

impl<'a> Judge<'a> {
    pub(crate) fn new(case: &'a Case, ran: &'a Ran) -> Self {
        Self {
            case,
            ran,
            allowed: (usize::MAX, Vec::new()),
        }
    }

    /// Judges a state; `seed` decides what is done with it afterwards.
    pub(crate) fn judge(&mut self, crash: &Crash, seed: u64) -> Verdict<Found> {
        let (log, point) = (&self.ran.log, crash.point);
        if self.allowed.0 != point {
            let worlds = log.worlds_at(point);
            let allowed = worlds.map(|world| (world, log.allowed(world, point)));
            self.allowed = (point, allowed.collect());
        }
        block_on(self.judge_state(crash, seed))
    }

    async fn judge_state(&self, crash: &Crash, seed: u64) -> Verdict<Found> {
        let (shape, log) = (&self.case.shape, &self.ran.log);
        let images = &crash.images;
        let checked = Checked::open(&images[0]).map_err(|e| format!("it does not open: {e}"))?;
        let dirty = checked.header.incompatible.contains(Incompatible::DIRTY);
        if !dirty {
            sound(&checked)?;
        }
        let below = below_bytes(shape, images, self.ran.committed)?;
        let taken = snapshots(&checked, &below)?;

        let disks = Disks::with(shape, images);
        let mut rng = Rng::new(seed);
        let early_repair = rng.chance(1, 2);
        if early_repair && !dirty {
            repair_leaks(&disks).await?;
        }
        let opened = machine::open(&disks, shape).await;
        let engine = opened.map_err(|e| format!("it does not open: {e}"))?;
        if dirty || early_repair {
            let image = disks.image.image();
            let checked = Checked::open(&image)?;
            let leaks = sound(&checked)?;
            ensure!(leaks == 0, "{leaks} clusters leak after the repair");
            ensure!(
                snapshots(&checked, &below)? == taken,
                "snapshots have changed with the repair"
            );
        }
        let content = machine::read_all(&engine).await.map_err(text)?;
        if shape.data == Data::RawFile {
            let raw = images[1].bytes(0, content.len() as u64);
            ensure!(raw == content, "the raw file is not the disk");
        }
        let mut reasons = Vec::new();
        for (world, allowed) in &self.allowed.1 {
            let verdict = async {
                same_snapshots(&taken, world)?;
                fits(log, &content, allowed)?;
                bitmaps::judge(&checked, &engine, log, world, crash.point, &content).await
            };
            match verdict.await {
                Ok(()) => {
                    reasons.clear();
                    break;
                }
                Err(reason) => reasons.push(reason),
            }
        }
        ensure!(reasons.is_empty(), "{}", reasons.join("; or: "));
        let later = goes_on(&engine, &content, shape, &mut rng).await;
        let later = later.map_err(|e| format!("after the power cut: {e}"))?;
        drop(engine);
        self.look_again(&disks, &taken, &later).await?;
        Ok(Found { content, dirty })
    }

    /// After more work, a clean close and the repair of what leaks.
    async fn look_again(&self, disks: &Disks, taken: &[Stored], later: &[u8]) -> Verdict {
        let shape = &self.case.shape;
        let images = disks.images();
        let checked = Checked::open(&images[0])?;
        let leaks = sound(&checked).map_err(|e| format!("after more work: {e}"))?;
        let below = below_bytes(shape, &images, self.ran.committed)?;
        ensure!(
            snapshots(&checked, &below)? == taken,
            "more work has changed a snapshot"
        );
        if shape.luks == 0 {
            let checked = checked.with_data(disks.data.is_some().then(|| &images[1]));
            let content = checked.active_content(&below);
            if let Some(at) = differs(&content, later) {
                return Err(format!(
                    "after more work sector {at} reads as something else"
                ));
            }
        }
        if leaks > 0 {
            repair_leaks(disks).await?;
            let image = disks.image.image();
            let leaks = sound(&Checked::open(&image)?)?;
            ensure!(leaks == 0, "{leaks} clusters leak after their repair");
        }
        Ok(())
    }
}

/// The first sector in which two disks differ.
fn differs(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    let sectors = a.chunks(512).zip(b.chunks(512));
    Some(sectors.take_while(|(a, b)| a == b).count())
}

/// At most leaks; how many.
fn sound(checked: &Checked<'_>) -> Verdict<u64> {
    let found = checked.check();
    ensure!(
        found.corruptions.is_empty(),
        "{} corruptions: {}",
        found.corruptions.len(),
        found.corruptions[0]
    );
    Ok(found.leaks_in_file)
}

async fn repair_leaks(disks: &Disks) -> Verdict {
    let storage = Storage::simulated(&disks.image, 1);
    let repaired = check::repair(&storage, Repair::Leaks, &mut |_| {}).await;
    let report = repaired
        .map_err(|e| format!("cannot be repaired: {e}"))?
        .report;
    ensure!(
        (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0),
        "after a repair of leaks: {report:?}"
    );
    Ok(())
}

/// Whether the disk holds what it may.
pub(crate) fn fits(log: &Log, content: &[u8], allowed: &[Vec<Value>]) -> Verdict {
    ensure!(
        content.len() == allowed.len() * 512,
        "the disk has {} sectors, not {}",
        content.len() / 512,
        allowed.len()
    );
    for (sector, (bytes, values)) in content.chunks_exact(512).zip(allowed).enumerate() {
        let fits = values
            .iter()
            .any(|&value| log.is(bytes, sector as u64, value));
        ensure!(
            fits,
            "sector {sector} is none of {values:?}: it is {}",
            what_is(bytes)
        );
    }
    Ok(())
}

fn what_is(bytes: &[u8]) -> String {
    if bytes.iter().all(|&b| b == 0) {
        return "zeros".to_owned();
    }
    let word = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let (id, sector) = ((word >> 32) as u32 & !(1 << 31), word >> 8 & 0xff_ffff);
    if bytes == stamp(id, sector) {
        return format!("stamp {id} of sector {sector}");
    }
    format!("{:02x?}...", &bytes[..16])
}

/// A snapshot in the file.
type Stored = (String, Vec<u8>);

fn snapshots(checked: &Checked<'_>, below: &[u8]) -> Verdict<Vec<Stored>> {
    let table = checked.snapshots();
    Ok(table
        .iter()
        .enumerate()
        .map(|(index, snapshot)| {
            let name = String::from_utf8_lossy(&snapshot.name).into_owned();
            (name, checked.snapshot_content(index, below))
        })
        .collect())
}

fn same_snapshots(found: &[Stored], world: &World) -> Verdict {
    let names = |found: Vec<&str>| found.join(", ");
    ensure!(
        found.len() == world.snapshots.len(),
        "the snapshots are [{}] and not [{}]",
        names(found.iter().map(|(name, _)| &**name).collect()),
        names(world.snapshots.iter().map(|taken| &*taken.name).collect())
    );
    for (
        (name, content),
        Taken {
            name: wanted,
            content: shown,
            ..
        },
    ) in found.iter().zip(&*world.snapshots)
    {
        ensure!(
            name == wanted,
            "there is a snapshot {name} and not {wanted}"
        );
        ensure!(
            content == &**shown,
            "snapshot {name} shows something else in sector {:?}",
            differs(content, shown)
        );
    }
    Ok(())
}

/// What the layer below shows.
pub(crate) fn below_bytes(
    shape: &Shape,
    images: &[sim::Image],
    committed: bool,
) -> Verdict<Vec<u8>> {
    let Some(image) = images.last().filter(|_| shape.below != Below::Nothing) else {
        return Ok(Vec::new());
    };
    if !committed {
        return Ok(machine::below_content(shape));
    }
    if shape.below == Below::Raw {
        return Ok(image.bytes(0, image.len()));
    }
    let checked = Checked::open(image).map_err(|e| format!("the layer below: {e}"))?;
    sound(&checked).map_err(|e| format!("the layer below: {e}"))?;
    Ok(checked.active_content(&[]))
}

/// Life goes on with the image: some writes, which can be read, and a clean
/// close. What the disk shows then.
async fn goes_on(
    engine: &Engine,
    content: &[u8],
    shape: &Shape,
    rng: &mut Rng,
) -> Verdict<Vec<u8>> {
    let mut wanted = content.to_vec();
    let sectors = content.len() as u64 / 512;
    if sectors == 0 {
        engine.close().await.map_err(text)?;
        return Ok(wanted);
    }
    let cluster = shape.cluster / 512;
    for turn in 0..3_u32 {
        let at = rng.below(sectors);
        let len = (1 + rng.below(cluster + 4)).min(sectors - at);
        let bytes = &mut wanted[(at * 512) as usize..((at + len) * 512) as usize];
        let done = if turn == 2 {
            bytes.fill(0);
            engine.write_zeroes(0, at * 512, len * 512, true).await
        } else {
            for (sector, part) in (at..).zip(bytes.chunks_exact_mut(512)) {
                part.copy_from_slice(&stamp(0x7000_0000 + turn, sector));
            }
            lab::write(engine, 0, at * 512, bytes, false).await
        };
        done.map_err(text)?;
        if turn == 1 {
            engine.flush().await.map_err(text)?;
        }
    }
    let now = machine::read_all(engine).await.map_err(text)?;
    if let Some(at) = differs(&now, &wanted) {
        return Err(format!("sector {at} is not what was written"));
    }
    engine.close().await.map_err(text)?;
    Ok(wanted)
}
