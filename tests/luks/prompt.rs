//! Passphrases that are typed, at a terminal that `script` makes.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use super::Lab;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-ublk");

/// A shell command at a terminal.
struct Terminal {
    child: Child,
    seen: Vec<u8>,
}

impl Terminal {
    fn run(command: &str) -> Self {
        let child = Command::new("script")
            .args(["-qec", command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("script, of util-linux, is needed");
        Self {
            child,
            seen: Vec::new(),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Types a line when this has been asked, once more than before.
    fn answer(mut self, asked: &str, line: &[u8]) -> Self {
        let before = self.text().matches(asked).count();
        let mut byte = [0];
        while self.text().matches(asked).count() == before {
            let read = self.child.stdout.as_mut().unwrap().read(&mut byte).unwrap();
            assert_eq!(read, 1, "nobody asked {asked:?}: {}", self.text());
            self.seen.push(byte[0]);
        }
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(&[line, b"\n"].concat()).unwrap();
        stdin.flush().unwrap();
        self
    }

    /// The exit code, and all that was seen.
    fn end(mut self) -> (Option<i32>, String) {
        let mut stdout = self.child.stdout.take().unwrap();
        stdout.read_to_end(&mut self.seen).unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.text())
    }
}

/// What is typed opens the image and is not seen, a mistake can be taken
/// back, and the terminal is as before.
#[test]
fn typed_passphrases_are_not_shown() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    let file = path.to_str().unwrap();
    let (new, again) = ("the passphrase of the new image: ", "the same again: ");
    let create = format!("{OURS} create -o encrypt.format=luks,encrypt.iter-time=1 {file} 4M");
    let (code, text) = Terminal::run(&create)
        .answer(new, b"correct horse")
        .answer(again, b"correct house")
        .end();
    assert!(code == Some(1) && text.contains("not the same"), "{text}");
    assert!(!text.contains("hors") && !path.exists(), "{text}");
    let (code, text) = Terminal::run(&create)
        .answer(new, b"lost\x15correct horsr\x7fe")
        .answer(again, b"correct horse")
        .end();
    assert_eq!(code, Some(0), "{text}");
    assert!(!text.contains("hors") && !text.contains("lost"), "{text}");

    let asked = format!("the passphrase of {file}: ");
    let write = format!("{OURS} io {file} -c 'write -P 90 0 4k' && stty -a");
    let (code, text) = Terminal::run(&write).answer(&asked, b"correct horse").end();
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.contains("wrote 4096/4096") && !text.contains("horse"),
        "{text}"
    );
    assert!(
        text.contains(" echo ") && text.contains(" icanon "),
        "{text}"
    );
    let (code, text) = Terminal::run(&write).answer(&asked, b"wrong horse").end();
    assert!(
        code == Some(2) && text.contains("opens no key slot"),
        "{text}"
    );
    assert!(!text.contains("horse"), "{text}");
    // Nothing, and an interrupt: the image is not opened.
    let (code, text) = Terminal::run(&write).answer(&asked, b"").end();
    assert!(code == Some(1) && text.contains("is empty"), "{text}");
    let stop = format!("{OURS} io {file} -c 'write 0 4k'; stty -a");
    let (_, text) = Terminal::run(&stop).answer(&asked, b"corr\x03").end();
    assert!(
        text.contains("interrupted") && text.contains(" echo "),
        "{text}"
    );

    // The line's end is no part of it, and QEMU opens the image with it.
    std::fs::write(&lab.key, b"correct horse").unwrap();
    assert_eq!(lab.qemu_content(&path)[..4096], [90; 4096]);
}
