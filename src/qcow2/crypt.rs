//! Encryption of guest data: the image's key, got from its LUKS header with a
//! passphrase, and which number each sector has. Knows where the header is;
//! what is in it, [`crypto`](crate::crypto) knows.
//!
//! Nobody reads or writes guest data of an encrypted image without its key:
//! [`Image::cipher`] is an error then.

use std::path::Path;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::spec::header::{CryptMethod, Header};
use super::spec::{GuestOffset, HostOffset};
use super::{Image, ImageOptions};
use crate::crypto::luks::{self, Change};
use crate::crypto::{Effort, Limits, Secret, SectorCipher, VolumeKey, legacy, luks1, luks2};
use crate::error::{Error, ErrorKind, Result};
use crate::rule::Rule;
use crate::storage::Storage;

/// What stands between the file and guest data.
#[derive(Debug)]
pub(super) enum Encryption {
    None,
    /// The image was opened for its metadata alone.
    Locked,
    Open(DataCipher),
}

/// The cipher of an image's data.
#[derive(Clone, Debug)]
pub(crate) struct DataCipher {
    pub(crate) sectors: Arc<SectorCipher>,
    /// Sectors are counted on the virtual disk, as the old AES encryption
    /// does, and not in the file.
    by_guest: bool,
    /// By how many bytes sectors are counted higher than they lie.
    tweak: u64,
}

impl DataCipher {
    /// Bytes that are encrypted as one.
    pub(crate) fn unit(&self) -> u64 {
        self.sectors.sector_size()
    }

    /// What decides about the initial vector of the sector that is at `host`
    /// of the file and `guest` of the disk.
    pub(crate) fn position(&self, guest: GuestOffset, host: HostOffset) -> u64 {
        let place = if self.by_guest { guest.0 } else { host.0 };
        place.wrapping_add(self.tweak)
    }
}

impl Image {
    /// The cipher of guest data, if the image is encrypted.
    ///
    /// # Errors
    ///
    /// `Permission` if it is, and was opened without its key.
    #[inline]
    pub(crate) fn cipher(&self) -> Result<Option<&DataCipher>> {
        match &self.encryption {
            Encryption::None => Ok(None),
            Encryption::Open(cipher) => Ok(Some(cipher)),
            Encryption::Locked => Err(no_key(self.path())),
        }
    }

    /// True when guest data is encrypted.
    #[inline]
    pub fn is_encrypted(&self) -> bool {
        !matches!(self.encryption, Encryption::None)
    }
}

fn no_key(path: &Path) -> Error {
    Error::new(
        ErrorKind::Permission,
        "the image is encrypted and there is no passphrase for it",
    )
    .path(path)
    .cure("give one with --key-file FILE, --key-fd N or --key-credential NAME")
}

fn wrong_passphrase(path: &Path) -> Error {
    Error::new(
        ErrorKind::Permission,
        "the passphrase opens no key slot of the image",
    )
    .path(path)
    .cure("a key file is used to its last byte: look for a line end that does not belong to it")
}

/// Opens the encryption of an image, if it has any.
pub(super) async fn unlock(
    storage: &Storage,
    header: &Header,
    options: &ImageOptions,
) -> Result<Encryption> {
    let path = storage.path();
    if header.crypt_method == CryptMethod::None {
        return Ok(Encryption::None);
    }
    if header.crypt_method == CryptMethod::Aes && storage.writable() && !options.metadata_only {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the image has the old AES encryption, which is weak and is only read",
        )
        .path(path)
        .cure("open it read-only, and convert it to one with LUKS"));
    }
    if options.metadata_only {
        return Ok(Encryption::Locked);
    }
    let keys = options.keys.as_deref().ok_or_else(|| no_key(path))?;
    let passphrase = keys.passphrase(path)?.ok_or_else(|| no_key(path))?;
    let ((cipher, tweak), by_guest) = if header.crypt_method == CryptMethod::Aes {
        tracing::warn!(
            "{}: the image has the old AES encryption, which is weak: convert it to one with LUKS",
            path.display()
        );
        ((legacy::cipher(passphrase.expose())?, 0), true)
    } else {
        let region = Region::of(storage, header).await?;
        let (_, key) = region
            .find_key(&passphrase, &keys.limits())
            .await?
            .ok_or_else(|| wrong_passphrase(path))?;
        (region.luks.disk_cipher(&key)?, false)
    };
    let unit = 1 << header.geometry().subcluster_bits();
    if cipher.sector_size() > unit {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "encryption in sectors of {} bytes does not go with clusters of {unit}",
                cipher.sector_size()
            ),
        )
        .path(path));
    }
    let sectors = Arc::new(cipher);
    Ok(Encryption::Open(DataCipher {
        sectors,
        by_guest,
        tweak,
    }))
}

/// The LUKS header of an image, where it is in the file.
struct Region<'a> {
    storage: &'a Storage,
    offset: u64,
    luks: luks::Header,
}

impl<'a> Region<'a> {
    async fn of(storage: &'a Storage, header: &Header) -> Result<Self> {
        let Some((offset, len)) = header.crypto_header() else {
            return Err(
                Error::new(ErrorKind::Usage, "the image is not encrypted with LUKS")
                    .path(storage.path()),
            );
        };
        let luks = match check_place(storage, header, offset.0, len) {
            Ok(()) => read(storage, offset.0, len).await,
            Err(error) => Err(error),
        };
        Ok(Self {
            storage,
            offset: offset.0,
            luks: luks.map_err(|e| e.path(storage.path()))?,
        })
    }

    /// The slot that `passphrase` opens, and the key in it.
    async fn find_key(
        &self,
        passphrase: &Secret,
        limits: &Limits,
    ) -> Result<Option<(usize, VolumeKey)>> {
        // A slot that may not be tried is an error only if no other opens. The
        // limit is for all of them: there may be many.
        let mut refused = None;
        let mut limits = *limits;
        for (slot, area) in self.luks.active() {
            let mut material = Zeroizing::new(vec![0; (area.end - area.start) as usize]);
            let at = self.offset + area.start;
            self.storage
                .read(at, &mut material)
                .await
                .map_err(|e| e.context("cannot read the key material"))?;
            let found = self
                .luks
                .unlock(slot, &material, passphrase.expose(), &limits);
            if found.is_ok() {
                limits.iterations = limits.iterations.saturating_sub(self.luks.cost(slot));
            }
            match found {
                Ok(Some(key)) => return Ok(Some((slot, key))),
                Ok(None) => {}
                Err(error) => {
                    let path = self.storage.path();
                    refused.get_or_insert_with(|| {
                        error.context(format!("key slot {slot}")).path(path)
                    });
                }
            }
        }
        refused.map_or(Ok(None), Err)
    }

    async fn write(&self, change: &Change) -> Result<()> {
        for step in change {
            for (at, bytes) in step {
                self.storage.write(self.offset + at, bytes).await?;
            }
            if !Rule::KeyBeforeSlot.is_broken() {
                self.storage.sync().await?;
            }
        }
        Ok(())
    }
}

/// Refuses a place for header and key material that the file does not have:
/// work is done, and memory taken, for all of it.
fn check_place(storage: &Storage, header: &Header, offset: u64, len: u64) -> Result<()> {
    let file_len = storage.len();
    let end = file_len.next_multiple_of(header.cluster_size());
    if len <= end.saturating_sub(offset) {
        return Ok(());
    }
    Err(Error::corrupt(
        format!(
            "the encryption header of {len} bytes goes on behind the end of the file \
             ({file_len} bytes)"
        ),
        offset,
    )
    .cure("The file was truncated: restore it from a copy"))
}

/// The header in `len` bytes from `offset` on.
async fn read(storage: &Storage, offset: u64, len: u64) -> Result<luks::Header> {
    let mut start = vec![0; luks::PROBE_LEN.min(usize::try_from(len).unwrap_or(usize::MAX))];
    storage.read(offset, &mut start).await?;
    let absolute = |e: Error| e.shift(offset);
    match luks::version(&start) {
        Ok(1) => {
            let header = luks1::Header::parse(&start, len).map_err(absolute)?;
            Ok(luks::Header::V1(Box::new(header)))
        }
        Ok(2) => read_v2(storage, offset, len, &start)
            .await
            .map_err(absolute),
        Ok(other) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("LUKS version {other} is not supported"),
        )
        .at(offset + 6)),
        // Version 2 has a second copy.
        Err(damaged) => match read_v2(storage, offset, len, &start).await {
            Ok(header) => Ok(header),
            Err(_) => Err(absolute(damaged)),
        },
    }
}

/// The good copies of a header of version 2.
async fn read_v2(storage: &Storage, offset: u64, len: u64, start: &[u8]) -> Result<luks::Header> {
    let mut copies = Vec::new();
    let mut good = 0;
    for place in luks2::places(start, len) {
        let mut bytes = vec![0; (place.end - place.start) as usize];
        storage.read(offset + place.start, &mut bytes).await?;
        good += usize::from(luks2::is_good(&bytes, place.start));
        copies.push((place.start, bytes));
        if good == 2 {
            break;
        }
    }
    let header = luks2::Header::parse(&copies, len)?;
    Ok(luks::Header::V2(Box::new(header)))
}

/// The LUKS header of an image, and how it can be changed: the image is open
/// for nothing else.
#[derive(Debug)]
pub struct KeySlots<'a> {
    region: Region<'a>,
}

impl std::fmt::Debug for Region<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl<'a> KeySlots<'a> {
    /// Reads the header of the image in `storage`.
    pub async fn open(storage: &'a Storage) -> Result<Self> {
        let header = super::open::read_header(storage).await?;
        let region = Region::of(storage, &header).await?;
        Ok(Self { region })
    }

    /// The header.
    pub fn header(&self) -> &luks::Header {
        &self.region.luks
    }

    /// Lets `new` open the image too; which slot it got. `known` is one of
    /// the passphrases that open it already.
    pub async fn add(
        &mut self,
        known: &Secret,
        new: &Secret,
        slot: Option<usize>,
        effort: Effort,
        limits: &Limits,
    ) -> Result<usize> {
        let path = self.region.storage.path();
        let (_, key) = self
            .region
            .find_key(known, limits)
            .await?
            .ok_or_else(|| wrong_passphrase(path))?;
        let added = self.region.luks.add(&key, new.expose(), slot, effort);
        let (slot, change) = added.map_err(|e| e.path(path))?;
        self.region.write(&change).await?;
        Ok(slot)
    }

    /// The slot that a passphrase opens.
    pub async fn slot_of(&self, passphrase: &Secret, limits: &Limits) -> Result<usize> {
        let found = self.region.find_key(passphrase, limits).await?;
        let path = self.region.storage.path();
        found
            .map(|(slot, _)| slot)
            .ok_or_else(|| wrong_passphrase(path))
    }

    /// Wipes a slot. The last one, with which all data would be lost, only
    /// with `force`.
    pub async fn remove(&mut self, slot: usize, force: bool) -> Result<()> {
        let path = self.region.storage.path();
        let active = self.region.luks.active();
        if !force && active.len() == 1 && active[0].0 == slot {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("key slot {slot} is the last: without it all data is lost"),
            )
            .path(path)
            .cure("add another key first, or say --force"));
        }
        let change = self.region.luks.remove(slot).map_err(|e| e.path(path))?;
        self.region.write(&change).await
    }
}
