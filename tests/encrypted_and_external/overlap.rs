//! New metadata of an image with a data file goes nowhere else than into free
//! clusters, whatever the refcounts say.

use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::OverlapCheck;
use qcow2_ublk::storage::sim::{self, SimDisk};
use qcow2_ublk::{ErrorKind, Result};

use crate::common::check::Checked;
use crate::common::lab::{self, How};
use crate::common::{qemu_img, qemu_io};

const M: u64 = 1 << 20;
const CLUSTER: u64 = 1 << 16;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Marks in byte 79 of the header.
const CORRUPT: u8 = 2;
const DATA_FILE: u8 = 4;

fn be64(image: &sim::Image, at: u64) -> u64 {
    u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap())
}

/// An image whose data is in another file, with a bitmap and one L2 table of
/// two; and that file.
fn images() -> [sim::Image; 2] {
    let dir = tempfile::tempdir().unwrap();
    let [path, data] = ["a.qcow2", "data"].map(|name| dir.path().join(name));
    let name = path.to_str().unwrap();
    let option = format!("data_file={}", data.to_str().unwrap());
    let create = ["create", "-q", "-f", "qcow2", "-o", &option, name, "600M"];
    qemu_img(&create);
    qemu_io(&path, &["write -P 7 0 128k"]);
    qemu_img(&["bitmap", "--add", name, "b"]);
    [path, data].map(|path| sim::Image::load(&path).unwrap())
}

/// Writes where there is no L2 table yet.
async fn write_far(engine: &Engine) -> Result<()> {
    lab::write(engine, 0, 513 * M, &[0xee; 4096], false).await
}

/// A cluster of metadata that counts as free would be taken first for the new
/// L2 table: where the template knows it, the write is refused, the image is
/// marked, and both files stay as they were.
#[test]
fn new_tables_are_not_put_over_other_metadata() {
    let [image, data] = images();
    let header = Checked::open(&image).unwrap().header.clone();
    let l1 = header.l1_table_offset.0;
    let reftable = header.refcount_table_offset.0;
    let block = be64(&image, reftable);
    let constant = OverlapCheck::Constant;
    let targets = [
        ("header", 0, constant),
        ("L1 table", l1, constant),
        ("refcount table", reftable, constant),
        (
            "bitmap directory",
            header.bitmaps().unwrap().directory_offset.0,
            constant,
        ),
        ("refcount block", block, OverlapCheck::Cached),
        ("L2 table", be64(&image, l1) & OFFSET, OverlapCheck::Cached),
    ];
    for (what, target, least) in targets {
        for template in [
            OverlapCheck::None,
            OverlapCheck::Constant,
            OverlapCheck::Cached,
            OverlapCheck::All,
        ] {
            let case = format!("{what}, {template:?}");
            let mut image = image.clone();
            image.write(block + target / CLUSTER * 2, &[0, 0]);
            let disk = SimDisk::with_image(image.clone());
            let beside = disk.beside(data.clone());
            let how = How {
                data: Some(beside.clone()),
                overlap_check: template,
                ..How::default()
            };
            let left = lab::block_on(async {
                let engine = lab::open(&disk, &how).await.unwrap();
                let written = write_far(&engine).await;
                if template < least {
                    // Entries that lead into the header are refused later.
                    if what != "header" {
                        written.unwrap_or_else(|e| panic!("{case}: {e:?}"));
                    }
                    assert_ne!(
                        disk.image().bytes(target, CLUSTER),
                        image.bytes(target, CLUSTER)
                    );
                    return None;
                }
                let error = written.expect_err(&case);
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{case}");
                assert!(error.to_string().contains("metadata as free"), "{error}");
                assert_eq!(
                    disk.image().bytes(79, 1)[0] & CORRUPT,
                    CORRUPT,
                    "{case}: marked"
                );
                assert!(write_far(&engine).await.is_err(), "{case}: closed");
                Some(disk.image())
            });
            let Some(mut left) = left else { continue };
            assert_eq!(beside.image(), data, "{case}");
            // The marks, in the header and of the bitmap that records.
            let mut before = image.bytes(target, CLUSTER);
            let mut after = left.bytes(target, CLUSTER);
            match what {
                "header" => [before[79], after[79]] = [0; 2],
                "bitmap directory" => [before[15], after[15]] = [0; 2],
                "refcount block" => {
                    // A count is put back where it was.
                    let at = (target / CLUSTER * 2) as usize;
                    [before[at + 1], after[at + 1]] = [0; 2];
                }
                _ => {}
            }
            assert!(before == after, "{case}: written over");
            lab::with_file(&mut left, |path| {
                let name = path.to_str().unwrap();
                let args = ["check", "-q", "-r", "all", name];
                let ours = std::process::Command::new(crate::PROGRAM)
                    .args(args)
                    .status()
                    .unwrap();
                assert!(ours.success(), "{case}: repaired");
            });
            assert_eq!(left.bytes(79, 1), [DATA_FILE], "{case}");
        }
    }
}

/// Where everything counts as free, the first cluster, which is the header's,
/// would become a refcount block.
#[test]
fn new_refcount_blocks_are_not_put_over_the_header() {
    let [mut image, data] = images();
    let header = Checked::open(&image).unwrap().header.clone();
    image.write(header.refcount_table_offset.0, &[0; 8]);
    let disk = SimDisk::with_image(image.clone());
    let beside = disk.beside(data.clone());
    let how = How {
        data: Some(beside.clone()),
        ..How::default()
    };
    lab::block_on(async {
        let engine = lab::open(&disk, &how).await.unwrap();
        let error = write_far(&engine).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("metadata as free"), "{error}");
        let _ = engine.close().await;
    });
    assert_eq!(beside.image(), data);
    let mut left = disk.image();
    assert_eq!(left.bytes(79, 1), [DATA_FILE | CORRUPT]);
    left.write(79, &[DATA_FILE]);
    assert_eq!(left.bytes(0, CLUSTER), image.bytes(0, CLUSTER));
}
