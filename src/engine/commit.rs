//! Committing: the data of an image, and of layers between, goes into a layer
//! below, and the image may be emptied then.
//!
//! # What is on disk at each moment
//!
//! The lower layer gets the size `|` the data, as any writes `|` and is closed;
//! only then does the image lose its mappings. A power cut changes nothing of
//! what the image shows: what was written below is hidden by the image itself,
//! until it is durable.

use super::rebase::Progress;
use super::{Engine, Rate};
use crate::block::Payload;
use crate::chain::{Apart, Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Barrier, GuestOffset, Image, Mapping};
use crate::rule::Rule;
use crate::runtime::{Buf, ops};
use crate::storage::Storage;

/// Bytes copied at once.
const STEP: u64 = 2 << 20;

/// A chain whose upper layers can be committed to one below.
#[derive(Debug)]
pub struct Commit {
    /// The layers above, without anything below them.
    upper: Engine,
    base: Base,
    /// What is durable when, in a raw base.
    barrier: Barrier,
    rate: Option<Rate>,
}

/// The layer that takes the data.
#[derive(Debug)]
enum Base {
    Qcow2(Box<Engine>),
    Raw(Storage),
}

/// Where the upper layers have a part of the disk.
enum Origin {
    Data,
    Zeros,
    /// In the base or below.
    Below,
}

impl Commit {
    /// # Errors
    ///
    /// `Usage` if there is no base.
    pub fn new(apart: Apart) -> Result<Self> {
        let Apart { upper, base } = apart;
        let mut base = base.into_iter();
        let base = match base.next() {
            Some(Layer::Qcow2(image)) => {
                let chain = Chain::new(*image, base.collect());
                Base::Qcow2(Box::new(Engine::new(chain, super::Options::default())))
            }
            Some(Layer::Raw(storage)) => Base::Raw(storage),
            None => {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "Image does not have a backing file",
                ));
            }
        };
        Ok(Self {
            upper: Engine::new(upper, super::Options::default()),
            base,
            barrier: Barrier::default(),
            rate: None,
        })
    }

    /// Writes data no faster.
    #[must_use]
    pub fn at_rate(self, rate: Option<Rate>) -> Self {
        Self { rate, ..self }
    }

    /// What is durable when in a raw base; images know it themselves.
    #[must_use]
    pub fn with_barrier(self, barrier: Barrier) -> Self {
        let base = match self.base {
            Base::Raw(storage) if barrier == Barrier::None => Base::Raw(storage.short_lived()),
            base => base,
        };
        Self {
            base,
            barrier,
            ..self
        }
    }

    fn top(&self) -> &Image {
        self.upper.top()
    }

    /// Writes everything that the upper layers have into the base, durably,
    /// and closes the base. It grows if it is shorter than the image.
    pub async fn copy(&self, progress: &mut Progress<'_>) -> Result<()> {
        let copied = self.copy_all(progress).await;
        let closed = match &self.base {
            Base::Qcow2(engine) if !Rule::BaseBeforeEmpty.is_broken() => engine.close().await,
            _ => Ok(()),
        };
        copied.and(closed)
    }

    /// Takes away all that the image has itself. Call it when
    /// [`Self::copy`] has succeeded, and only with no layers between.
    pub async fn empty(&self) -> Result<()> {
        let slot = 0;
        self.upper.prepare().await?;
        let dropped = self.top().drop_mappings(slot, GuestOffset(0)).await;
        if let (Ok(()), Some(data)) = (&dropped, self.top().data_file()) {
            // Nothing of it is mapped any more, durably. Failing to give space
            // back loses nothing.
            let _ = data.write_zeroes(0, data.len(), true).await;
        }
        let closed = self.upper.close().await;
        dropped.and(closed)
    }

    /// True when there are other layers between the image and the base.
    pub fn has_layers_between(&self) -> bool {
        self.upper.chain().layers().len() > 1
    }

    async fn copy_all(&self, progress: &mut Progress<'_>) -> Result<()> {
        let size = self.top().size();
        self.grow_base(size).await?;
        let mut buf = Buf::take(STEP.min(size) as usize);
        let mut at = 0;
        while at < size {
            let (origin, len) = self.origin(at, size - at).await?;
            match origin {
                Origin::Below => at += len,
                Origin::Zeros => {
                    self.zero(at, len).await?;
                    at += len;
                }
                Origin::Data => {
                    // Whole clusters of the base, where that can be.
                    let len = len.min(STEP - at % STEP);
                    buf = self.copy_part(at, len, buf).await?;
                    at += len;
                }
            }
            progress(at, size);
        }
        match &self.base {
            _ if Rule::BaseBeforeEmpty.is_broken() => Ok(()),
            Base::Qcow2(engine) => engine.flush().await,
            Base::Raw(storage) => storage.sync().await,
        }
    }

    async fn copy_part(&self, at: u64, len: u64, mut buf: Buf) -> Result<Buf> {
        let bytes = &mut buf[..len as usize];
        self.upper.read(0, at, Payload::of_slice_mut(bytes)).await?;
        if let Some(rate) = &self.rate {
            ops::sleep(rate.wait_for(len)).await;
        }
        match &self.base {
            Base::Qcow2(engine) => engine.write(0, at, Payload::of_slice(bytes)).await?,
            Base::Raw(storage) => {
                storage.write(at, bytes).await?;
                self.raw_written(storage).await?;
            }
        }
        Ok(buf)
    }

    async fn raw_written(&self, storage: &Storage) -> Result<()> {
        if self.barrier == Barrier::Full {
            storage.sync().await?;
        }
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64) -> Result<()> {
        match &self.base {
            Base::Qcow2(engine) => engine.write_zeroes(0, at, len, true).await,
            Base::Raw(storage) => {
                storage.write_zeroes(at, len, true).await?;
                self.raw_written(storage).await
            }
        }
    }

    async fn grow_base(&self, size: u64) -> Result<()> {
        let grown = match &self.base {
            Base::Qcow2(engine) if engine.size() < size => engine.grow(size).await,
            Base::Raw(storage) if storage.len() < size => storage.set_len(size).await,
            _ => Ok(()),
        };
        grown.map_err(|e| e.context("cannot make the backing file as long as the image"))
    }

    /// Who has the first bytes of a range, and how many of them.
    async fn origin(&self, at: u64, mut len: u64) -> Result<(Origin, u64)> {
        let layers = self.upper.chain().layers();
        for (depth, layer) in layers.iter().enumerate() {
            if depth > 0 {
                if at >= layer.size() {
                    // The end of a layer hides what is below.
                    return Ok((Origin::Zeros, len));
                }
                len = len.min(layer.size() - at);
            }
            let Layer::Qcow2(image) = layer else {
                return Ok((Origin::Data, len));
            };
            let extent = image.lookup(GuestOffset(at), len).await?;
            len = extent.len;
            match extent.mapping {
                Mapping::Unallocated => {}
                Mapping::Zero { .. } => return Ok((Origin::Zeros, len)),
                Mapping::Data { .. } | Mapping::Compressed(_) => {
                    return Ok((Origin::Data, len));
                }
            }
        }
        Ok((Origin::Below, len))
    }
}
