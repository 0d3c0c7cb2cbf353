//! `rebase` beside `qemu-img rebase`.

use qcow2_ublk::storage::sim::Rng;

use crate::common::half_random;
use crate::place::{Place, assert_same};

/// Writes a file of `len` bytes that has parts in common with others: where
/// the same blocks came out the same, holes of zeros included.
fn write_content(place: &Place, name: &str, len: usize, seed: u64) {
    let (mut rng, mut common) = (Rng::new(seed), Rng::new(7));
    let mut bytes = half_random(len, 1);
    for block in bytes.chunks_mut(16 << 10) {
        // Of the other number, each file takes what it takes.
        let same = common.below(3);
        match (same, rng.below(4)) {
            (0, _) => {}
            (_, 0) => block.fill(0),
            (_, byte) => block.fill(byte as u8),
        }
    }
    std::fs::write(place.path(name), bytes).unwrap();
}

/// A backing file of this format and length, with some layers below if it is
/// qcow2.
fn make_backing(place: &Place, name: &str, format: &str, len: usize, seed: u64) {
    let raw = format!("{name}.raw");
    write_content(place, &raw, len, seed);
    if format == "raw" {
        place.copy(&raw, name);
    } else {
        let args = [
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            "cluster_size=4k",
        ];
        place.qemu_img(&[args.as_slice(), &[&raw, name]].concat());
    }
}

/// What the overlay's own clusters are.
fn make_top(place: &Place, options: &str, backing: Option<(&str, &str)>, size: &str) {
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((name, format)) = backing {
        args.extend(["-b", name, "-F", format]);
    }
    args.extend(["top", size]);
    place.qemu_img(&args);
    let commands = [
        "write -P 200 100k 50k",
        "write -P 201 700k 3k",
        "write -z 300k 64k",
    ];
    place.qemu_io("qcow2", "top", &commands);
}

const OPTIONS: [&str; 5] = [
    "cluster_size=64k",
    "cluster_size=512",
    "compat=0.10,cluster_size=4k",
    "compat=0.10,cluster_size=64k",
    "cluster_size=2M",
];

/// Old and new backing file: format and length. They are longer and shorter
/// than the overlay, which has 1.5 MiB.
const PAIRS: [[(&str, usize); 2]; 6] = [
    [("raw", 1 << 20), ("raw", 2 << 20)],
    [("raw", 2 << 20), ("raw", 1_000_448)],
    [("qcow2", 1_000_448), ("raw", 1536 << 10)],
    [("raw", 999_999), ("qcow2", 2 << 20)],
    [("qcow2", 1536 << 10), ("qcow2", 300 << 10)],
    [("qcow2", 300 << 10), ("qcow2", 4 << 20)],
];

#[test]
fn the_image_goes_on_showing_what_it_shows() {
    for (seed, options) in (1..).zip(OPTIONS) {
        let pairs = [PAIRS[seed as usize], PAIRS[(seed as usize + 3) % 6]];
        for [(old, old_len), (new, new_len)] in pairs {
            let place = Place::new();
            make_backing(&place, "old", old, old_len, seed);
            make_backing(&place, "new", new, new_len, seed + 100);
            make_top(&place, options, Some(("old", old)), "1536k");
            let shown = place.content("qcow2", "top");
            let what = format!("{options}, {old} of {old_len} to {new} of {new_len}");
            assert_eq!(
                place.good(&["rebase", "-b", "new", "-F", new, "top"]),
                "",
                "{what}"
            );
            std::fs::remove_file(place.path("old")).unwrap();
            place.check("top");
            assert_eq!(place.info("top", "backing-filename"), "new");
            assert_eq!(place.info("top", "backing-filename-format"), new);
            assert_same(&place.content("qcow2", "top"), &shown, &what);
            assert_same(&place.our_content("top"), &shown, &what);
            // On to none, and to one again.
            place.good(&["rebase", "-b", "", "top"]);
            assert!(place.info("top", "backing-filename").is_null());
            assert!(place.info("top", "backing-filename-format").is_null());
            std::fs::rename(place.path("new"), place.path("away")).unwrap();
            place.check("top");
            assert_same(
                &place.content("qcow2", "top"),
                &shown,
                &format!("{what}, to none"),
            );
            place.good(&["rebase", "-b", "away", "-F", new, "top"]);
            place.check("top");
            assert_same(
                &place.content("qcow2", "top"),
                &shown,
                &format!("{what}, and back"),
            );
        }
    }
}

#[test]
fn only_what_differs_is_copied() {
    for (options, cluster) in [("cluster_size=64k", 64 << 10), ("cluster_size=4k", 4096)] {
        let place = Place::new();
        let mut bytes = half_random(4 << 20, 3);
        std::fs::write(place.path("old"), &bytes).unwrap();
        for at in [0, 1 << 20, (1 << 20) + 100_000, 3 << 20] {
            bytes[at] ^= 1;
        }
        std::fs::write(place.path("new"), &bytes).unwrap();
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "old", "-F", "raw", "top",
        ];
        place.qemu_img(&args);
        let shown = place.content("qcow2", "top");
        place.good(&["rebase", "-b", "new", "-F", "raw", "top"]);
        place.check("top");
        assert_same(&place.content("qcow2", "top"), &shown, options);
        let text = place.qemu_img(&["map", "--output=json", "top"]);
        let map: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let own: u64 = map
            .iter()
            .filter(|entry| entry["depth"] == 0)
            .map(|entry| entry["length"].as_u64().unwrap())
            .sum();
        assert_eq!(own, 4 * cluster, "{text}");
        // Within the chain nothing need be read: what lies under both is
        // the same file.
        place.qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "over",
        ]);
        place.good(&["rebase", "-b", "new", "-F", "raw", "over"]);
        place.check("over");
        assert_same(&place.content("qcow2", "over"), &shown, options);
        place.good(&["rebase", "-b", "top", "-F", "qcow2", "over"]);
        assert_same(&place.content("qcow2", "over"), &shown, options);
    }
}

/// With -c, what is copied is compressed, and takes no more space than with
/// qemu-img.
#[test]
fn what_is_copied_is_compressed() {
    for (options, old, new) in [
        ("cluster_size=64k", "raw", "qcow2"),
        ("cluster_size=4k,compression_type=zstd", "qcow2", "raw"),
        ("cluster_size=16k,extended_l2=on", "raw", "raw"),
    ] {
        let [ours, theirs] = [(); 2].map(|()| {
            let place = Place::new();
            make_backing(&place, "old", old, 1 << 20, 5);
            make_backing(&place, "new", new, 1_000_448, 6);
            make_top(&place, options, Some(("old", old)), "1536k");
            place
        });
        let shown = ours.content("qcow2", "top");
        let rebase = ["rebase", "-c", "-b", "new", "-F", new, "top"];
        ours.good(&rebase);
        ours.check("top");
        assert_same(&ours.content("qcow2", "top"), &shown, options);
        assert_same(&ours.our_content("top"), &shown, options);
        let map = ours.qemu_img(&["map", "--output=json", "top"]);
        assert!(map.contains("\"compressed\": true"), "{options}: {map}");
        // qemu-img 10.0 dies of an assertion with subclusters.
        if !options.contains("extended_l2") {
            theirs.qemu_img(&rebase);
            let (len, limit) = (ours.len("top"), theirs.len("top") + (256 << 10));
            assert!(len <= limit, "{options}: {len} bytes, theirs {limit}");
        }
    }
    // What cannot be compressed is said before anything is done.
    let place = Place::new();
    make_backing(&place, "old", "raw", 1 << 20, 5);
    let data = place.path("data");
    let options = format!("data_file={}", data.display());
    place.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-o", &options, "-b", "old", "-F", "raw", "top",
    ]);
    let before = std::fs::read(place.path("top")).unwrap();
    let said = place.bad(&["rebase", "-c", "-b", "", "top"]);
    assert!(said.contains("data file"), "{said}");
    assert_eq!(std::fs::read(place.path("top")).unwrap(), before);
}

#[test]
fn unsafe_mode_changes_the_header_alone() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512"] {
        let place = Place::new();
        make_backing(&place, "old", "raw", 1 << 20, 1);
        make_top(&place, options, Some(("old", "raw")), "1536k");
        place.copy("top", "theirs");
        let cluster = place.info("top", "cluster-size").as_u64().unwrap() as usize;
        let before = std::fs::read(place.path("top")).unwrap();
        for (name, format) in [
            ("nosuch", "qcow2"),
            ("a/longer/name/of/a/file", "raw"),
            ("b", "raw"),
        ] {
            let args = ["rebase", "-u", "-b", name, "-F", format];
            place.good(&[args.as_slice(), &["top"]].concat());
            place.qemu_img(&[args.as_slice(), &["theirs"]].concat());
            for key in ["backing-filename", "backing-filename-format"] {
                let (ours, theirs) = (place.info("top", key), place.info("theirs", key));
                assert_eq!(ours, theirs, "{options}");
            }
            let now = std::fs::read(place.path("top")).unwrap();
            assert_eq!(now[cluster..], before[cluster..], "{options}");
            assert_eq!(
                now[24..cluster.min(72)],
                before[24..cluster.min(72)],
                "{options}"
            );
        }
        // Nothing named is none.
        place.good(&["rebase", "-u", "top"]);
        assert!(place.info("top", "backing-filename").is_null());
        place.check("top");
        place.good(&["rebase", "-u", "-b", "old", "-F", "raw", "top"]);
        place.good(&["rebase", "-u", "-b", "", "top"]);
        assert!(place.info("top", "backing-filename").is_null());
        place.check("top");
    }
}

#[test]
fn long_names_fit_or_are_refused() {
    let name = |len: usize| "n".repeat(len);
    for (options, longest) in [
        ("cluster_size=64k", 1023),
        ("cluster_size=4k", 1023),
        ("cluster_size=512", 300),
    ] {
        let place = Place::new();
        place.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "top", "1M"]);
        for len in [longest, longest - 1, 20, longest] {
            let name = name(len);
            place.good(&["rebase", "-u", "-b", &name, "-F", "qcow2", "top"]);
            assert_eq!(place.info("top", "backing-filename"), name);
            assert_eq!(place.info("top", "backing-filename-format"), "qcow2");
        }
        let before = std::fs::read(place.path("top")).unwrap();
        for len in [1024, 4000]
            .into_iter()
            .chain((longest == 300).then_some(400))
        {
            let args = ["rebase", "-u", "-b", &name(len), "-F", "raw", "top"];
            assert_eq!(place.theirs(&args).code, Some(1), "{options}, {len}");
            let said = place.bad(&args);
            assert!(
                said.contains("Could not change the backing file to 'nnn"),
                "{said}"
            );
        }
        assert_eq!(std::fs::read(place.path("top")).unwrap(), before);
    }
}

#[test]
fn other_extensions_and_unknown_ones_stay() {
    let place = Place::new();
    place.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "top",
        "1M",
    ]);
    place.qemu_img(&["bitmap", "--add", "top", "b0"]);
    // An extension that nobody knows, behind QEMU's own.
    let mut bytes = std::fs::read(place.path("top")).unwrap();
    let mut at = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    while bytes[at..at + 4] != [0; 4] {
        let len = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        at += 8 + len.next_multiple_of(8);
    }
    let mut unknown = vec![0x12, 0x34, 0x56, 0x78, 0, 0, 2, 0];
    unknown.extend(half_random(512, 5));
    bytes[at..at + unknown.len()].copy_from_slice(&unknown);
    std::fs::write(place.path("top"), bytes).unwrap();
    for (name, format) in [("first", "raw"), ("second", "qcow2"), ("", "")] {
        let mut args = vec!["rebase", "-u", "-b", name];
        if !name.is_empty() {
            args.extend(["-F", format]);
        }
        args.push("top");
        place.good(&args);
        let bytes = std::fs::read(place.path("top")).unwrap();
        let found = bytes[..4096]
            .windows(unknown.len())
            .any(|part| part == unknown);
        assert!(found, "the unknown extension after {name:?}");
        let text = place.qemu_img(&["info", "-f", "qcow2", "--output=json", "top"]);
        assert!(
            text.contains("\"b0\"") && !text.contains("in-use"),
            "{text}"
        );
        let shown = place.info("top", "backing-filename");
        assert_eq!(shown.as_str().unwrap_or_default(), name);
    }
    place.check("top");
}

#[test]
fn refusals_are_those_of_qemu_img() {
    let place = Place::new();
    make_backing(&place, "old", "raw", 1 << 20, 1);
    make_top(&place, "cluster_size=64k", Some(("old", "raw")), "1M");
    place.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "top", "-F", "qcow2", "over",
    ]);
    let before = std::fs::read(place.path("top")).unwrap();
    for args in [
        ["top"].as_slice(),
        &["-b", "nosuch", "-F", "raw", "top"],
        &["-u", "-b", "old", "top"],
        &["-b", "old", "top"],
        &["-b", "old", "-F", "bogus", "top"],
        &["-b", "over", "-F", "qcow2", "top"],
        &["-b", "top", "-F", "qcow2", "top"],
    ] {
        let args = [&["rebase"], args].concat();
        assert_eq!(place.theirs(&args).code, Some(1), "{args:?}");
        let answer = place.ours(&args);
        assert_ne!(answer.code, Some(0), "{args:?}");
        assert!(answer.out.is_empty() && !answer.err.is_empty(), "{args:?}");
        assert_eq!(
            std::fs::read(place.path("top")).unwrap(),
            before,
            "{args:?}"
        );
    }
    // QEMU takes the file it has open already for what it is not.
    let said = place.bad(&["rebase", "-b", "old", "-F", "qcow2", "top"]);
    assert!(
        said.contains("Could not open new backing file 'old'"),
        "{said}"
    );
    assert_eq!(std::fs::read(place.path("top")).unwrap(), before);
    let said = place.bad(&["rebase", "top"]);
    assert!(said.contains("Must specify backing file (-b) or use unsafe mode (-u)"));
}
