//! Reads: every byte of the payload is filled, from the first layer that has
//! it.

use super::Engine;
use super::flight::Flight;
use crate::block::Payload;
use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::qcow2::{CompressedRange, GuestOffset, Image, Mapping};

impl Engine {
    /// Reads from layer `first` and those below it. Past the end of a layer
    /// there are zeros, whatever lies below.
    pub(super) async fn read_layers(
        &self,
        first: usize,
        offset: u64,
        payload: Payload,
    ) -> Result<()> {
        let mut flight = Flight::default();
        let mut done = 0;
        while done < payload.len() {
            let at = offset + done;
            let (found, len) = self.resolve(first, at, payload.len() - done).await?;
            let part = payload.slice(done, len);
            match found {
                Found::Zeros => part.fill_zeros().map_err(|e| self.payload_error(e))?,
                Found::Host { layer, offset } => {
                    flight.add(self.start_read_data(layer, at, offset, &part));
                }
                Found::Compressed { image, range, at } => {
                    let cluster = image.inflate(range).await?;
                    part.copy_from(&cluster[at as usize..(at + len) as usize])
                        .map_err(|e| self.payload_error(e))?;
                }
            }
            done += len;
        }
        flight.land().await
    }

    /// Finds who has the first bytes of the range, and how many of them.
    pub(super) async fn resolve(
        &self,
        first: usize,
        at: u64,
        mut len: u64,
    ) -> Result<(Found<'_>, u64)> {
        for (depth, layer) in self.chain.layers().iter().enumerate().skip(first) {
            let size = layer.size();
            if depth > 0 {
                // The top layer's own range was checked; a lower one may be
                // shorter, and its end need not be where a cluster ends.
                if at >= size {
                    break;
                }
                len = len.min(size - at);
            }
            match layer {
                Layer::Raw(_) => return Ok((Found::Host { layer, offset: at }, len)),
                Layer::Qcow2(image) => {
                    let extent = image.lookup(GuestOffset(at), len).await?;
                    len = extent.len;
                    match extent.mapping {
                        Mapping::Unallocated => {}
                        Mapping::Zero { .. } => return Ok((Found::Zeros, len)),
                        Mapping::Data { host, .. } => {
                            let offset = host.0;
                            return Ok((Found::Host { layer, offset }, len));
                        }
                        Mapping::Compressed(range) => {
                            let at = at % image.cluster_size();
                            return Ok((Found::Compressed { image, range, at }, len));
                        }
                    }
                }
            }
        }
        Ok((Found::Zeros, len))
    }

    /// True when the layers from `first` down have nothing but zeros in the
    /// range.
    pub(super) async fn reads_zero(&self, first: usize, offset: u64, len: u64) -> Result<bool> {
        if first >= self.chain.layers().len() {
            return Ok(true);
        }
        let mut done = 0;
        while done < len {
            match self.resolve(first, offset + done, len - done).await? {
                (Found::Zeros, len) => done += len,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The device did not take or give the data of a request.
    pub(super) fn payload_error(&self, error: std::io::Error) -> Error {
        Error::io("copy between the image and the request", error).path(self.chain.top().path())
    }
}

/// Who has the bytes.
pub(super) enum Found<'a> {
    Zeros,
    Host {
        layer: &'a Layer,
        offset: u64,
    },
    Compressed {
        image: &'a Image,
        range: CompressedRange,
        /// Where in the inflated cluster.
        at: u64,
    },
}
