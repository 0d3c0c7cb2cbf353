//! Row by row, what is read and written.

use super::*;

#[test]
fn row_1_and_t1_and_t2_copying_past_a_short_unaligned_backing_file() {
    let folder = Folder::new();
    folder.raw("base", &vec![0x77; 100_352]);
    let path = folder.overlay("top", "base", "raw", "", M);
    let disk = open_rw(&path);
    // T1: the buffer behind the backing file's end is filled.
    assert_reads(&disk, 0, 100_352, 0x77);
    assert_reads(&disk, 100_352, M - 100_352, 0);
    write(&disk, 96 * K, 512, 1);
    assert_reads(&disk, 96 * K, 512, 1);
    assert_reads(&disk, 64 * K, 32 * K, 0x77);
    assert_reads(&disk, 96 * K + 512, 100_352 - 96 * K - 512, 0x77);
    // T2: and so is the copy.
    assert_reads(&disk, 100_352, M - 100_352, 0);
    close_and_compare(disk, &path);
}

#[test]
fn row_2_growing_over_a_longer_backing_file_does_not_show_it() {
    for (compat, cluster) in [("1.1", "65536"), ("0.10", "65536"), ("1.1", "4096")] {
        let folder = Folder::new();
        folder.raw("base", &vec![0x77; 2 * M as usize]);
        let options = format!(",compat={compat},cluster_size={cluster}");
        let path = folder.overlay("top", "base", "raw", &options, M - 512);
        let disk = open_rw(&path);
        write(&disk, M - K, 512, 0x12);
        disk.grow(2 * M + 512).unwrap();
        assert_eq!(disk.size(), 2 * M + 512);
        assert_reads(&disk, 0, M - K, 0x77);
        assert_reads(&disk, M - K, 512, 0x12);
        assert_reads(&disk, M - 512, M + K, 0);
        let content = close_and_compare(disk, &path);
        assert_eq!(content.len() as u64, 2 * M + 512);
    }
}

#[test]
fn growing_moves_the_l1_table_and_an_empty_disk_can_grow() {
    for (cluster, from, to) in [("512", 0, M), ("512", 64 * K, 3 * M), ("65536", 0, 4 << 30)] {
        let folder = Folder::new();
        let path = folder.create("a", &format!("cluster_size={cluster}"), from);
        let disk = open_rw(&path);
        if from > 0 {
            write(&disk, 0, from, 0x31);
        }
        disk.grow(to).unwrap();
        write(&disk, to - 4 * K, 4 * K, 0x32);
        assert_reads(&disk, 0, from, 0x31);
        assert_reads(&disk, from, M - from.min(M) - 4 * K * u64::from(to == M), 0);
        disk.flush().unwrap();
        assert_eq!(disk.grow(to - 512).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(disk.grow(to + 100).unwrap_err().kind(), ErrorKind::Usage);
        disk.close().unwrap();
        qemu_check(&path, false);
        let tail = format!("read -P 0x32 {} 4k", to - 4 * K);
        let seen = qemu_io(&path, &[&tail, &format!("read -P 0x31 0 {from}")]);
        assert!(!seen.contains("verification failed"), "{seen}");
    }
}

#[test]
fn row_3_preallocated_zero_clusters() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    // Made by QEMU, written by us.
    qemu_io(&path, &["write -P 0x11 0 192k", "write -z 0 192k"]);
    let zero = Reader::open(&path).entry(GuestOffset(0));
    assert!(matches!(zero, L2Entry::ZeroAllocated { .. }), "{zero:?}");
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 192 * K, 0);
    write(&disk, 4 * K, 4 * K, 2);
    assert_reads(&disk, 0, 4 * K, 0);
    assert_reads(&disk, 4 * K, 4 * K, 2);
    assert_reads(&disk, 8 * K, 184 * K, 0);
    // Discarding gives the kept cluster back.
    disk.discard_at(64 * K, 64 * K).unwrap();
    write(&disk, 128 * K + 512, 512, 3);
    // Made by us.
    write(&disk, 256 * K, 128 * K, 0x44);
    disk.write_zeroes_at(256 * K, 128 * K, false).unwrap();
    assert_reads(&disk, 256 * K, 128 * K, 0);
    write(&disk, 260 * K, 4 * K, 5);
    assert_reads(&disk, 256 * K, 4 * K, 0);
    assert_reads(&disk, 264 * K, 120 * K, 0);
    close_and_compare(disk, &path);
    let kept = Reader::open(&path).entry(GuestOffset(320 * K));
    assert!(matches!(kept, L2Entry::ZeroAllocated { .. }), "{kept:?}");
    assert_eq!(
        Reader::open(&path).entry(GuestOffset(64 * K)),
        L2Entry::Zero
    );
}

#[test]
fn row_4_writing_into_compressed_clusters() {
    for kind in ["zlib", "zstd"] {
        for cluster in [4 * K, 64 * K, 2 * M] {
            let folder = Folder::new();
            let size = (4 * cluster).clamp(512 * K, 4 * M);
            let mut model = half_random(size as usize, cluster);
            let options = format!("compression_type={kind},cluster_size={cluster}");
            let path = folder.convert(&model, "a", &["-c", "-o", &options]);
            let disk = open_rw(&path);
            assert!(read(&disk, 0, size) == model);
            for at in (0..size).step_by(cluster as usize).map(|c| c + cluster / 2) {
                let len = 4 * K.min(cluster / 8);
                write(&disk, at, len, 0x99);
                model[at as usize..(at + len) as usize].fill(0x99);
            }
            assert!(close_and_compare(disk, &path) == model, "{kind} {cluster}");
        }
    }
}

#[test]
fn row_5_and_t4_snapshots_keep_their_tables_and_clusters() {
    for cluster in ["512", "65536"] {
        let folder = Folder::new();
        let size = 512 * K;
        let original = half_random(size as usize, 5);
        let path = folder.convert(&original, "a", &["-o", &format!("cluster_size={cluster}")]);
        qemu_img(&["snapshot", "-c", "one", name(&path)]);
        let in_snapshot = || qemu_content(&path, &["-l", "snapshot.name=one"]);
        let mut model = original.clone();

        let disk = open_rw(&path);
        write(&disk, 4 * K, 4 * K, 1);
        model[4096..8192].fill(1);
        assert!(close_and_compare(disk, &path) == model, "a write");
        assert!(in_snapshot() == original, "a write");

        let disk = open_rw(&path);
        disk.write_zeroes_at(64 * K, 64 * K, false).unwrap();
        disk.write_zeroes_at(128 * K, 64 * K, true).unwrap();
        model[65536..196_608].fill(0);
        assert!(close_and_compare(disk, &path) == model, "zeros");
        assert!(in_snapshot() == original, "zeros");

        let disk = open_rw(&path);
        disk.discard_at(192 * K, 64 * K).unwrap();
        model[196_608..262_144].fill(0);
        assert!(close_and_compare(disk, &path) == model, "a discard");
        assert!(in_snapshot() == original, "a discard");

        // Applied by QEMU, and written again.
        qemu_img(&["snapshot", "-a", "one", name(&path)]);
        qemu_check(&path, false);
        let disk = open_rw(&path);
        assert!(read(&disk, 0, size) == original, "applied");
        write(&disk, 300 * K, 8 * K, 7);
        close_and_compare(disk, &path);
        assert!(in_snapshot() == original, "after applying");

        // Deleted: the flags were made right by QEMU, and we go by them.
        qemu_img(&["snapshot", "-d", "one", name(&path)]);
        qemu_check(&path, false);
        let disk = open_rw(&path);
        write(&disk, 0, 16 * K, 8);
        disk.discard_at(64 * K, 64 * K).unwrap();
        close_and_compare(disk, &path);
    }
}

#[test]
fn row_6_version_2_discard_does_not_reveal_the_backing_file() {
    let folder = Folder::new();
    folder.raw("base", &vec![0x77; M as usize]);
    let path = folder.overlay("top", "base", "raw", ",compat=0.10", M);
    let disk = open_rw(&path);
    write(&disk, 64 * K, 128 * K, 1);
    disk.discard_at(64 * K, 64 * K).unwrap();
    assert_reads(&disk, 64 * K, 64 * K, 0);
    disk.write_zeroes_at(128 * K, 64 * K, true).unwrap();
    assert_reads(&disk, 128 * K, 64 * K, 0);
    disk.write_zeroes_at(512 * K, 100 * K, true).unwrap();
    assert_reads(&disk, 512 * K, 100 * K, 0);
    close_and_compare(disk, &path);
}

#[test]
fn row_7_refcounts_of_every_width() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let folder = Folder::new();
        let options = format!("refcount_bits={bits},cluster_size=4096");
        let path = folder.create("a", &options, 4 * M);
        let disk = open_rw(&path);
        write(&disk, 0, 2 * M, 1);
        disk.discard_at(512 * K, 512 * K).unwrap();
        disk.flush().unwrap();
        write(&disk, 3 * M, 700 * K, 2);
        let content = close_and_compare(disk, &path);
        assert!(content[..512 << 10].iter().all(|&b| b == 1));
        assert!(content[512 << 10..1 << 20].iter().all(|&b| b == 0));
        qemu_io(&path, &["write -P 0x55 1M 1M", "discard 0 256k"]);
        let disk = open_rw(&path);
        assert_reads(&disk, M, M, 0x55);
        write(&disk, 0, 64 * K, 9);
        close_and_compare(disk, &path);
    }
}

#[test]
fn row_8_a_refcount_never_wraps() {
    let folder = Folder::new();
    let path = folder.create("a", "refcount_bits=1", M);
    let disk = open_rw(&path);
    write(&disk, 0, 256 * K, 1);
    disk.close().unwrap();
    let (code, _) = run("qemu-img", &["snapshot", "-c", "one", name(&path)]);
    assert_ne!(code, Some(0), "a second reference does not fit");
    qemu_check(&path, true);
    let disk = open_rw(&path);
    assert_reads(&disk, 0, 256 * K, 1);
    write(&disk, 128 * K, 256 * K, 2);
    assert_reads(&disk, 0, 128 * K, 1);
    disk.close().unwrap();
    qemu_check(&path, true);
}

#[test]
fn row_9_refcount_blocks_count_themselves_and_the_table_grows() {
    for bits in ["16", "64"] {
        let folder = Folder::new();
        let options = format!("cluster_size=512,refcount_bits={bits}");
        let path = folder.create("a", &options, 16 * M);
        let before = Reader::open(&path).header.refcount_table_clusters;
        let disk = open_rw(&path);
        for at in 0..16 {
            write(&disk, at * M, M, at as u8 + 1);
        }
        let content = close_and_compare(disk, &path);
        for (at, chunk) in content.chunks(1 << 20).enumerate() {
            assert!(chunk.iter().all(|&b| b == at as u8 + 1));
        }
        assert!(Reader::open(&path).header.refcount_table_clusters > before);
    }
}

#[test]
fn row_11_a_virtual_end_inside_a_cluster() {
    for compat in ["0.10", "1.1"] {
        let folder = Folder::new();
        let size = 1_000_448;
        let path = folder.create("a", &format!("compat={compat}"), size);
        let disk = open_rw(&path);
        let tail = size - 32 * K;
        write(&disk, tail, 32 * K, 1);
        assert_reads(&disk, tail, 32 * K, 1);
        let end = disk.write_at(&[0; 512], size).unwrap_err();
        assert_eq!(end.kind(), ErrorKind::OutOfBounds);
        let end = disk.write_at(&[0; 1024], size - 512).unwrap_err();
        assert_eq!(end.kind(), ErrorKind::OutOfBounds);
        disk.write_zeroes_at(size - 4 * K, 4 * K, true).unwrap();
        assert_reads(&disk, size - 4 * K, 4 * K, 0);
        assert_reads(&disk, tail, 28 * K, 1);
        disk.discard_at(size / (64 * K) * (64 * K), size % (64 * K))
            .unwrap();
        write(&disk, size - 512, 512, 3);
        close_and_compare(disk, &path);
    }
}

#[test]
fn row_13_unknown_bits_and_extensions() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    add_extension(&path);
    // Bit 40 of each, in big-endian words of 8 bytes at 80 and 88.
    let bit = (1_u64 << 40).to_be_bytes();
    poke(&path, 80, &bit);
    poke(&path, 88, &bit);
    let before = std::fs::read(&path).unwrap();

    // Who only reads changes nothing, nor does who could write but does not.
    let disk = open_ro(&path);
    assert_reads(&disk, 0, M, 0);
    disk.close().unwrap();
    assert!(
        std::fs::read(&path).unwrap() == before,
        "a read-only open wrote"
    );
    let disk = open_rw(&path);
    assert_reads(&disk, 0, M, 0);
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(
        std::fs::read(&path).unwrap() == before,
        "an idle open wrote"
    );

    // The first write clears the unknown autoclear bit, and nothing else.
    let disk = open_rw(&path);
    write(&disk, 0, 512, 1);
    assert_eq!(peek(&path, 88, 8), [0; 8], "cleared before anything else");
    disk.grow(2 * M).unwrap();
    disk.close().unwrap();
    let mut expected = before[..4096].to_vec();
    expected[88..96].fill(0);
    expected[24..32].copy_from_slice(&(2 * M).to_be_bytes());
    assert!(peek(&path, 0, 4096) == expected, "another field changed");
    qemu_check(&path, false);

    // An unknown incompatible bit is refused.
    poke(&path, 72, &bit);
    refused(&path, &chain::Options::default(), ErrorKind::Unsupported);
}

#[test]
fn row_14_and_t6_bitmaps_are_untouched_by_readers_and_recorded_by_writers() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    qemu_img(&["bitmap", "--add", name(&path), "b0"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    let before = std::fs::read(&path).unwrap();
    assert_eq!(peek(&path, 95, 1), [1], "bitmaps are consistent");
    let disk = open_ro(&path);
    assert_reads(&disk, 0, 64 * K, 1);
    disk.close().unwrap();
    let disk = open_rw(&path);
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "an open wrote");
    let disk = open_rw(&path);
    write(&disk, 128 * K, 512, 2);
    let marked = || qemu_img(&["info", "-U", name(&path)]).contains("in-use");
    assert!(marked(), "before the write, not after it");
    disk.grow(2 * M).unwrap();
    assert!(marked());
    disk.close().unwrap();
    assert!(!marked());
    let content = open_ro(&path).bitmap("b0").unwrap();
    let dirty = |offset| content.is_dirty(offset);
    assert!(dirty(0) && dirty(128 * K) && !dirty(64 * K) && !dirty(M));
    qemu_check(&path, false);
}

#[test]
fn row_16_an_image_marked_corrupt_is_not_written_to() {
    let folder = Folder::new();
    let path = folder.create("a", "lazy_refcounts=on", M);
    qemu_io(&path, &["write -P 5 0 64k"]);
    poke(&path, 79, &[2]);
    let before = std::fs::read(&path).unwrap();
    refused(&path, &writable(), ErrorKind::Corrupt);
    let disk = open_ro(&path);
    assert_reads(&disk, 0, 64 * K, 5);
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}

/// Whether or not the image has lazy refcounts: whoever writes to it counts
/// first, and nobody else changes anything.
#[test]
fn row_15_an_image_marked_dirty_is_repaired_by_its_next_writer() {
    for options in ["lazy_refcounts=on", ""] {
        let folder = Folder::new();
        let path = folder.create("a", options, M);
        qemu_io(&path, &["write -P 5 0 128k"]);
        let reader = Reader::open(&path);
        let block = reader.be64(reader.header.refcount_table_offset);
        let data = reader.file.len() as u64 / 65536 - 1;
        poke(&path, block + data * 2, &[0, 0]);
        poke(&path, 79, &[1]);
        let before = std::fs::read(&path).unwrap();
        let disk = open_ro(&path);
        assert_reads(&disk, 0, 128 * K, 5);
        disk.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == before);

        // An open that fails for another reason changes nothing.
        let over = folder.path("over");
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "a"];
        qemu_img(&[args.as_slice(), &[name(&over)]].concat());
        poke(&over, 79, &[1]);
        let hidden = folder.path("hidden");
        std::fs::rename(&path, &hidden).unwrap();
        let dirty = std::fs::read(&over).unwrap();
        refused(&over, &writable(), ErrorKind::NotFound);
        assert!(std::fs::read(&over).unwrap() == dirty);
        std::fs::rename(&hidden, &path).unwrap();

        let disk = open_rw(&path);
        assert_eq!(peek(&path, 79, 1), [0], "the mark is gone");
        let found = qcow2_ublk::report::check(&path, true, |_| {}).unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0));
        assert_reads(&disk, 0, 128 * K, 5);
        write(&disk, 256 * K, 64 * K, 6);
        disk.close().unwrap();
        assert_eq!(peek(&path, 79, 1), [0]);
        check_clean(&path);
        qemu_io(&path, &["read -P 5 0 128k", "read -P 6 256k 64k"]);
    }
}

#[test]
fn row_18_l2_entry_aimed_at_the_reftable() {
    let folder = Folder::new();
    let path = folder.create("a", "", M);
    qemu_io(&path, &["write -P 1 0 192k"]);
    let reader = Reader::open(&path);
    let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    let reftable = reader.header.refcount_table_offset.0;
    let entry = reftable | 1 << 63;
    poke(&path, l2 + 8, &entry.to_be_bytes());
    let before = peek(&path, reftable, 65536);
    let disk = open_rw(&path);
    for (offset, len) in [(64 * K, 512), (64 * K, 64 * K), (0, 192 * K)] {
        let error = disk
            .write_at(&vec![0xff; len as usize], offset)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    // Nobody writes from then on, and everybody reads; the image says why.
    let error = disk.write_at(&[3; 512], 128 * K).unwrap_err();
    assert!(error.to_string().contains("corrupt"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_reads(&disk, 128 * K, 64 * K, 1);
    disk.flush().unwrap();
    drop(disk);
    assert!(
        peek(&path, reftable, 65536) == before,
        "the table was written over"
    );
    assert_eq!(peek(&path, 79, 1), [2]);
    refused(&path, &writable(), ErrorKind::Corrupt);
    // Until it is repaired.
    qcow2_ublk::report::repair(&path, qcow2_ublk::qcow2::check::Repair::All, |_| {}).unwrap();
    assert_eq!(peek(&path, 79, 1), [0]);
    check_clean(&path);
    let disk = open_rw(&path);
    write(&disk, 64 * K, 512, 0xff);
    assert_reads(&disk, 128 * K, 64 * K, 1);
    disk.close().unwrap();
    check_clean(&path);
}

/// For QEMU such an entry is unallocated (its check says nothing, and its reads
/// go to what is below), or zeros where it says so; what it makes of such an
/// image, we make of it.
#[test]
fn copied_without_an_offset_says_nothing() {
    for (options, zeros) in [
        (",compat=0.10", None),
        (",compat=1.1", Some(vec![1 << 63 | 1_u64])),
        (",extended_l2=on", Some(vec![1 << 63, 0xffff_ffff << 32])),
    ] {
        let folder = Folder::new();
        folder.raw("base", &vec![0x77; M as usize]);
        let path = folder.overlay("top", "base", "raw", options, M);
        qemu_io(&path, &["write -P 1 0 64k"]);
        let reader = Reader::open(&path);
        let l2 = reader.be64(reader.header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
        let len = reader.geometry().l2_entry_bytes();
        let set = |cluster: u64, words: &[u64]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            poke(&path, l2 + cluster * len, &bytes);
        };
        for cluster in 1..8 {
            set(cluster, &[1 << 63]);
        }
        for cluster in 8..12 {
            set(cluster, zeros.as_deref().unwrap_or(&[1 << 63]));
        }
        let zeros = if zeros.is_some() { 0 } else { 0x77 };
        let found = qcow2_ublk::report::check(&path, true, |_| {}).unwrap();
        assert_eq!(
            (found.corruptions, found.check_errors, found.leaks),
            (0, 0, 0)
        );
        check_clean(&path);
        let before = std::fs::read(&path).unwrap();
        qcow2_ublk::report::repair(&path, qcow2_ublk::qcow2::check::Repair::All, |_| {}).unwrap();
        assert!(
            std::fs::read(&path).unwrap() == before,
            "a repair is nothing to it"
        );
        // The same requests to us and to QEMU.
        let theirs = folder.path("theirs");
        std::fs::copy(&path, &theirs).unwrap();
        let disk = open_rw(&path);
        assert_reads(&disk, 64 * K, 448 * K, 0x77);
        assert_reads(&disk, 512 * K, 256 * K, zeros);
        write(&disk, 64 * K, 64 * K, 2);
        write(&disk, 130 * K, 4 * K, 3);
        disk.write_zeroes_at(192 * K, 64 * K, false).unwrap();
        disk.discard_at(256 * K, 64 * K).unwrap();
        write(&disk, 514 * K, 4 * K, 4);
        disk.write_zeroes_at(576 * K, 64 * K, true).unwrap();
        disk.discard_at(640 * K, 64 * K).unwrap();
        let ours = close_and_compare(disk, &path);
        let requests = [
            "write -P 2 64k 64k",
            "write -P 3 130k 4k",
            "write -z 192k 64k",
            "discard 256k 64k",
            "write -P 4 514k 4k",
            "write -z -u 576k 64k",
            "discard 640k 64k",
        ];
        qemu_io(&theirs, &requests);
        assert!(
            qemu_content(&theirs, &[]) == ours,
            "{options}: QEMU made another disk"
        );
        assert!(
            read(&open_ro(&theirs), 0, M) == ours,
            "{options}: we read another disk"
        );
        check_clean(&theirs);
    }
}

#[test]
fn row_24_discarded_and_reused_clusters_keep_the_new_data() {
    let folder = Folder::new();
    let path = folder.create("a", "cluster_size=4096", 4 * M);
    let disk = open_rw(&path);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let disk = &disk;
            scope.spawn(move || {
                let start = thread * M;
                for round in 0..60_u64 {
                    let at = start + round % 7 * 64 * K;
                    let byte = (thread * 60 + round + 1) as u8;
                    write(disk, at, 96 * K, byte);
                    if round % 5 == 0 {
                        disk.flush().unwrap();
                    }
                    assert_reads(disk, at, 96 * K, byte);
                    disk.discard_at(at, 64 * K).unwrap();
                    assert_reads(disk, at, 64 * K, 0);
                    assert_reads(disk, at + 64 * K, 32 * K, byte);
                }
            });
        }
    });
    close_and_compare(disk, &path);
}

#[test]
fn discarded_space_returns_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new();
    let path = folder.create("a", "", 16 * M);
    let disk = open_rw(&path);
    write(&disk, 0, 16 * M, 1);
    disk.flush().unwrap();
    let full = std::fs::metadata(&path).unwrap().blocks() * 512;
    disk.discard_at(0, 15 * M).unwrap();
    disk.flush().unwrap();
    let empty = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(full > 16 * M && empty < 3 * M, "{full} bytes, then {empty}");
    assert_reads(&disk, 15 * M, M, 1);
    close_and_compare(disk, &path);
}
