//! Where guest data meets a file: whoever reads or writes the bytes of an
//! uncompressed cluster does it here. Knows where they are, not why.

use super::Engine;
use crate::block::Payload;
use crate::chain::Layer;
use crate::error::Result;
use crate::qcow2::{GuestOffset, HostOffset};
use crate::storage::Transfer;

impl Engine {
    /// Starts filling `part` with the bytes that `layer` has at `host` of the
    /// file with its data; on its disk, they are those from `guest` on.
    pub(super) fn start_read_data<'a>(
        &self,
        layer: &'a Layer,
        guest: u64,
        host: u64,
        part: &Payload,
    ) -> Transfer<'a> {
        let _ = guest;
        layer.storage().start_read(host, part)
    }

    /// Starts writing `part`, the disk's bytes from `guest` on, to `host`.
    pub(super) fn start_write_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        part: &Payload,
    ) -> Transfer<'_> {
        let _ = guest;
        self.top().storage().start_write(host.0, part)
    }

    /// Writes the disk's bytes from `guest` on to `host`.
    pub(super) async fn write_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        bytes: &[u8],
    ) -> Result<()> {
        self.start_write_data(guest, host, &Payload::of_slice(bytes))
            .await
    }

    /// Makes `len` bytes of the disk from `guest` on, which are at `host`,
    /// zeros; with `unmap`, space may be given back.
    pub(super) async fn zero_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        len: u64,
        unmap: bool,
    ) -> Result<()> {
        let _ = guest;
        self.top().storage().write_zeroes(host.0, len, unmap).await
    }
}
