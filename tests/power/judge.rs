//! Judges what a power cut left.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::rc::Rc;

use qcow2_ublk::ErrorKind;
use qcow2_ublk::crypto::Limits;
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::KeySlots;
use qcow2_ublk::qcow2::check::{self, Repair};
use qcow2_ublk::qcow2::spec::header::Incompatible;
use qcow2_ublk::runtime::Buf;
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, Crash, Rng};

use super::case::Case;
use super::common::check::Checked;
use super::common::lab;
use super::machine::{self, Disks, block_on, passphrase};
use super::model::{Choice, Log, Promise, Taken, World, stamp};
use super::run::{Ran, text};
use super::shape::{Below, Data, Shape};
use super::{Verdict, bitmaps, ensure};

/// A world, and the values that each of its sectors may have.
type Allowed<'a> = (&'a World, Vec<Choice>);

/// A history and what is found out about it once.
pub(crate) struct Judge<'a> {
    case: &'a Case,
    ran: &'a Ran,
    /// What sectors may hold at the point that was asked for last, for each
    /// world that may be there.
    allowed: (usize, Vec<Allowed<'a>>),
    /// States that were found sound, with what was promised.
    sound: HashSet<(Promise, Vec<sim::Image>)>,
    below: RefCell<Option<BelowBytes>>,
}

/// The layer below that was looked at last (none, if it is always the same),
/// and what it shows.
type BelowBytes = (Option<sim::Image>, Rc<Vec<u8>>);

/// What a state turned out to be.
pub(crate) struct Found {
    /// All that its disk shows.
    pub(crate) content: Buf,
    /// It was marked dirty.
    pub(crate) dirty: bool,
}

impl<'a> Judge<'a> {
    pub(crate) fn new(case: &'a Case, ran: &'a Ran) -> Self {
        Self {
            case,
            ran,
            allowed: (usize::MAX, Vec::new()),
            sound: HashSet::new(),
            below: RefCell::default(),
        }
    }

    /// True when the disks have not been found sound with these bytes before,
    /// when the same was promised: a verdict would be no other.
    pub(crate) fn is_new(&mut self, crash: &Crash) -> bool {
        let promise = self.ran.log.promise(crash.point);
        self.sound.insert((promise, crash.images.clone()))
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
        let leaks = if dirty { None } else { Some(sound(&checked)?) };
        let below = self.below(images)?;
        let taken = self.snapshots(&checked, &below)?;

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
            let leaks = match leaks {
                Some(leaks) if image == images[0] => leaks,
                _ => {
                    let checked = Checked::open(&image)?;
                    self.same(&checked, &below, &taken)
                        .map_err(|e| format!("after the repair: {e}"))?;
                    sound(&checked)?
                }
            };
            ensure!(leaks == 0, "{leaks} clusters leak after the repair");
        }
        let content = machine::read_some(&engine, 0, engine.size()).await;
        let content = content.map_err(text)?;
        if shape.data == Data::RawFile {
            let mut raw = images[1].pieces(0, content.len() as u64);
            let same = raw.all(|(at, piece)| content[at..at + piece.len()] == *piece);
            ensure!(same, "the raw file is not the disk");
        }
        let keys = self.keys(&disks).await?;
        let mut reasons = Vec::new();
        for (world, allowed) in &self.allowed.1 {
            let verdict = async {
                same_snapshots(&taken, world)?;
                ensure!(
                    keys == *world.keys,
                    "the image opens with the keys {keys:?} and not with {:?}",
                    world.keys
                );
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
    async fn look_again(&self, disks: &Disks, taken: &[Taken], later: &[u8]) -> Verdict {
        let shape = &self.case.shape;
        let images = disks.images();
        let checked = Checked::open(&images[0])?;
        let leaks = sound(&checked).map_err(|e| format!("after more work: {e}"))?;
        let below = self.below(&images)?;
        self.same(&checked, &below, taken)
            .map_err(|e| format!("after more work: {e}"))?;
        if shape.luks == 0 {
            let checked = checked.with_data(disks.data.is_some().then(|| &images[1]));
            let wrong = checked.active_differs(&below, later);
            ensure!(
                wrong.is_none(),
                "after more work the disk reads as something else from byte {wrong:?} on"
            );
        }
        if leaks > 0 {
            repair_leaks(disks).await?;
            let image = disks.image.image();
            let leaks = sound(&Checked::open(&image)?)?;
            ensure!(leaks == 0, "{leaks} clusters leak after their repair");
        }
        Ok(())
    }

    /// The snapshots of an image: each shows what one under its name may show.
    fn snapshots(&self, checked: &Checked<'_>, below: &[u8]) -> Verdict<Vec<Taken>> {
        let mut found = Vec::new();
        for snapshot in checked.snapshots() {
            let name = String::from_utf8_lossy(&snapshot.name).into_owned();
            let worlds = self.allowed.1.iter();
            let known = worlds.flat_map(|(world, _)| world.snapshots.iter());
            let mut wrong = None;
            let taken = known.filter(|taken| taken.name == name).find(|taken| {
                let at = checked.snapshot_differs(&snapshot, below, &taken.content);
                wrong = wrong.or(at);
                at.is_none()
            });
            let taken = taken.ok_or_else(|| match wrong {
                None => format!("there is a snapshot {name} too many"),
                Some(at) => format!("snapshot {name} shows something else from byte {at} on"),
            })?;
            found.push(taken.clone());
        }
        Ok(found)
    }

    fn same(&self, checked: &Checked<'_>, below: &[u8], taken: &[Taken]) -> Verdict {
        let now = self.snapshots(checked, below)?;
        ensure!(now == taken, "the list of snapshots has changed");
        Ok(())
    }

    /// The passphrases besides the first that open the image.
    async fn keys(&self, disks: &Disks) -> Verdict<BTreeSet<char>> {
        let worlds = self.ran.log.worlds.iter();
        let mut names: BTreeSet<char> = worlds.flat_map(|w| w.keys.iter().copied()).collect();
        if names.is_empty() {
            return Ok(names);
        }
        let storage = Storage::simulated(&disks.image, self.case.shape.alignment);
        let slots = KeySlots::open(&storage).await.map_err(text)?;
        for name in names.clone() {
            let slot = slots.slot_of(&passphrase(name), &Limits::default()).await;
            match slot {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Permission => drop(names.remove(&name)),
                Err(error) => return Err(text(error)),
            }
        }
        Ok(names)
    }

    /// What the layer below shows.
    fn below(&self, images: &[sim::Image]) -> Verdict<Rc<Vec<u8>>> {
        let (shape, committed) = (&self.case.shape, self.ran.committed);
        let image = images.last().filter(|_| committed);
        let mut last = self.below.borrow_mut();
        match &*last {
            Some((other, bytes)) if other.as_ref() == image => Ok(Rc::clone(bytes)),
            _ => {
                let bytes = Rc::new(below_bytes(shape, images, committed)?);
                *last = Some((image.cloned(), Rc::clone(&bytes)));
                Ok(bytes)
            }
        }
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
pub(crate) fn fits(log: &Log, content: &[u8], allowed: &[Choice]) -> Verdict {
    ensure!(
        content.len() == allowed.len() * 512,
        "the disk has {} sectors, not {}",
        content.len() / 512,
        allowed.len()
    );
    for (sector, (bytes, choice)) in content.chunks_exact(512).zip(allowed).enumerate() {
        let fits = choice
            .values()
            .any(|value| log.is(bytes, sector as u64, value));
        ensure!(
            fits,
            "sector {sector} is none of {:?}: it is {}",
            choice.values().collect::<Vec<_>>(),
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

fn same_snapshots(found: &[Taken], world: &World) -> Verdict {
    let names = |snapshots: &[Taken]| {
        let names: Vec<&str> = snapshots.iter().map(|taken| &*taken.name).collect();
        names.join(", ")
    };
    ensure!(
        found == &**world.snapshots,
        "the snapshots are [{}] and not [{}], or show something else",
        names(found),
        names(&world.snapshots)
    );
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
async fn goes_on(engine: &Engine, content: &[u8], shape: &Shape, rng: &mut Rng) -> Verdict<Buf> {
    let mut wanted = Buf::copy_of(content);
    let sectors = content.len() as u64 / 512;
    if sectors == 0 {
        engine.close().await.map_err(text)?;
        return Ok(wanted);
    }
    let cluster = shape.cluster / 512;
    let mut written = Vec::new();
    for turn in 0..3_u32 {
        let at = rng.below(sectors);
        let len = (1 + rng.below(cluster + 4)).min(sectors - at);
        written.push((at, len));
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
    if shape.luks != 0 || rng.chance(1, 4) {
        written = vec![(0, sectors)];
    }
    // Otherwise what was written and what is beside it; all of the disk is
    // looked at when it is closed.
    for (at, len) in written {
        let start = at.saturating_sub(cluster);
        let end = (at + len + cluster).min(sectors);
        let now = machine::read_some(engine, start * 512, (end - start) * 512).await;
        let now = now.map_err(text)?;
        let wanted = &wanted[start as usize * 512..end as usize * 512];
        if let Some(at) = differs(&now, wanted) {
            let sector = start + at as u64;
            return Err(format!("sector {sector} is not what was written"));
        }
    }
    engine.close().await.map_err(text)?;
    Ok(wanted)
}
