//! `commit` beside `qemu-img commit`.

use qcow2_ublk::storage::sim::Rng;
use qcow2_ublk::{Disk, chain};

use crate::common::half_random;
use crate::place::{Place, assert_same};

/// A base, what is between, and the top: format, `-o` options, size.
type Shape = [(&'static str, &'static str, &'static str); 3];

const SHAPES: [Shape; 5] = [
    [
        ("raw", "", "2M"),
        ("qcow2", "cluster_size=64k", "2M"),
        ("qcow2", "cluster_size=4k", "2M"),
    ],
    // Every layer longer than the one below.
    [
        ("qcow2", "cluster_size=512", "1000448"),
        ("qcow2", "cluster_size=4k", "1500k"),
        ("qcow2", "compat=0.10", "2M"),
    ],
    // The one between hides the end of the base.
    [
        ("qcow2", "compat=0.10,cluster_size=2M", "3M"),
        ("qcow2", "cluster_size=4k", "1000448"),
        ("qcow2", "cluster_size=512", "2500k"),
    ],
    [
        ("raw", "", "1000448"),
        ("qcow2", "compat=0.10,cluster_size=4k", "1M"),
        ("qcow2", "cluster_size=2M", "3M"),
    ],
    // The overlay is the shortest.
    [
        ("qcow2", "cluster_size=4k", "4M"),
        ("qcow2", "cluster_size=64k", "2M"),
        ("qcow2", "cluster_size=64k", "1M"),
    ],
];

const NAMES: [&str; 3] = ["base", "middle", "top"];

/// Makes the chain, each layer with random writes.
fn make(place: &Place, shape: &Shape, seed: u64) {
    let mut rng = Rng::new(seed);
    for (depth, ((format, options, size), name)) in shape.iter().zip(NAMES).enumerate() {
        let mut args = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if depth > 0 {
            args.extend(["-b", NAMES[depth - 1], "-F", shape[depth - 1].0]);
        }
        args.extend([name, size]);
        place.qemu_img(&args);
        let size = match *format {
            "raw" => place.len(name),
            _ => place.info(name, "virtual-size").as_u64().unwrap(),
        };
        let mut commands = Vec::new();
        for _ in 0..10 {
            let at = rng.below(size / 512) * 512;
            let len = ((1 + rng.below(300)) * 512).min(size - at);
            let what = match rng.below(5) {
                0 => "-z".to_owned(),
                _ => format!("-P {}", 1 + rng.below(255)),
            };
            commands.push(format!("write {what} {at} {len}"));
        }
        if depth == 0 {
            commands.push(format!("write -P 77 {} 512", size - 512));
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        place.qemu_io(format, name, &commands);
    }
}

#[test]
fn the_base_gets_what_the_overlay_has_and_the_overlay_is_emptied() {
    for (seed, shape) in (1..).zip(&SHAPES) {
        let (ours, theirs) = (Place::new(), Place::new());
        make(&ours, shape, seed);
        make(&theirs, shape, seed);
        let shown = ours.content("qcow2", "top");
        let beside = half_random(100, 1);
        assert!(shown != beside);
        for (name, below) in [("top", "middle"), ("middle", "base")] {
            assert_eq!(ours.good(&["commit", name]), "Image committed.\n");
            theirs.qemu_img(&["commit", "-q", name]);
            for name in NAMES
                .iter()
                .filter(|n| **n != "base" || shape[0].0 == "qcow2")
            {
                ours.check(name);
            }
            let what = format!("shape {seed}, {name} into {below}");
            for (name, (format, ..)) in NAMES.iter().zip(shape) {
                let (ours, theirs) = (ours.content(format, name), theirs.content(format, name));
                assert_same(&ours, &theirs, &format!("{what}: {name}"));
            }
            assert_same(&ours.our_content("top"), &shown, &what);
            let text = ours.qemu_img(&["map", "--output=json", name]);
            assert!(
                !text.contains("\"depth\": 0, \"present\": true"),
                "{what}: {text}"
            );
            let (len, limit) = (ours.len(name), theirs.len(name).max(1 << 20));
            assert!(
                len <= limit,
                "{what}: {len} bytes of file, {limit} with qemu-img"
            );
        }
    }
}

#[test]
fn several_layers_go_into_a_base_further_down() {
    for (seed, shape) in (11..).zip(&SHAPES) {
        for by_path in [false, true] {
            let place = Place::new();
            make(&place, shape, seed);
            let shown = place.content("qcow2", "top");
            let before = std::fs::read(place.path("top")).unwrap();
            let path = place.path("base");
            let base = if by_path {
                path.to_str().unwrap()
            } else {
                "base"
            };
            place.good(&["commit", "-q", "-b", base, "top"]);
            if shape[0].0 == "qcow2" {
                place.check("base");
            }
            // The overlay keeps what it has, so that it goes on showing it.
            assert_eq!(std::fs::read(place.path("top")).unwrap(), before);
            assert_same(&place.content("qcow2", "top"), &shown, "the top");
            let base = place.content(shape[0].0, "base");
            assert!(base.len() >= shown.len());
            assert_same(&base[..shown.len()], &shown, "the base");
        }
    }
}

#[test]
fn a_dropped_overlay_is_not_touched() {
    let place = Place::new();
    make(&place, &SHAPES[0], 31);
    let before = std::fs::read(place.path("top")).unwrap();
    let shown = place.content("qcow2", "top");
    place.good(&["commit", "-d", "top"]);
    assert_eq!(std::fs::read(place.path("top")).unwrap(), before);
    assert_same(&place.content("qcow2", "middle"), &shown, "the middle");
}

#[test]
fn snapshots_of_the_overlay_stay() {
    let place = Place::new();
    make(&place, &SHAPES[1], 41);
    place.qemu_img(&["snapshot", "-c", "one", "top"]);
    // Over a base that does not change, to see what the snapshot has itself.
    place.qemu_img(&["convert", "-l", "one", "-O", "raw", "top", "before"]);
    place.qemu_io("qcow2", "top", &["write -P 99 0 700k"]);
    let shown = place.content("qcow2", "top");
    place.good(&["commit", "top"]);
    place.check("top");
    place.check("middle");
    assert_same(&place.content("qcow2", "top"), &shown, "the top");
    assert_same(&place.content("qcow2", "middle"), &shown, "the middle");
    place.qemu_img(&["snapshot", "-a", "one", "top"]);
    place.check("top");
}

#[test]
fn refusals_are_those_of_qemu_img() {
    let place = Place::new();
    make(&place, &SHAPES[1], 51);
    let before: Vec<_> = NAMES
        .map(|name| std::fs::read(place.path(name)).unwrap())
        .into();
    for args in [
        ["base"].as_slice(),
        &["-b", "nosuch", "top"],
        &["-b", "top", "middle"],
        &["-b", "middle", "base"],
    ] {
        let args = [&["commit"], args].concat();
        let theirs = place.theirs(&args);
        assert_eq!(theirs.code, Some(1), "{args:?}");
        let sentence = theirs.err.lines().next().unwrap();
        let sentence = sentence.strip_prefix("qemu-img: ").unwrap();
        let said = place.bad(&args);
        assert!(
            said.contains(sentence),
            "{args:?}: {said} is not {sentence}"
        );
    }
    place.bad(&["commit"]);
    assert_eq!(place.ours(&["commit", "nosuch"]).code, Some(4));
    // Somebody reads the backing file.
    let options = chain::Options::default();
    let disk = Disk::open(&place.path("middle"), &options).unwrap();
    assert_eq!(place.ours(&["commit", "top"]).code, Some(5));
    disk.close().unwrap();
    let after: Vec<_> = NAMES
        .map(|name| std::fs::read(place.path(name)).unwrap())
        .into();
    assert!(before == after, "nothing was changed");
}

#[test]
fn a_backing_file_elsewhere_is_written_to_only_with_consent() {
    let (place, elsewhere) = (Place::new(), Place::new());
    let base = elsewhere.path("base");
    let base = base.to_str().unwrap();
    place.qemu_img(&["create", "-q", "-f", "raw", base, "1M"]);
    let args = [
        "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "top",
    ];
    place.qemu_img(&args);
    place.qemu_io("qcow2", "top", &["write -P 5 0 64k"]);
    let said = place.bad(&["commit", "top"]);
    assert!(said.contains("outside its folder"), "{said}");
    assert_eq!(std::fs::read(base).unwrap(), vec![0; 1 << 20]);
    // Nor by a link that leads there.
    std::os::unix::fs::symlink(base, place.path("link")).unwrap();
    place.qemu_img(&["rebase", "-u", "-b", "link", "-F", "raw", "top"]);
    place.bad(&["commit", "top"]);
    assert_eq!(std::fs::read(base).unwrap(), vec![0; 1 << 20]);
    place.good(&["commit", "--trust-chain", "top"]);
    assert_eq!(std::fs::read(base).unwrap()[..65536], [5; 65536]);
}

#[test]
fn progress_goes_to_standard_error() {
    let place = Place::new();
    make(&place, &SHAPES[0], 61);
    let answer = place.ours(&["commit", "-p", "top"]);
    assert_eq!(
        (answer.code, answer.out.as_str()),
        (Some(0), "Image committed.\n")
    );
    assert!(answer.err.starts_with("    (0.00/100%)\r"), "{answer:?}");
    assert!(answer.err.ends_with("    (100.00/100%)\r\n"), "{answer:?}");
}
