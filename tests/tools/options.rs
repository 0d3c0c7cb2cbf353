//! What the verbs have in common with those of qemu-img: the options; and long
//! reports of `check` and `bench`.

use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::Value;

use crate::common::qemu_img;
use crate::place::{PROGRAM, Place};

/// How often a slice of tables was in memory, and how often it was read.
#[test]
fn bench_tells_what_the_caches_have_done() {
    let place = Place::new();
    let path = place.path("a.qcow2");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
    ];
    qemu_img(&[&create[..], &[path.to_str().unwrap(), "128M"]].concat());
    // 100 requests in the first 32 MiB, which one slice maps; then one in each
    // of the four.
    for (args, hits, misses) in [
        (["-c", "100", "-s", "4k", "-S", "64k"], 99, 1),
        (["-c", "8", "-s", "4k", "-S", "32M"], 4, 4),
    ] {
        let bench = ["bench", "--stats", "-d", "1"];
        let text = place.good(&[&bench[..], &args, &["a.qcow2"]].concat());
        let bytes = misses * 4096;
        let l2 = format!("L2 cache: {hits} hits, {misses} misses, 0 evictions, {bytes} of ");
        assert!(text.contains(&l2), "{text}");
        let counts = "Refcount cache: 0 hits, 0 misses, 0 evictions, 0 of ";
        assert!(text.contains(counts), "{text}");
    }
    let text = place.good(&["bench", "-c", "1", "a.qcow2"]);
    assert!(!text.contains("cache"), "{text}");
}

/// A sparse file of some kilobytes that has millions of leaks: the list of them
/// ends, the numbers are whole, and other findings are seen among them.
#[test]
fn a_long_list_of_findings_is_cut_short() {
    const BLOCKS: u64 = 100;
    let place = Place::new();
    let path = place.path("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let (reftable, end) = (word(48), file.metadata().unwrap().len());
    let shared = end.next_multiple_of(65536);
    file.write_all_at(&[0, 3].repeat(32768), shared).unwrap();
    for n in 1..=BLOCKS {
        file.write_all_at(&shared.to_be_bytes(), reftable + n * 8)
            .unwrap();
    }
    file.set_len((BLOCKS + 1) << 31).unwrap();
    let output = Command::new(PROGRAM)
        .args(["check", "--output=json"])
        .arg(&path)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let count = |what: &str| text.lines().filter(|line| line.starts_with(what)).count();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(count("Leaked "), 200);
    assert!((1..=200).contains(&count("ERROR ")), "{text}");
    assert_eq!(count("... and "), 1);
    let leaks = json["leaks"].as_u64().unwrap();
    assert_eq!(leaks, BLOCKS * 32768);
    let more = format!("... and {} more leaks\n", leaks - 200);
    assert!(text.ends_with(&more), "{text}");
}

/// The options of each verb of qemu-img 10.0, with a value where they have one.
const QEMU_IMG: &[(&str, &str)] = &[
    (
        "amend",
        "-f=qcow2 -o=compat=1.1 -p -q -t=none --object=x --image-opts --force",
    ),
    (
        "bench",
        "-c=1 -d=1 -f=qcow2 -i=io_uring -n -o=0 --flush-interval=1 --no-drain --pattern=1 -q -s=4k \
         -S=4k -t=none -w -U --object=x --image-opts",
    ),
    (
        "bitmap",
        "--add --remove --clear --enable --disable --merge=x -g=64k -b=x -F=qcow2 -f=qcow2 \
         --object=x --image-opts",
    ),
    (
        "check",
        "-f=qcow2 --output=json -q -r=all -T=none -U --object=x --image-opts",
    ),
    (
        "commit",
        "-f=qcow2 -q -t=none -b=x -r=1M -d -p --object=x --image-opts",
    ),
    (
        "compare",
        "-f=qcow2 -F=raw -T=none -p -q -s -U --object=x --image-opts",
    ),
    (
        "convert",
        "-f=raw -O=qcow2 -B=x -F=raw -o=compat=1.1 -l=x -S=4k -c -C -n -p -q -t=none -T=none -m=2 \
         -W -U -r=1M --bitmaps --skip-broken-bitmaps --salvage --target-is-zero --object=x \
         --image-opts --target-image-opts",
    ),
    (
        "create",
        "-f=qcow2 -b=x -F=raw -o=compat=1.1 -q -u --object=x",
    ),
    (
        "info",
        "-f=qcow2 --output=json --backing-chain -U --object=x --image-opts",
    ),
    (
        "map",
        "-f=qcow2 --start-offset=0 --max-length=1 --output=json -U --object=x --image-opts",
    ),
    (
        "measure",
        "-O=qcow2 -o=compat=1.1 --size=1M -f=raw -l=x --output=json -U --object=x --image-opts",
    ),
    (
        "rebase",
        "-f=qcow2 -t=none -T=none -p -q -u -c -b=x -F=raw -U --object=x --image-opts",
    ),
    (
        "resize",
        "-f=raw --preallocation=off -q --shrink --object=x --image-opts",
    ),
    (
        "snapshot",
        "-a=x -c=x -d=x -l -f=qcow2 -q -U --object=x --image-opts",
    ),
];

/// Each is taken, or refused by its name with what to do instead.
#[test]
fn every_option_of_qemu_img_is_taken_or_refused_by_name() {
    let place = Place::new();
    for (verb, options) in QEMU_IMG {
        for option in options.split_whitespace() {
            let (option, value) = match option.split_once('=') {
                Some((option, value)) => (option, Some(value)),
                None => (option, None),
            };
            let mut args = vec![*verb, option];
            args.extend(value);
            let text = place.ours(&args).err;
            let refused = format!("{option} is not supported: ");
            let known = !text.contains("unexpected argument") && !text.contains("invalid value");
            assert!(known || text.contains(&refused), "{args:?}: {text}");
        }
    }
    let text = place.ours(&["dd", "if=a", "of=b"]).err;
    assert!(text.contains("dd is not supported"), "{text}");
}
