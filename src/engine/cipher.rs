//! Encrypted guest data on its way: through a buffer of our own, never in the
//! guest's pages, which the guest may look at or change meanwhile. Knows
//! neither mappings nor keys.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Engine;
use crate::block::Payload;
use crate::error::{Error, Result};
use crate::qcow2::{DataCipher, GuestOffset, HostOffset};
use crate::runtime::{Buf, pool};
use crate::storage::{Storage, Transfer};

/// Pieces from this size on are encrypted by the worker pool: they take as
/// long as the queue may not wait.
const POOL_FROM: usize = 128 << 10;
/// The most that is in a buffer at once, per transfer.
const PIECE: u64 = 1 << 20;

/// A transfer of guest data under way, encrypted or not.
#[must_use = "a transfer dropped at once is cancelled"]
pub(super) enum Moving<'a> {
    Plain(Transfer<'a>),
    Sealed(Pin<Box<dyn Future<Output = Result<()>> + 'a>>),
    Refused(Option<Error>),
}

impl Future for Moving<'_> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        match self.get_mut() {
            Self::Plain(transfer) => Pin::new(transfer).poll(context),
            Self::Sealed(sealed) => sealed.as_mut().poll(context),
            Self::Refused(error) => Poll::Ready(error.take().map_or(Ok(()), Err)),
        }
    }
}

/// A file with encrypted data.
#[derive(Clone, Copy)]
pub(super) struct Sealed<'a> {
    pub(super) storage: &'a Storage,
    pub(super) cipher: &'a DataCipher,
}

/// A transfer and the buffer that it uses: dropped in this order.
struct Piece<'a> {
    transfer: Transfer<'a>,
    buf: Buf,
}

impl Future for Piece<'_> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.get_mut().transfer).poll(context)
    }
}

/// Whole sectors around a range.
#[derive(Clone, Copy)]
struct Window {
    guest: GuestOffset,
    host: HostOffset,
    len: usize,
    /// Where the range begins in it.
    skip: usize,
}

impl<'a> Sealed<'a> {
    /// Starts filling `part` with what is at `host` of the file and `guest` of
    /// the disk.
    pub(super) fn read(self, guest: GuestOffset, host: HostOffset, part: Payload) -> Moving<'a> {
        // What is in the first piece is on its way before anybody waits.
        let mut next = Some(self.start_piece(guest, host, part, 0));
        Moving::Sealed(Box::pin(async move {
            let mut done = 0;
            loop {
                let (window, mut piece) = match next.take() {
                    Some(started) => started,
                    None => self.start_piece(guest, host, part, done),
                };
                (&mut piece).await?;
                let Piece { transfer, buf } = piece;
                drop(transfer);
                let opened = self.open(window, buf).await;
                let len = PIECE.min(part.len() - done);
                part.slice(done, len)
                    .copy_from(&opened[window.skip..window.skip + len as usize])
                    .map_err(|e| self.payload_error(e))?;
                done += len;
                if done == part.len() {
                    return Ok(());
                }
            }
        }))
    }

    fn start_piece(
        self,
        guest: GuestOffset,
        host: HostOffset,
        part: Payload,
        done: u64,
    ) -> (Window, Piece<'a>) {
        let window = self.around(guest + done, host + done, PIECE.min(part.len() - done));
        let buf = Buf::take(window.len);
        let transfer = self
            .storage
            .start_read(window.host.0, &Payload::of_buf(&buf));
        (window, Piece { transfer, buf })
    }

    /// Starts writing `part` to `host` of the file, where `guest` of the disk
    /// is. Where it is not whole sectors, nobody else writes to those meanwhile.
    pub(super) fn write(self, guest: GuestOffset, host: HostOffset, part: Payload) -> Moving<'a> {
        let whole = self.around(guest, host, part.len()).len as u64 == part.len();
        if whole && part.len() < POOL_FROM as u64 {
            // Small: encrypted at once, so that it is on its way too.
            let window = self.around(guest, host, part.len());
            let mut buf = Buf::take(window.len);
            if let Err(e) = part.copy_to(&mut buf) {
                return Moving::Refused(Some(self.payload_error(e)));
            }
            self.encrypt(window, &mut buf);
            let transfer = self
                .storage
                .start_write(window.host.0, &Payload::of_buf(&buf));
            return Moving::Sealed(Box::pin(Piece { transfer, buf }));
        }
        Moving::Sealed(Box::pin(async move {
            let mut done = 0;
            while done < part.len() {
                let len = PIECE.min(part.len() - done);
                self.write_piece(guest + done, host + done, part.slice(done, len))
                    .await?;
                done += len;
            }
            Ok(())
        }))
    }

    async fn write_piece(self, guest: GuestOffset, host: HostOffset, part: Payload) -> Result<()> {
        let window = self.around(guest, host, part.len());
        let mut buf = Buf::take(window.len);
        if window.len as u64 != part.len() {
            // The sectors at the ends keep what is beside the payload.
            let unit = self.cipher.unit() as usize;
            let last = window.len - unit;
            let ends = if last == 0 { &[0][..] } else { &[0, last] };
            for &at in ends {
                let sector = &mut buf[at..at + unit];
                self.storage.read(window.host.0 + at as u64, sector).await?;
                let position = self.cipher.position(window.guest, window.host) + at as u64;
                self.cipher.sectors.decrypt(position, sector);
            }
        }
        part.copy_to(&mut buf[window.skip..window.skip + part.len() as usize])
            .map_err(|e| self.payload_error(e))?;
        let position = self.cipher.position(window.guest, window.host);
        let sectors = self.cipher.sectors.clone();
        let seal = move || {
            sectors.encrypt(position, &mut buf);
            buf
        };
        let buf = if window.len < POOL_FROM {
            seal()
        } else {
            pool::run(seal).await
        };
        self.storage.write(window.host.0, &buf).await
    }

    /// Whole sectors around `len` bytes. Sectors do not reach beyond clusters,
    /// so that what is at both sides in the file is so on the disk.
    fn around(self, guest: GuestOffset, host: HostOffset, len: u64) -> Window {
        let unit = self.cipher.unit();
        let skip = host.0 % unit;
        Window {
            guest: GuestOffset(guest.0 - skip),
            host: HostOffset(host.0 - skip),
            len: (skip + len).next_multiple_of(unit) as usize,
            skip: skip as usize,
        }
    }

    fn encrypt(self, window: Window, buf: &mut Buf) {
        let position = self.cipher.position(window.guest, window.host);
        self.cipher.sectors.encrypt(position, buf);
    }

    /// Decrypts a window.
    async fn open(self, window: Window, mut buf: Buf) -> Buf {
        let position = self.cipher.position(window.guest, window.host);
        let sectors = self.cipher.sectors.clone();
        let open = move || {
            sectors.decrypt(position, &mut buf);
            buf
        };
        if window.len < POOL_FROM {
            open()
        } else {
            pool::run(open).await
        }
    }

    fn payload_error(self, error: std::io::Error) -> Error {
        Error::io("copy between the image and the request", error).path(self.storage.path())
    }
}

impl Engine {
    /// The least that can be written without reading what is beside it: what
    /// the storage transfers, and what is encrypted as one.
    pub(super) fn write_unit(&self) -> u32 {
        let unit = match self.top().cipher() {
            Ok(Some(cipher)) => cipher.unit() as u32,
            // Without its key nothing is written at all.
            Ok(None) | Err(_) => 1,
        };
        self.top().data().alignment().max(unit)
    }
}
