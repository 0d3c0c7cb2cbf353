//! The images that are raced over: small, so that everybody meets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use qcow2_ublk::chain;
use qcow2_ublk::codec::CompressionType;
use qcow2_ublk::crypto::{Effort, Secret, luks1};
use qcow2_ublk::qcow2::create::{Backing, CreateOptions};
use qcow2_ublk::qcow2::{BitmapAction, ImageOptions};
use qcow2_ublk::storage::CacheMode;

use super::history::{Tag, ZEROS};
use super::sector::{SECTOR, encode};
use crate::common::lab::block_on;

/// The tag of what lies below.
const BELOW: Tag = 1;
const PASSPHRASE: &[u8] = b"open sesame";
/// The bitmap of an image that has one.
pub(crate) const BITMAP: &str = "changes";

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) cluster: u64,
    /// Of the disk.
    pub(crate) sectors: u64,
    pub(crate) version: u8,
    pub(crate) extended: bool,
    pub(crate) zstd: bool,
    pub(crate) lazy: bool,
    pub(crate) luks: bool,
    pub(crate) data_file: bool,
    /// So is the file's content the disk's.
    pub(crate) raw: bool,
    pub(crate) below: bool,
    pub(crate) bitmap: bool,
    pub(crate) direct: bool,
}

impl Shape {
    /// Five clusters and a part of one, which have one L2 table.
    pub(crate) const fn of_clusters(cluster: u64) -> Self {
        Self {
            cluster,
            sectors: 5 * cluster / SECTOR + 5,
            version: 3,
            extended: false,
            zstd: false,
            lazy: false,
            luks: false,
            data_file: false,
            raw: false,
            below: false,
            bitmap: false,
            direct: false,
        }
    }

    /// Everything that does not go together with this.
    pub(crate) fn has_snapshots(&self) -> bool {
        !self.data_file
    }

    /// Bitmaps would not record what it changes.
    pub(crate) fn can_apply(&self) -> bool {
        self.has_snapshots() && !self.bitmap
    }

    pub(crate) fn can_compress(&self) -> bool {
        !self.luks && !self.data_file
    }

    /// What the disk shows at first.
    pub(crate) fn at_first(&self) -> Vec<Tag> {
        // What lies below is shorter.
        let below = if self.below { self.sectors * 3 / 4 } else { 0 };
        (0..self.sectors)
            .map(|sector| if sector < below { BELOW } else { ZEROS })
            .collect()
    }

    /// Makes the image.
    pub(crate) fn create(&self, path: &Path) {
        let mut options = CreateOptions::new(self.sectors * SECTOR);
        options.cluster_size = self.cluster;
        options.version = self.version;
        options.extended_l2 = self.extended;
        options.lazy_refcounts = self.lazy;
        if self.zstd {
            options.compression_type = CompressionType::Zstd;
        }
        if self.data_file {
            // QEMU looks for a relative one where it is itself.
            options.data_file = Some(path.with_file_name("data").into());
            options.data_file_raw = self.raw;
        }
        if self.luks {
            let format = luks1::Format {
                effort: Effort(Duration::from_millis(1)),
                ..luks1::Format::default()
            };
            options.luks = Some(format.make(PASSPHRASE).unwrap().into());
        }
        if self.below {
            let at_first = self.at_first().into_iter();
            let below: Vec<u8> = (0..)
                .zip(at_first.take_while(|&tag| tag == BELOW))
                .flat_map(|(sector, tag)| encode(sector, tag))
                .collect();
            std::fs::write(path.with_file_name("below"), below).unwrap();
            options.backing = Some(Backing {
                file: "below".into(),
                format: Some("raw".to_owned()),
            });
        }
        block_on(chain::create(path, &options)).unwrap();
        if self.bitmap {
            let chain = block_on(chain::open(path, &self.options(1))).unwrap();
            let granularity = Some(SECTOR);
            let action = BitmapAction::Add { granularity };
            block_on(chain.top().change_bitmap(BITMAP.as_bytes(), &action)).unwrap();
            let engine = qcow2_ublk::engine::Engine::new(chain, Default::default());
            block_on(engine.close()).unwrap();
        }
    }

    /// How it is opened for writing.
    pub(crate) fn options(&self, queues: usize) -> chain::Options {
        chain::Options {
            writable: true,
            cache: if self.direct {
                CacheMode::None
            } else {
                CacheMode::Writeback
            },
            image: ImageOptions {
                queues,
                keys: Some(Arc::new(Secret::new(PASSPHRASE.to_vec()))),
                ..ImageOptions::default()
            },
            ..chain::Options::default()
        }
    }

    /// The image as QEMU's programs take it: options, and a name.
    pub(crate) fn for_qemu(&self, path: &Path) -> (Vec<String>, String) {
        let path = path.to_str().unwrap();
        if !self.luks {
            return (vec!["-f".to_owned(), "qcow2".to_owned()], path.to_owned());
        }
        let passphrase = String::from_utf8_lossy(PASSPHRASE);
        let options = [
            "--object".to_owned(),
            format!("secret,id=s,data={passphrase}"),
            "--image-opts".to_owned(),
        ];
        let image =
            format!("driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={path}");
        (options.into(), image)
    }
}
