//! What a device is to be like: from the command line, from a TOML file, or
//! from both. A key of the file is the name of the long option.

mod file;
mod guards;
mod keys;
mod prompt;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::chain;
use crate::crypto::Limits;
use crate::engine;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{ImageOptions, Selector};
use crate::storage::CacheMode;
use crate::ublk::{self, DataPath};

pub use guards::{BarrierSetting, DetectZeroesSetting, OverlapSetting};
pub use keys::{Ask, KeySources, parse_key_file};

/// Queues of a device that nobody has given a number of, at most.
const DEFAULT_QUEUES: usize = 4;

/// What has been said about a device. Whatever is absent is as usual.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// The image.
    pub image: Option<PathBuf>,
    /// The N of `/dev/ublkbN`.
    pub number: Option<u32>,
    /// Hardware queues.
    pub queues: Option<u16>,
    /// Requests in flight in each queue.
    pub depth: Option<u16>,
    /// The unit in which the disk is addressed: 512 or 4096 bytes.
    pub logical_block_size: Option<u32>,
    /// The image is not written to.
    pub read_only: Option<bool>,
    /// A snapshot in place of the active disk: its ID or name.
    pub snapshot: Option<String>,
    /// What is written is kept in a file in this folder, and lost with the
    /// device.
    pub temporary: Option<PathBuf>,
    /// How data moves between the kernel and us.
    pub data_path: Option<DataPathSetting>,
    /// Direct I/O or page cache.
    pub cache: Option<CacheSetting>,
    /// What discards do.
    pub discard: Option<DiscardSetting>,
    /// What becomes of writes of zeros.
    pub detect_zeroes: Option<DetectZeroesSetting>,
    /// What is durable when.
    pub barrier: Option<BarrierSetting>,
    /// Which metadata is protected from being written over.
    pub overlap_check: Option<OverlapSetting>,
    /// The kernel looks for partitions.
    pub part_scan: Option<bool>,
    /// The process gives up what serving does not need.
    pub sandbox: Option<bool>,
    /// Folders that the image may refer to, besides its own.
    pub allow_path: Vec<PathBuf>,
    /// The image may refer to any file.
    pub trust_chain: Option<bool>,
    /// Format of backing files whose image records none.
    pub backing_format: Option<BackingFormat>,
    /// File with the passphrase of encrypted images.
    pub key_file: Option<PathBuf>,
    /// File descriptor with the passphrase.
    #[serde(skip)]
    pub key_fd: Option<i32>,
    /// Credential of the service with the passphrase.
    pub key_credential: Option<String>,
    /// Files with the passphrases of single images of the chain, by image.
    pub layer_keys: BTreeMap<PathBuf, PathBuf>,
    /// Bytes of memory that deriving a key may take.
    pub key_memory: Option<u64>,
    /// Iterations that deriving a key may take.
    pub key_iterations: Option<u64>,
}

/// A data path, or the best there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DataPathSetting {
    /// The best the kernel has
    #[default]
    Auto,
    /// The driver copies (Linux 6.0)
    Copy,
    /// We copy (Linux 6.5)
    UserCopy,
    /// Nobody copies (Linux 6.16)
    AutoBuf,
}

/// A cache mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CacheSetting {
    /// Direct I/O: the host does not cache the image
    None,
    /// The host's page cache
    Writeback,
}

impl From<CacheSetting> for CacheMode {
    fn from(cache: CacheSetting) -> Self {
        match cache {
            CacheSetting::None => Self::None,
            CacheSetting::Writeback => Self::Writeback,
        }
    }
}

/// What discards do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DiscardSetting {
    /// Give the space back to the host
    #[default]
    Unmap,
    /// Nothing
    Ignore,
}

/// The format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BackingFormat {
    /// A qcow2 image
    Qcow2,
    /// The bytes of a disk
    Raw,
}

impl BackingFormat {
    /// As images record it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl Settings {
    /// These settings, and where they say nothing, the `lower` ones.
    #[must_use]
    pub fn over(self, lower: Self) -> Self {
        Self {
            image: self.image.or(lower.image),
            number: self.number.or(lower.number),
            queues: self.queues.or(lower.queues),
            depth: self.depth.or(lower.depth),
            logical_block_size: self.logical_block_size.or(lower.logical_block_size),
            read_only: self.read_only.or(lower.read_only),
            snapshot: self.snapshot.or(lower.snapshot),
            temporary: self.temporary.or(lower.temporary),
            data_path: self.data_path.or(lower.data_path),
            cache: self.cache.or(lower.cache),
            discard: self.discard.or(lower.discard),
            detect_zeroes: self.detect_zeroes.or(lower.detect_zeroes),
            barrier: self.barrier.or(lower.barrier),
            overlap_check: self.overlap_check.or(lower.overlap_check),
            part_scan: self.part_scan.or(lower.part_scan),
            sandbox: self.sandbox.or(lower.sandbox),
            allow_path: if self.allow_path.is_empty() {
                lower.allow_path
            } else {
                self.allow_path
            },
            trust_chain: self.trust_chain.or(lower.trust_chain),
            backing_format: self.backing_format.or(lower.backing_format),
            key_memory: self.key_memory.or(lower.key_memory),
            key_iterations: self.key_iterations.or(lower.key_iterations),
            layer_keys: if self.layer_keys.is_empty() {
                lower.layer_keys
            } else {
                self.layer_keys
            },
            // One source: what is said above takes the place of any below.
            ..if self.key_file.is_some() || self.key_fd.is_some() || self.key_credential.is_some() {
                Self {
                    key_file: self.key_file,
                    key_fd: self.key_fd,
                    key_credential: self.key_credential,
                    ..Self::default()
                }
            } else {
                Self {
                    key_file: lower.key_file,
                    key_fd: lower.key_fd,
                    key_credential: lower.key_credential,
                    ..Self::default()
                }
            }
        }
    }

    /// Refuses more than one source of the passphrase for all images.
    pub(crate) fn check_key_source(&self) -> Result<()> {
        let sources = [
            self.key_file.is_some(),
            self.key_fd.is_some(),
            self.key_credential.is_some(),
        ];
        if sources.into_iter().filter(|&said| said).count() > 1 {
            return Err(Error::new(
                ErrorKind::Usage,
                "the passphrase comes from a file, a descriptor or a credential: one of them",
            ));
        }
        Ok(())
    }

    /// What is said about passphrases.
    pub fn key_sources(&self, ask: Ask) -> KeySources {
        let usual = Limits::default();
        KeySources {
            file: self.key_file.clone(),
            fd: self.key_fd,
            credential: self.key_credential.clone(),
            layers: self.layer_keys.clone(),
            ask,
            limits: Limits {
                memory: self.key_memory.unwrap_or(usual.memory),
                iterations: self.key_iterations.unwrap_or(usual.iterations),
            },
        }
    }

    /// What the settings mean, with the usual values where they say nothing.
    /// `ask` is asked for passphrases that nothing gives.
    pub fn plan(self, ask: Ask) -> Result<Plan> {
        let keys = self.key_sources(ask);
        let image = self.image.ok_or_else(|| {
            Error::new(ErrorKind::Usage, "the image is missing")
                .cure("name it, or give a --config FILE that does")
        })?;
        if self.detect_zeroes == Some(DetectZeroesSetting::Unmap)
            && self.discard.unwrap_or_default() != DiscardSetting::Unmap
        {
            return Err(Error::new(
                ErrorKind::Usage,
                "detect-zeroes=unmap gives space up, which discard=ignore forbids",
            )
            .cure("use detect-zeroes=on, or discard=unmap"));
        }
        let usual = ublk::Options::default();
        let queues = self.queues.unwrap_or_else(|| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            processors.min(DEFAULT_QUEUES) as u16
        });
        let logical_block = self.logical_block_size.unwrap_or(usual.logical_block);
        if !matches!(logical_block, 512 | 4096) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("the logical block size is 512 or 4096, not {logical_block}"),
            ));
        }
        let snapshot = self.snapshot.map(|text| Selector::parse(text.as_bytes()));
        // A snapshot stays as it is, unless something is put over it.
        let read_only = self
            .read_only
            .unwrap_or_else(|| snapshot.is_some() && self.temporary.is_none());
        if read_only && self.temporary.is_some() {
            return Err(Error::new(
                ErrorKind::Usage,
                "a temporary file is for what is written, and the device is to be read-only",
            )
            .cure("leave out read-only or temporary"));
        }
        if !read_only && snapshot.is_some() && self.temporary.is_none() {
            return Err(
                Error::new(ErrorKind::Usage, "a snapshot cannot be written to")
                    .cure("make the device read-only or temporary"),
            );
        }
        Ok(Plan {
            image,
            device: ublk::Options {
                id: self.number,
                queues,
                depth: self.depth.unwrap_or(usual.depth),
                logical_block,
                read_only,
                data_path: match self.data_path.unwrap_or_default() {
                    DataPathSetting::Auto => None,
                    DataPathSetting::Copy => Some(DataPath::Copy),
                    DataPathSetting::UserCopy => Some(DataPath::UserCopy),
                    DataPathSetting::AutoBuf => Some(DataPath::AutoBuf),
                },
                part_scan: self.part_scan.unwrap_or(usual.part_scan),
                ..usual
            },
            chain: chain::Options {
                writable: !read_only,
                cache: self.cache.map_or(CacheMode::None, CacheMode::from),
                policy: chain::Policy {
                    trust_chain: self.trust_chain.unwrap_or(false),
                    allow_paths: self.allow_path,
                },
                backing_format: self.backing_format.map(|format| format.name().to_owned()),
                snapshot,
                temporary: self.temporary,
                image: ImageOptions {
                    queues: usize::from(queues),
                    keys: Some(keys.clone().keyring()),
                    barrier: self.barrier.map_or_else(Default::default, Into::into),
                    overlap_check: self.overlap_check.map_or_else(Default::default, Into::into),
                    ..ImageOptions::default()
                },
                ..chain::Options::default()
            },
            keys,
            cache_may_change: self.cache.is_none(),
            sandbox: self.sandbox.unwrap_or(true),
            engine: engine::Options {
                discard: self.discard.unwrap_or_default() == DiscardSetting::Unmap,
                request_unit: logical_block,
                detect_zeroes: self.detect_zeroes.map_or_else(Default::default, Into::into),
            },
        })
    }
}

/// A device to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image.
    pub image: PathBuf,
    /// The device's shape.
    pub device: ublk::Options,
    /// How the image and those below it are opened.
    pub chain: chain::Options,
    /// Nobody insists on the cache mode: where direct I/O is not possible,
    /// the page cache will do.
    pub cache_may_change: bool,
    /// The process gives up what serving does not need.
    pub sandbox: bool,
    /// Where passphrases come from.
    pub keys: KeySources,
    /// How requests are treated.
    pub engine: engine::Options,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_beats_the_file() {
        let file = Settings {
            image: Some("/file.qcow2".into()),
            queues: Some(3),
            read_only: Some(true),
            allow_path: vec!["/a".into()],
            ..Settings::default()
        };
        let line = Settings {
            queues: Some(2),
            ..Settings::default()
        };
        let plan = line.over(file).plan(Ask::Nobody).unwrap();
        assert_eq!(plan.image, PathBuf::from("/file.qcow2"));
        assert_eq!(plan.device.queues, 2);
        assert_eq!(plan.chain.image.queues, 2);
        assert!(plan.device.read_only && !plan.chain.writable);
        assert_eq!(plan.chain.policy.allow_paths, [PathBuf::from("/a")]);
    }

    #[test]
    fn what_is_impossible_is_refused() {
        assert!(Settings::default().plan(Ask::Nobody).is_err());
        let odd = Settings {
            image: Some("a".into()),
            logical_block_size: Some(1024),
            ..Settings::default()
        };
        assert!(
            odd.plan(Ask::Nobody)
                .unwrap_err()
                .to_string()
                .contains("1024")
        );
    }
}
