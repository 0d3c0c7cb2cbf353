//! The layers of a disk, top to base.

mod create;
mod map;
mod name;
mod open;
mod policy;
mod reopen;
mod temporary;

use std::os::fd::RawFd;

use crate::error::Result;
use crate::qcow2::{DataCipher, Image};
use crate::storage::Storage;

pub use create::{backing_path, backing_size, create, create_at, data_path};
pub use map::MapEntry;
pub(crate) use open::{MAX_LAYERS, open_below};
pub use open::{Options, open};
pub use policy::Policy;
pub use reopen::{Apart, open_apart, open_new_backing};

/// One file of the chain.
#[derive(Debug)]
pub enum Layer {
    /// A qcow2 image.
    Qcow2(Box<Image>),
    /// A file whose bytes are the disk's; only ever the lowest layer.
    Raw(Storage),
}

impl Layer {
    /// The file.
    pub fn storage(&self) -> &Storage {
        match self {
            Self::Qcow2(image) => image.storage(),
            Self::Raw(storage) => storage,
        }
    }

    /// The cipher of its data, if that is encrypted; an error without the key.
    #[inline]
    pub(crate) fn cipher(&self) -> Result<Option<&DataCipher>> {
        match self {
            Self::Qcow2(image) => image.cipher(),
            Self::Raw(_) => Ok(None),
        }
    }

    /// The file with its guest data: an image may have one of its own for it.
    #[inline]
    pub fn data(&self) -> &Storage {
        match self {
            Self::Qcow2(image) => image.data(),
            Self::Raw(storage) => storage,
        }
    }

    /// Size of the disk the layer shows, in bytes: for raw files a multiple of
    /// 512, the last sector filled up with zeros.
    pub fn size(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.size(),
            Self::Raw(storage) => storage.len().next_multiple_of(512),
        }
    }
}

/// A qcow2 image and everything below it.
#[derive(Debug)]
pub struct Chain {
    /// Top first; the first is always qcow2.
    layers: Vec<Layer>,
}

impl Chain {
    /// A chain of one image, or of an image over others.
    pub fn new(top: Image, below: Vec<Layer>) -> Self {
        let mut layers = vec![Layer::Qcow2(Box::new(top))];
        layers.extend(below);
        Self { layers }
    }

    /// An image over all of these.
    fn covered_by(self, top: Image) -> Self {
        Self::new(top, self.layers)
    }

    /// Layers that are only read, whatever the first one is.
    pub(crate) fn of_layers(layers: Vec<Layer>) -> Self {
        Self { layers }
    }

    /// The image that is written to.
    pub fn top(&self) -> &Image {
        match &self.layers[0] {
            Layer::Qcow2(image) => image,
            Layer::Raw(_) => unreachable!("the top layer is qcow2"),
        }
    }

    /// Top to base.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// True when a layer is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.layers
            .iter()
            .any(|layer| matches!(layer, Layer::Qcow2(image) if image.is_encrypted()))
    }

    /// The files, for registration with a ring.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        let data_file = |layer: &Layer| match layer {
            Layer::Qcow2(image) => image.data_file().and_then(Storage::fd),
            Layer::Raw(_) => None,
        };
        self.layers
            .iter()
            .flat_map(move |layer| [layer.storage().fd(), data_file(layer)])
            .flatten()
    }
}
