//! Mistakes seen in other programs that serve images (T1 to T13, where they are
//! no row as well).

use super::*;

#[test]
fn t3_a_new_cluster_in_used_space_shows_nothing_old() {
    for cluster in ["4096", "65536"] {
        let folder = Folder::new();
        let path = folder.create("a", &format!("cluster_size={cluster}"), 4 * M);
        qemu_io(&path, &["write -P 0x55 0 2M"]);
        // Free by the refcounts, not by the file system.
        qemu_io(&path, &["discard 0 2M"]);
        let reader = Reader::open(&path);
        for cluster in 3..reader.file.len() as u64 / reader.geometry().cluster_size() {
            if reader.refcount(cluster) == 0 {
                let size = reader.geometry().cluster_size();
                poke(&path, cluster * size, &vec![0x55; size as usize]);
            }
        }
        let disk = open_rw(&path);
        for at in (0..2 * M).step_by(128 << 10) {
            write(&disk, 2 * M + at + 1024, 512, 0x66);
            assert_reads(&disk, 2 * M + at, 1024, 0);
            assert_reads(&disk, 2 * M + at + 1536, 62 * K, 0);
        }
        close_and_compare(disk, &path);
    }
}

#[test]
fn t5_encrypted_images_are_refused_not_read_as_they_are() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    for method in [1_u8, 2, 3] {
        poke(&path, 35, &[method]);
        let error = Disk::open(&path, &chain::Options::default()).unwrap_err();
        let kind = error.kind();
        assert!(
            matches!(
                kind,
                ErrorKind::Unsupported | ErrorKind::InvalidFormat | ErrorKind::Permission
            ),
            "{method}: {error}"
        );
    }
}

#[test]
fn t7_the_largest_clusters_and_narrowest_refcounts() {
    watched(60, || {
        for (options, size) in [
            ("cluster_size=2M,refcount_bits=1", 64 * M),
            ("cluster_size=2M,refcount_bits=64", 64 * M),
            ("cluster_size=128k,refcount_bits=1", 16 * M),
        ] {
            let folder = Folder::new();
            let path = folder.create("a", options, size);
            let disk = open_rw(&path);
            write(&disk, M, 5 * M, 1);
            disk.discard_at(0, size).unwrap();
            disk.flush().unwrap();
            write(&disk, 3 * M, 512, 2);
            assert_reads(&disk, 0, 3 * M, 0);
            close_and_compare(disk, &path);
        }
    });
}

#[test]
fn t8_compressed_end_at_cluster_boundary() {
    let folder = Folder::new();
    let mut model = half_random(2 << 20, 8);
    let path = folder.convert(&model, "a", &["-c", "-o", "cluster_size=4096"]);
    let reader = Reader::open(&path);
    let at_boundary: Vec<u64> = (0..2 * M)
        .step_by(4096)
        .filter(|&at| {
            matches!(reader.entry(GuestOffset(at)), L2Entry::Compressed(range)
                if (range.offset.0 + range.max_len).is_multiple_of(4096))
        })
        .collect();
    assert!(at_boundary.len() > 5, "the image does not have the case");
    let disk = open_rw(&path);
    for &at in &at_boundary {
        write(&disk, at + 512, 512, 0xc3);
        model[at as usize + 512..at as usize + 1024].fill(0xc3);
    }
    disk.flush().unwrap();
    // What was freed is used again: nobody else's data may suffer.
    for at in (0..2 * M).step_by(16 << 10) {
        write(&disk, at, 512, 0x99);
        model[at as usize..at as usize + 512].fill(0x99);
    }
    assert!(close_and_compare(disk, &path) == model);
}

#[test]
fn t9_backing_names_are_relative_to_the_image() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("sub")).unwrap();
    folder.raw("base", &[0x77; 65536]);
    let path = folder.path("sub/top");
    let trusted = chain::Options {
        policy: chain::Policy {
            trust_chain: true,
            ..chain::Policy::default()
        },
        ..chain::Options::default()
    };
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "../base"];
    qemu_img(&[args.as_slice(), &[name(&path), "64k"]].concat());
    // The tests' own folder is another one.
    let disk = Disk::open(&path, &trusted).unwrap();
    assert_reads(&disk, 0, 64 * K, 0x77);
}

#[test]
fn t10_version_2_headers_end_at_byte_72() {
    let folder = Folder::new();
    folder.raw("base", &[0x77; 65536]);
    let path = folder.overlay("top", "base", "raw", ",compat=0.10", 64 * K);
    assert_eq!(
        peek(&path, 72, 4),
        [0xe2, 0x79, 0x2a, 0xca],
        "an extension at 72"
    );
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 64 * K, 0x77);
    write(&disk, 512, 512, 1);
    disk.flush().unwrap();
    disk.grow(M).unwrap();
    close_and_compare(disk, &path);
    assert_eq!(peek(&path, 72, 4), [0xe2, 0x79, 0x2a, 0xca]);
}

/// What a flush does, in order: data and refcounts, a sync that is one, the
/// mapping, another.
#[test]
fn t12_row_25_a_flush_is_two_real_syncs_around_the_mapping() {
    let disk = SimDisk::with_image(lab::created("", M));
    lab::block_on(async {
        let engine = lab::open(&disk, &How::default()).await.unwrap();
        lab::write(&engine, 0, 0, &[0x11; 4096], false)
            .await
            .unwrap();
        engine.flush().await.unwrap();
        let image = disk.image();
        let checked = Checked::open(&image).unwrap();
        let header = &checked.header;
        let l1 = header.l1_table_offset.0;
        let word = image.bytes(l1, 8);
        let l2 = u64::from_be_bytes(word.try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        let (mut kinds, mut syncs) = (String::new(), 0);
        for record in disk.history().records {
            match record.change {
                Change::Sync => {
                    kinds.push('|');
                    syncs += 1;
                }
                // A new table's zeros are no mapping yet.
                Change::Write { bytes, .. } if bytes.iter().all(|&b| b == 0) => {}
                Change::Write { offset, .. } if offset == l2 => kinds.push('L'),
                Change::Write { offset, .. } if offset == l1 => kinds.push('1'),
                Change::Write { bytes, .. } if bytes.iter().all(|&b| b == 0x11) => kinds.push('D'),
                Change::Write { .. } => kinds.push('R'),
                _ => {}
            }
        }
        let mapping = kinds.find(['L', '1']).unwrap();
        let (before, after) = kinds.split_at(mapping);
        assert!(before.contains('D') && before.contains('R'), "{kinds}");
        assert!(before.ends_with('|') && after.ends_with('|'), "{kinds}");
        assert!(after.contains('L') && after.contains('1'), "{kinds}");
        assert_eq!(syncs, 2, "{kinds}");
        // With nothing allocated it is one.
        let records = disk.recorded();
        lab::write(&engine, 0, 512, &[0x22; 512], false)
            .await
            .unwrap();
        engine.flush().await.unwrap();
        assert_eq!(disk.recorded() - records, 2, "a write and a sync");
    });
}

#[test]
fn t13_copies_of_several_clusters_go_on_side_by_side() {
    let disk = SimDisk::with_image(lab::created("", 4 * M));
    // The backing file is on a disk of its own, which is slow.
    let how = How {
        below: Below::Raw(sim::Image::from_bytes(&vec![0x77; 4 << 20])),
        ..How::default()
    };
    watched(30, || {
        lab::block_on(async {
            let engine = Arc::new(lab::open(&disk, &how).await.unwrap());
            // The L2 table is there.
            lab::write(&engine, 0, 3 * M, &[1; 512], false)
                .await
                .unwrap();
            let hold = disk.hold(|request| request.kind == SimKind::Write && request.len >= 64 * K);
            let writes: Vec<_> = (0..8)
                .map(|n| {
                    let engine = Arc::clone(&engine);
                    spawn(async move {
                        lab::write(&engine, 0, n * 64 * K + 512, &[n as u8; 512], false).await
                    })
                })
                .collect();
            // All eight are copying before the first is done.
            hold.wait_for(8).await;
            hold.release();
            for write in writes {
                write.await.unwrap();
            }
            let bytes = lab::read(&engine, 0, 0, 512 * K).await.unwrap();
            for (n, cluster) in bytes.chunks(64 << 10).enumerate() {
                assert!(cluster[512..1024].iter().all(|&b| b == n as u8));
                assert!(
                    cluster[..512]
                        .iter()
                        .chain(&cluster[1024..])
                        .all(|&b| b == 0x77)
                );
            }
        });
    });
}
