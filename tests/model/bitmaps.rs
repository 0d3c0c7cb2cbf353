//! Dirty bitmaps as vectors of bools.

use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::{BitmapAction, Image};
use qcow2_ublk::storage::sim::Rng;

#[derive(Clone, Debug)]
struct Bitmap {
    name: String,
    granularity: u64,
    enabled: bool,
    dirty: Vec<bool>,
}

/// The bitmaps of an image.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    all: Vec<Bitmap>,
    made: u32,
}

impl Bitmaps {
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Offset and length of what has changed.
    pub(crate) fn record(&mut self, changed: &[(u64, u64)]) {
        for bitmap in self.all.iter_mut().filter(|bitmap| bitmap.enabled) {
            for &(offset, len) in changed {
                let last = (offset + len - 1) / bitmap.granularity;
                bitmap.dirty[(offset / bitmap.granularity) as usize..=last as usize].fill(true);
            }
        }
    }

    /// The disk has another size; what is new is clean.
    pub(crate) fn resize(&mut self, size: u64) {
        for bitmap in &mut self.all {
            let granules = size.div_ceil(bitmap.granularity) as usize;
            bitmap.dirty.resize(granules, false);
        }
    }

    /// Does something with one of them.
    pub(crate) async fn act(&mut self, image: &Image, rng: &mut Rng) {
        let which = rng.below(self.all.len().max(1) as u64) as usize;
        if self.all.is_empty() || self.all.len() < 4 && rng.chance(1, 3) {
            return self.add(image, rng).await;
        }
        let other = self.all[rng.below(self.all.len() as u64) as usize].clone();
        let bitmap = &mut self.all[which];
        let name = bitmap.name.clone();
        let name = name.as_bytes();
        let action = match rng.below(5) {
            0 => BitmapAction::Remove,
            1 => {
                bitmap.dirty.fill(false);
                BitmapAction::Clear
            }
            2 => {
                bitmap.enabled = true;
                BitmapAction::Enable
            }
            3 => {
                bitmap.enabled = false;
                BitmapAction::Disable
            }
            _ => {
                let content = image.bitmap(other.name.as_bytes()).await.unwrap();
                let merged = image
                    .change_bitmap(name, &BitmapAction::Merge(&content))
                    .await;
                merged.unwrap();
                let dirty = (0..).step_by(other.granularity as usize).zip(other.dirty);
                for (at, _) in dirty.filter(|(_, dirty)| *dirty) {
                    let end = at + other.granularity;
                    let granules = at / bitmap.granularity..end.div_ceil(bitmap.granularity);
                    for granule in granules {
                        if let Some(dirty) = bitmap.dirty.get_mut(granule as usize) {
                            *dirty = true;
                        }
                    }
                }
                return;
            }
        };
        image.change_bitmap(name, &action).await.unwrap();
        if action_removes(&action) {
            self.all.remove(which);
        }
    }

    async fn add(&mut self, image: &Image, rng: &mut Rng) {
        self.made += 1;
        let granularity = 512 << rng.below(9);
        let name = format!("bitmap {}", self.made);
        let action = BitmapAction::Add {
            granularity: Some(granularity),
        };
        image.change_bitmap(name.as_bytes(), &action).await.unwrap();
        let granules = image.size().div_ceil(granularity);
        self.all.push(Bitmap {
            name,
            granularity,
            enabled: true,
            dirty: vec![false; granules as usize],
        });
    }

    /// They are in the image, with these bits.
    pub(crate) async fn compare(&self, engine: &Engine) {
        let image = engine.chain().top();
        let infos = image.bitmaps().await.unwrap();
        assert_eq!(infos.len(), self.all.len());
        for (info, bitmap) in infos.iter().zip(&self.all) {
            assert_eq!(info.name, bitmap.name.as_bytes());
            assert_eq!(info.granularity, bitmap.granularity);
            assert_eq!(info.enabled, bitmap.enabled, "{}", bitmap.name);
            assert!(!info.inconsistent, "{}", bitmap.name);
            let content = image.bitmap(&info.name).await.unwrap();
            for (granule, &dirty) in (0..).zip(&bitmap.dirty) {
                let offset = granule * bitmap.granularity;
                assert_eq!(
                    content.is_dirty(offset),
                    dirty,
                    "{} of granularity {} at {offset}",
                    bitmap.name,
                    bitmap.granularity
                );
            }
        }
    }
}

fn action_removes(action: &BitmapAction<'_>) -> bool {
    matches!(action, BitmapAction::Remove)
}
