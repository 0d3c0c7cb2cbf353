//! Dirty bitmaps: what their owner believes, and what a power cut may leave.

use std::collections::BTreeMap;
use std::rc::Rc;

use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::spec::bitmap::{self, BitmapFlags};
use qcow2_ublk::{Error, ErrorKind};

use super::common::check::Checked;
use super::model::{Bitmap, Log, World};
use super::op::Action;
use super::run::text;
use super::{Verdict, ensure};

/// What `action`, which succeeded, has made of the bitmaps, while the disk
/// showed `content`.
pub(crate) fn follow(bitmaps: &mut BTreeMap<char, Bitmap>, action: Action, content: &Rc<Vec<u8>>) {
    match action {
        Action::Bitmap(name, bits) => {
            let bitmap = Bitmap {
                granularity: 1 << bits,
                enabled: true,
                base: Rc::clone(content),
                frozen: None,
                carried: Rc::default(),
                dirty: Vec::new(),
                unsure: Rc::default(),
                lost: false,
            };
            bitmaps.insert(name, bitmap);
        }
        Action::Unbitmap(name) => drop(bitmaps.remove(&name)),
        Action::Enable(name) => {
            // What changed meanwhile it does not know: a new beginning,
            // with what it has.
            if let Some(bitmap) = bitmaps.get_mut(&name).filter(|b| !b.enabled) {
                bitmap.enabled = true;
                bitmap.base = Rc::clone(content);
                bitmap.carried = Rc::new(bitmap.dirty.clone());
                bitmap.frozen = None;
            }
        }
        Action::Disable(name) => {
            if let Some(bitmap) = bitmaps.get_mut(&name).filter(|b| b.enabled) {
                bitmap.enabled = false;
                bitmap.frozen = Some(Rc::clone(content));
            }
        }
        Action::Clear(name) => {
            if let Some(bitmap) = bitmaps.get_mut(&name) {
                bitmap.dirty.clear();
                bitmap.carried = Rc::default();
                bitmap.unsure = Rc::default();
                bitmap.base = Rc::clone(content);
                bitmap.frozen = (!bitmap.enabled).then(|| Rc::clone(content));
            }
        }
        Action::Resize(sectors) => {
            for bitmap in bitmaps.values_mut() {
                bitmap.cut(sectors as usize);
            }
        }
        _ => {}
    }
}

/// After the death of the process: those that are marked in use stay so.
pub(crate) fn follow_death(bitmaps: &mut BTreeMap<char, Bitmap>, checked: &Checked<'_>) {
    let directory = checked.bitmaps();
    for (name, bitmap) in bitmaps {
        let found = directory.iter().find(|found| is_named(found, *name));
        bitmap.lost |= found.is_some_and(|found| found.flags.contains(BitmapFlags::IN_USE));
    }
}

/// True where an action is refused because of a bitmap that cannot be used any
/// more.
pub(crate) fn refuses_lost(
    bitmaps: &BTreeMap<char, Bitmap>,
    action: Action,
    error: &Error,
) -> bool {
    let lost = |name: char| bitmaps.get(&name).is_some_and(|bitmap| bitmap.lost);
    error.kind() == ErrorKind::Corrupt
        && match action {
            Action::Enable(name) | Action::Disable(name) | Action::Clear(name) => lost(name),
            Action::Resize(_) => bitmaps.values().any(|bitmap| bitmap.lost),
            _ => false,
        }
}

fn is_named(found: &bitmap::Bitmap, name: char) -> bool {
    found.name == name.to_string().as_bytes()
}

impl Bitmap {
    /// The disk has so many sectors; what is beyond is gone, and what comes
    /// there later is clean.
    fn cut(&mut self, sectors: usize) {
        let end = (sectors * 512).next_multiple_of(self.granularity as usize) / 512;
        self.dirty.truncate(end);
        let cut = |content: &mut Rc<Vec<u8>>| {
            if content.len() > sectors * 512 {
                *content = Rc::new(content[..sectors * 512].to_vec());
            }
        };
        cut(&mut self.base);
        if let Some(frozen) = &mut self.frozen {
            cut(frozen);
        }
        if self.carried.len() > end {
            self.carried = Rc::new(self.carried[..end].to_vec());
        }
    }

    /// Whether the bitmap in the file, with these dirty sectors, has all that
    /// it has to have when the disk shows `content`.
    fn fits(&self, found: &bitmap::Bitmap, dirty: &[bool], content: &[u8]) -> bool {
        if found.flags.contains(BitmapFlags::AUTO) != self.enabled
            || 1 << found.granularity_bits != self.granularity
        {
            return false;
        }
        let shown = self.frozen.as_ref().map_or(content, |frozen| frozen);
        let changed = |sector: usize| {
            let range = sector * 512..(sector + 1) * 512;
            match (self.base.get(range.clone()), shown.get(range)) {
                (Some(old), Some(new)) => old != new,
                (None, Some(new)) => new.iter().any(|&b| b != 0),
                _ => false,
            }
        };
        let carried = |sector: usize| self.carried.get(sector).copied().unwrap_or(false);
        (0..dirty.len()).all(|sector| {
            dirty[sector] || !self.is_sure(sector) || !(changed(sector) || carried(sector))
        })
    }
}

/// Whether the bitmaps of a state that shows `content` are those of `world`:
/// with all changes, or marked in use.
pub(crate) async fn judge(
    checked: &Checked<'_>,
    engine: &Engine,
    log: &Log,
    world: &World,
    point: usize,
    content: &[u8],
) -> Verdict {
    if world.bitmaps.is_empty() && checked.header.bitmaps().is_none() {
        return Ok(());
    }
    let directory = checked.bitmaps();
    for found in &directory {
        let known = found.name.first().map(|&b| char::from(b));
        ensure!(
            known.is_some_and(|name| world.bitmaps.contains_key(&name)),
            "there is a bitmap {} too many",
            String::from_utf8_lossy(&found.name)
        );
    }
    let closed = log.closed_at(point).map(|number| &log.closes[number]);
    for (name, bitmap) in world.bitmaps.iter() {
        let found = directory.iter().find(|found| is_named(found, *name));
        let found = found.ok_or_else(|| format!("bitmap {name} is lost"))?;
        if found.flags.contains(BitmapFlags::IN_USE) {
            ensure!(
                closed.is_none() || bitmap.lost,
                "bitmap {name} is marked in use after a clean close"
            );
            continue;
        }
        let entries = bitmap::Bitmap::table_entries_for(
            found.granularity_bits,
            checked.header.virtual_size(),
            &checked.header.geometry(),
        );
        ensure!(
            u64::from(found.table_size) == entries,
            "the table of bitmap {name} does not fit the disk: {found:?}"
        );
        let dirty = dirty_sectors(engine, *name, content.len()).await?;
        ensure!(
            bitmap.fits(found, &dirty, content),
            "bitmap {name} misses changes: {found:?}"
        );
        if let Some(exact) = closed.and_then(|closed| closed.exact.get(name)) {
            let mut exact = exact.clone();
            exact.resize(dirty.len(), false);
            let differs = |&sector: &usize| dirty[sector] != exact[sector];
            let wrong = (0..dirty.len())
                .filter(differs)
                .find(|&n| bitmap.is_sure(n));
            ensure!(
                wrong.is_none(),
                "bitmap {name} is not exact after a clean close, in sector {wrong:?}"
            );
        }
    }
    Ok(())
}

async fn dirty_sectors(engine: &Engine, name: char, len: usize) -> Verdict<Vec<bool>> {
    let mut sectors = vec![false; len / 512];
    let name = name.to_string();
    let content = engine.chain().top().bitmap(name.as_bytes()).await;
    let marked = content.and_then(|content| {
        content.ranges(|start, len| {
            let first = start as usize / 512;
            sectors[first..first + len as usize / 512].fill(true);
            Ok(())
        })
    });
    marked.map_err(text)?;
    Ok(sectors)
}
