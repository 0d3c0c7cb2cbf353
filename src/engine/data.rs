//! Where guest data meets a file: whoever reads or writes the bytes of an
//! uncompressed cluster does it here. Knows where they are, not why.

use super::Engine;
use super::cipher::{Moving, Sealed};
use crate::block::Payload;
use crate::chain::Layer;
use crate::error::Result;
use crate::qcow2::{GuestOffset, HostOffset};

impl Engine {
    /// Starts filling `part` with the bytes that `layer` has at `host` of the
    /// file with its data; on its disk, they are those from `guest` on.
    pub(super) fn start_read_data<'a>(
        &self,
        layer: &'a Layer,
        guest: u64,
        host: u64,
        part: &Payload,
    ) -> Moving<'a> {
        let storage = layer.data();
        match layer.cipher() {
            Ok(None) => Moving::Plain(storage.start_read(host, part)),
            Ok(Some(cipher)) => {
                let (guest, host) = (GuestOffset(guest), HostOffset(host));
                Sealed { storage, cipher }.read(guest, host, *part)
            }
            Err(error) => Moving::Refused(Some(error)),
        }
    }

    /// Starts writing `part`, the disk's bytes from `guest` on, to `host`.
    pub(super) fn start_write_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        part: &Payload,
    ) -> Moving<'_> {
        let storage = self.top().data();
        match self.top().cipher() {
            Ok(None) => Moving::Plain(storage.start_write(host.0, part)),
            Ok(Some(cipher)) => Sealed { storage, cipher }.write(guest, host, *part),
            Err(error) => Moving::Refused(Some(error)),
        }
    }

    /// Writes the disk's bytes from `guest` on to `host`.
    pub(super) async fn write_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        bytes: &[u8],
    ) -> Result<()> {
        let len = self.stored_len(guest, bytes.len() as u64);
        let bytes = &bytes[..len as usize];
        self.start_write_data(guest, host, &Payload::of_slice(bytes))
            .await
    }

    /// How many of `len` bytes from `guest` on are stored: a data file ends with
    /// the disk, not with the last cluster.
    fn stored_len(&self, guest: GuestOffset, len: u64) -> u64 {
        match self.top().data_file() {
            Some(_) => len.min(self.size().saturating_sub(guest.0)),
            None => len,
        }
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
        let storage = self.top().data();
        let len = self.stored_len(guest, len);
        match self.top().cipher()? {
            None => storage.write_zeroes(host.0, len, unmap).await,
            // A hole would be zeros before decryption, and not behind it.
            Some(cipher) => {
                let sealed = Sealed { storage, cipher };
                sealed.write(guest, host, Payload::zeros(len)).await
            }
        }
    }

    /// Gives back what an external data file has of a range that is not mapped
    /// to it any more. In an image's own file that is for those who free its
    /// clusters; here nobody else can get the space, so that it need not wait
    /// for the unmapping to be durable: before, the range may read as zeros as
    /// well as after.
    pub(super) async fn drop_data(&self, start: u64, end: u64) {
        let Some(data) = self.top().data_file() else {
            return;
        };
        let end = end.min(data.len());
        // Encrypted, a hole would not read as zeros while it is still mapped.
        if start < end && matches!(self.top().cipher(), Ok(None)) {
            // Failing to give space back loses nothing.
            let _ = data.punch(start, end - start).await;
        }
    }
}
