//! What an owner does with bitmaps, as `qemu-img bitmap` does it.

use super::*;

#[test]
fn actions_as_qemu_img() {
    let folder = Folder::new();
    let (a, b) = (
        folder.create("a", "", 10 * M),
        folder.create("b", "", 10 * M),
    );
    let source = folder.create("source", "", 10 * M);
    qemu_img(&["bitmap", "--add", "-g", "4k", name(&source), "fine"]);
    qemu_io(&source, &["write 12k 4k", "write 5M 1M"]);
    let other_size = folder.create("other", "", 20 * M);
    qemu_img(&["bitmap", "--add", name(&other_size), "x"]);
    let long = "x".repeat(1024);
    let longest = "y".repeat(1023);
    let from = |image| ["-b", image, "-F", "qcow2"];
    let steps: Vec<Vec<&str>> = vec![
        vec!["--add", "I", "b0"],
        vec!["--add", "I", "b0"],
        vec!["--add", "--disable", "-g", "64k", "I", "b1"],
        vec!["--add", "-g", "2G", "I", "coarse"],
        vec!["--add", "-g", "4G", "I", "b2"],
        vec!["--add", "-g", "256", "I", "b2"],
        vec!["--add", "-g", "1000", "I", "b2"],
        vec!["--add", "I", ""],
        vec!["--add", "I", &long],
        vec!["--add", "I", &longest],
        vec!["--remove", "I", &longest],
        vec!["--remove", "I", "nope"],
        vec!["--clear", "I", "nope"],
        vec!["--merge", "nope", "I", "b0"],
        [&["--merge", "fine"], &from(name(&source))[..], &["I", "b1"]].concat(),
        [
            &["--merge", "fine"],
            &from(name(&source))[..],
            &["I", "coarse"],
        ]
        .concat(),
        [
            &["--merge", "x"],
            &from(name(&other_size))[..],
            &["I", "b1"],
        ]
        .concat(),
        vec![
            "--add",
            "-g",
            "512",
            "--merge",
            "b1",
            "--disable",
            "I",
            "b3",
        ],
        vec!["--merge", "b3", "I", "b3"],
        vec!["--clear", "I", "b1"],
        vec!["--clear", "--clear", "--enable", "--enable", "I", "b1"],
        vec!["--disable", "--remove", "--add", "I", "b0"],
        vec!["--add", "--disable", "--add", "I", "half"],
    ];
    for step in steps {
        let for_image = |image: &Path| -> Vec<String> {
            let name = |&word: &&str| if word == "I" { name(image) } else { word }.to_owned();
            step.iter().map(name).collect()
        };
        let qemu_args = [vec!["bitmap".to_owned()], for_image(&b)].concat();
        let (qemu_code, qemu_text) = run("qemu-img", &qemu_args);
        let our_args = for_image(&a);
        let our_args: Vec<&str> = our_args.iter().map(String::as_str).collect();
        let (code, text) = ours(&our_args);
        assert_eq!(code, qemu_code, "{step:?}: {text} {qemu_text}");
        if code != Some(0) {
            assert_eq!(message(&text), message(&qemu_text), "{step:?}");
        }
        assert_eq!(listed(&a), listed(&b), "{step:?}");
        qemu_check(&a, false);
    }
    for bitmap in ["b0", "b1", "b3", "coarse"] {
        assert_eq!(ranges(&a, bitmap), qemu_ranges(&b, bitmap), "{bitmap}");
        assert_eq!(qemu_ranges(&a, bitmap), qemu_ranges(&b, bitmap), "{bitmap}");
    }
    assert_eq!(
        ranges(&a, "b3"),
        [(0, 64 * K), (5 * M, M)],
        "granules of b1"
    );
    for bitmap in ["b0", "b1", "b3", "coarse", "half"] {
        ours_ok(&["--remove", name(&a), bitmap]);
    }
    assert_eq!(std::fs::read(&a).unwrap()[95], 0, "no bitmaps, no bit");
    assert!(!qemu_img(&["info", name(&a)]).contains("bitmaps"));
    qemu_check(&a, false);
}

#[test]
fn version_2_and_disks_too_large_have_none() {
    let folder = Folder::new();
    let old = folder.create("old", "compat=0.10", M);
    let (code, text) = ours(&["--add", name(&old), "b"]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("Cannot store dirty bitmaps in qcow2 v2 files"),
        "{text}"
    );
    let huge = folder.create("huge", "", 10 << 40);
    let (code, text) = ours(&["--add", "-g", "512", name(&huge), "b"]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("Too much space will be occupied by the bitmap"),
        "{text}"
    );
    assert_eq!(listed(&huge), serde_json::Value::Null);
    let empty = folder.create("empty", "", 0);
    assert_eq!(ours(&["--add", name(&empty), "b"]).0, Some(1));
    // The largest that fits takes no memory and hardly any space.
    ours_ok(&["--add", "-g", "4k", name(&huge), "b"]);
    let disk = open(&huge, true);
    disk.write_at(&[1], (10 << 40) - 1).unwrap();
    disk.close().unwrap();
    assert_eq!(qemu_ranges(&huge, "b"), [((10 << 40) - 4096, 4096)]);
    qemu_check(&huge, false);
}

#[test]
fn a_live_disk_gets_bitmaps_and_loses_them() {
    let folder = Folder::new();
    let path = folder.create("a", "", 4 * M);
    let disk = open(&path, true);
    disk.write_at(&[1; 512], 0).unwrap();
    let add = BitmapAction::Add {
        granularity: Some(64 * K),
    };
    disk.change_bitmap("late", &add).unwrap();
    disk.change_bitmap("gone", &add).unwrap();
    disk.write_at(&[1; 512], M).unwrap();
    disk.change_bitmap("gone", &BitmapAction::Remove).unwrap();
    disk.change_bitmap("later", &add).unwrap();
    disk.change_bitmap("stopped", &add).unwrap();
    disk.write_at(&[1; 512], 2 * M).unwrap();
    disk.change_bitmap("stopped", &BitmapAction::Disable)
        .unwrap();
    disk.change_bitmap("cleared", &add).unwrap();
    disk.write_at(&[1; 512], 3 * M).unwrap();
    disk.change_bitmap("cleared", &BitmapAction::Clear).unwrap();
    let later = disk.bitmap("later").unwrap();
    assert_eq!(later.count(), 2 * 64 * K);
    disk.change_bitmap(
        "cleared",
        &BitmapAction::Merge(&disk.bitmap("stopped").unwrap()),
    )
    .unwrap();
    let flags = |path: &Path| {
        let info = qemu_img(&["info", "-U", "--output=json", name(path)]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let bitmaps = info["format-specific"]["data"]["bitmaps"].clone();
        let flags = |b: &serde_json::Value| (b["name"].to_string(), b["flags"].to_string());
        bitmaps
            .as_array()
            .unwrap()
            .iter()
            .map(flags)
            .collect::<Vec<_>>()
    };
    // Whatever happens now, nothing that is out of date can be believed.
    for (bitmap, flags) in flags(&path) {
        let expected = if bitmap.contains("stopped") {
            "[]"
        } else {
            "[\"in-use\",\"auto\"]"
        };
        assert_eq!(flags, expected, "{bitmap}");
    }
    disk.close().unwrap();
    for (bitmap, places) in [
        ("late", &[M, 2 * M, 3 * M][..]),
        ("later", &[2 * M, 3 * M]),
        ("stopped", &[2 * M]),
        ("cleared", &[2 * M]),
    ] {
        let expected: Vec<_> = places.iter().map(|&at| (at, 64 * K)).collect();
        assert_eq!(qemu_ranges(&path, bitmap), expected, "{bitmap}");
    }
    assert_eq!(listed(&path).as_array().unwrap().len(), 4);
    qemu_check(&path, false);
}
