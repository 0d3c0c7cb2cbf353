//! An image cut off at every byte of its header, and at every sector of the
//! rest: an error that names it, or what is left, with zeros for what is not.

use qcow2_ublk::report;

use super::craft::*;
use super::{bounded, open, options};

fn cut(craft: &Craft, len: u64) -> Craft {
    let mut craft = craft.clone();
    craft.file.set_len(len);
    craft
}

#[test]
fn cut_off_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let (mut errors, mut readings) = (0, 0);
    for (bits, version) in [(9, 3), (9, 2), (12, 3)] {
        let mut whole = Craft::new(bits);
        whole.put32(4, version);
        if version == 2 {
            whole.put(72, &[0; 40]);
        }
        whole.save(&path);
        let end = whole.file.len();
        let lengths = (0..=120)
            .chain((128..end).step_by(512))
            .chain([end - 1, end]);
        for len in lengths {
            let short = cut(&whole, len);
            for writable in [false, true] {
                short.save(&path);
                let disk = match open(&path, writable) {
                    Ok(disk) => disk,
                    Err(error) => {
                        let said = error.to_string();
                        assert!(said.contains("image.qcow2"), "{len}: {said}");
                        assert!(said.contains("(at offset 0x"), "{len}: {said}");
                        errors += 1;
                        // The tables that the header names begin before it.
                        assert!(len <= whole.at(3), "{len}: {said}");
                        continue;
                    }
                };
                assert!(len > whole.at(3), "{len}");
                let mut bytes = vec![1; disk.size() as usize];
                disk.read_at(&mut bytes, 0).unwrap();
                let data = len.saturating_sub(whole.at(5)) as usize;
                let shown = if len > whole.at(4) { data } else { 0 };
                assert!(bytes[..shown].iter().all(|&byte| byte == 0x5a), "{len}");
                assert!(bytes[shown..].iter().all(|&byte| byte == 0), "{len}");
                readings += 1;
                if writable {
                    let last = disk.size() - 512;
                    let written = disk.write_at(&[7; 512], last);
                    let closed = disk.close();
                    if written.is_ok() && closed.is_ok() {
                        let disk = open(&path, false).unwrap();
                        disk.read_at(&mut bytes, 0).unwrap();
                        assert_eq!(bytes[last as usize..], [7; 512], "{len}");
                        assert!(bytes[..shown].iter().all(|&byte| byte == 0x5a), "{len}");
                    }
                }
            }
            short.save(&path);
            let info = report::info(&path, &options(false));
            let checked = report::check(&path, false, |_| {});
            assert_eq!(info.is_ok(), checked.is_ok(), "{len}");
            if let Ok(found) = checked {
                let sound = found.corruptions + found.check_errors == 0;
                assert!(!sound || len > whole.at(4), "{len}: called sound");
            }
            let all = (0, None);
            let _ = report::map(&path, &options(false), all, |_, _| Ok(()));
        }
    }
    assert!(errors > 500 && readings > 20, "{errors}, {readings}");
}

/// The program, on a few of them.
#[test]
fn commands_on_what_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let image = path.to_str().unwrap();
    let copy = dir.path().join("copy");
    let whole = Craft::new(12);
    for len in [
        0, 1, 3, 4, 71, 72, 103, 104, 111, 4096, 8192, 12288, 16384, 20480,
    ] {
        for args in [
            &["info", image][..],
            &["check", image],
            &["map", image],
            &["snapshot", "-l", image],
            &["bitmap", "list", image],
            &["measure", "-O", "raw", image],
            &["convert", "-O", "raw", image, copy.to_str().unwrap()],
            &["check", "-r", "all", image],
            &["resize", image, "8M"],
            &["snapshot", "-c", "new", image],
        ] {
            cut(&whole, len).save(&path);
            let output = bounded(super::LIMIT, args);
            let text = String::from_utf8_lossy(&output.stderr);
            if len < 104 {
                assert!(!output.status.success(), "{len}: {args:?}");
                assert!(text.contains("image.qcow2"), "{len}: {args:?}: {text}");
            }
        }
    }
}
