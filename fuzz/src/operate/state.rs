//! What an image has to be, and whether it is.

use qcow2_ublk::storage::sim::Image;

use super::super::common::check::Checked;
use super::bitmaps::{self, Bitmaps, Stored};
use super::model::{Model, SECTOR};

/// What has been made of an image.
#[derive(Clone)]
pub struct State {
    pub model: Model,
    /// The snapshot made here.
    pub made: Option<Made>,
    pub bitmaps: Bitmaps,
}

/// A snapshot: what it has to show, and what that is in the file.
#[derive(Clone)]
pub struct Made {
    pub model: Model,
    pub stored: Vec<u8>,
}

/// What an image file turned out to have in it.
pub struct Found {
    pub snapshots: usize,
    pub bitmaps: Vec<Stored>,
}

impl Found {
    pub fn of(checked: &Checked<'_>, image: &Image) -> Self {
        Self {
            snapshots: checked.snapshots().len(),
            bitmaps: bitmaps::stored(checked, image, checked.header.virtual_size()),
        }
    }
}

impl State {
    /// The power failed, or the program died.
    pub fn cut(&mut self) {
        self.model.cut();
    }

    /// Whether an image is this: it had `old` snapshots at first, and shows
    /// `content`; `closed`, after a clean close.
    pub fn fits(
        &self,
        found: &Found,
        old: usize,
        content: &[u8],
        closed: bool,
    ) -> Result<(), String> {
        let size = self.model.sectors() * SECTOR;
        if content.len() as u64 != size {
            return Err(format!("the disk has {} bytes, not {size}", content.len()));
        }
        if found.snapshots != old + usize::from(self.made.is_some()) {
            return Err(format!("it has {} snapshots", found.snapshots));
        }
        self.model.fits(0, content)?;
        if closed {
            self.bitmaps.are_exactly(&found.bitmaps)
        } else {
            self.bitmaps.are_left(&found.bitmaps, content)
        }
    }
}
