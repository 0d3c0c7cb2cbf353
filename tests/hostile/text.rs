//! Texts of an image on a terminal: nothing in a name may move the cursor, set
//! a title, or turn the writing round.

use std::fs;

use super::bounded;
use super::craft::*;

/// Sequences that terminals act on: of C0, DEL and C1, and characters of
/// Unicode that one does not see but that change what one sees.
const EVIL: &str =
    "\x1b]0;owned\x07\x1b[2J\r\n\t\x08\x7f\u{9b}31m\u{202e}\u{2066}\u{200b}\u{feff}\u{2028}";

fn is_evil(c: char) -> bool {
    c != '\n' && (c.is_control() || !c.is_ascii() && EVIL.contains(c))
}

#[test]
fn nothing_plays_with_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let image = path.to_str().unwrap();
    let copy = dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    let name = [EVIL.as_bytes(), b"\xff\xfe"].concat();
    let base = || {
        let mut craft = Craft::new(16);
        craft.backing(&name, "raw");
        craft
    };
    let format = || {
        let mut craft = Craft::new(16);
        craft.backing(b"base", "\x1b[2J\u{9b}31m");
        craft
    };
    let data = || {
        let mut craft = Craft::new(16);
        craft.extension(DATA_FILE, &name).put64(INCOMPATIBLE, 4);
        craft
    };
    let feature = || {
        let mut craft = Craft::new(16);
        let mut entry = vec![0, 9];
        entry.extend(EVIL.bytes().chain([0; 46]).take(46));
        craft
            .extension(FEATURE_NAMES, &entry)
            .put64(INCOMPATIBLE, 1 << 9);
        craft
    };
    let snapshot = || {
        let mut craft = Craft::new(16);
        let at = craft.at(6);
        craft.snapshot(at, craft.at(3), 1, &name, &name);
        craft
            .put32(SNAPSHOTS, 1)
            .put64(SNAPSHOTS_OFFSET, at)
            .count(6, 1);
        craft
    };
    let bitmap = || {
        let mut craft = Craft::new(16);
        let (directory, table) = (craft.at(6), craft.at(7));
        let len = (24 + name.len() as u64).next_multiple_of(8);
        craft.bitmaps(1, len, directory);
        craft.put64(directory, table).put32(directory + 8, 1);
        craft.put32(directory + 12, 2).put(directory + 16, &[1, 16]);
        craft.put16(directory + 18, name.len() as u16);
        craft.put(directory + 24, &name);
        craft.put(table + 65535, &[0]).count(6, 1).count(7, 1);
        craft
    };
    let encrypted = || {
        let mut craft = Craft::new(16);
        let mut place = craft.at(6).to_be_bytes().to_vec();
        place.extend((1_u64 << 16).to_be_bytes());
        craft.extension(CRYPTO, &place).put32(CRYPT_METHOD, 2);
        let at = craft.at(6);
        craft
            .put(at, b"LUKS\xba\xbe\0\x01")
            .put(at + 8, &name[..32]);
        craft.put(at + 40, &name[..32]).put(at + 72, &name[..32]);
        craft.put(at + 168, &name[..40]).put(at + 65535, &[0]);
        craft
    };
    type Make<'a> = &'a dyn Fn() -> Craft;
    let images: [(&str, Make<'_>); 7] = [
        ("backing file", &base),
        ("format", &format),
        ("data file", &data),
        ("feature", &feature),
        ("snapshot", &snapshot),
        ("bitmap", &bitmap),
        ("encryption", &encrypted),
    ];
    let key = dir.path().join("key");
    fs::write(&key, "secret").unwrap();
    let key = key.to_str().unwrap();
    let verbs: &[&[&str]] = &[
        &["info", image],
        &["info", "--output=json", image],
        &["info", "--backing-chain", image],
        &["-vvv", "info", image],
        &["check", image],
        &["check", "--output=json", image],
        &["check", "-r", "all", image],
        &["map", image],
        &["map", "--output=json", image],
        &["snapshot", "-l", image],
        &["snapshot", "list", "--json", image],
        &["snapshot", "-d", "nobody", image],
        &["snapshot", "-a", "nobody", image],
        &["bitmap", "list", image],
        &["bitmap", "list", "--json", image],
        &["bitmap", "--remove", image, "nobody"],
        &["key", "list", image],
        &["key", "list", "--json", image],
        &["key", "remove", "--key-file", key, image],
        &["measure", "-O", "qcow2", image],
        &["convert", "-O", "raw", image, copy],
        &["compare", image, image],
        &["commit", image],
        &["rebase", "-b", "", image],
        &["amend", "-o", "compat=0.10", image],
        &["-vvv", "io", "-c", "write 0 64k", "-c", "map", image],
        &["resize", image, "+64k"],
    ];
    let mut said = 0;
    for (what, make) in images {
        for args in verbs {
            make().save(&path);
            let output = bounded(super::LIMIT, args);
            for stream in [output.stdout, output.stderr] {
                let text = String::from_utf8_lossy(&stream);
                let evil = text.chars().find(|&c| is_evil(c));
                assert_eq!(evil, None, "{what}: {args:?}: {text:?}");
                said += usize::from(text.contains("owned"));
            }
        }
    }
    assert!(said > 30, "the names were shown {said} times");
}
