//! Lines to commands.

use std::path::PathBuf;
use std::time::Duration;

use crate::cli::size;
use crate::qcow2::create::Preallocation;

/// The longest read or write, in bytes: what a block request may be in QEMU.
const LONGEST: u64 = (1 << 31) - 512;

/// What `write` stores unless told.
const USUAL_PATTERN: u8 = 0xcd;

/// The commands, with their help.
pub(super) const HELP: &str = "\
read [-Cqv] [-P PATTERN [-s OFF] [-l LEN]] OFF LEN   (also readv, aio_read)
        read; with -P check that the bytes are PATTERN, all or LEN of them from
        OFF of what was read; -v shows them
write [-Cfq] [-P PATTERN | -s FILE] OFF LEN          (also writev, aio_write)
        write bytes of 0xcd, of PATTERN, or of FILE over and over; -f: durable
write -c [-Cfq] [-P PATTERN | -s FILE] OFF LEN
        write compressed clusters
write -z [-Cfnqu] OFF LEN                            (also aio_write)
        write zeros; -u: space may be freed; -n: whole clusters only
discard [-Cq] OFF LEN
        free whole clusters
flush, aio_flush
        make everything before durable; wait for everything in flight
truncate [-m off|metadata|falloc|full] SIZE, length
        change the disk's size, with space for what is new; show the size
alloc OFF [LEN], map, info
        show how much of a range, or which parts, the image itself has; what
        the image says about itself
sleep MS, abort, sigraise SIGNAL, help, quit
        wait; die; die by a signal; this text; end

-q: say nothing; -C: report in one line. Sizes have units: 4k, 1M, 0x200.
";

/// How an operation is reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Manner {
    pub(super) quiet: bool,
    pub(super) one_line: bool,
}

/// What a read must have found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) pattern: u8,
    /// Where in what was read.
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Pattern(u8),
    File(PathBuf),
    Zeros { unmap: bool, whole_clusters: bool },
}

/// How much of a range is to be looked at when nothing is said, in bytes.
const USUAL_ALLOC: u64 = 512;

/// What an operation does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Read {
        expected: Option<Expected>,
        dump: bool,
    },
    Write {
        content: Content,
        fua: bool,
        compress: bool,
    },
    Discard,
}

/// A request to the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    /// The command, for messages.
    pub(super) name: String,
    pub(super) what: What,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) manner: Manner,
    /// The next command does not wait for it.
    pub(super) in_flight: bool,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Operation(Operation),
    Flush,
    WaitForAll,
    Truncate(u64, Preallocation),
    Alloc { offset: u64, len: u64 },
    Map,
    Info,
    Length,
    Sleep(Duration),
    Abort,
    Raise(i32),
    Help,
    Quit,
    Nothing,
}

impl Command {
    /// Reads a line.
    pub(super) fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else {
            return Ok(Self::Nothing);
        };
        let words: Vec<&str> = words.collect();
        let number = |what: &str| match words[..] {
            [word] => size::parse(word).map_err(|e| format!("{name}: {e}")),
            _ => Err(format!("{name} wants one argument: {what}")),
        };
        let alone = |command: Self| {
            if words.is_empty() {
                Ok(command)
            } else {
                Err(format!("{name} takes no arguments"))
            }
        };
        match name {
            "read" | "readv" | "aio_read" | "r" => read(name, &words),
            "write" | "writev" | "aio_write" | "w" => write(name, &words),
            "discard" | "d" => discard(name, &words),
            "flush" | "f" => alone(Self::Flush),
            "aio_flush" => alone(Self::WaitForAll),
            "length" | "l" => alone(Self::Length),
            "abort" => alone(Self::Abort),
            "quit" | "q" => alone(Self::Quit),
            "help" | "?" => Ok(Self::Help),
            "map" => alone(Self::Map),
            "info" | "i" => alone(Self::Info),
            "alloc" => alloc(name, &words),
            "truncate" | "t" => truncate(name, &words),
            "sleep" => number("milliseconds").map(|ms| Self::Sleep(Duration::from_millis(ms))),
            "sigraise" => number("a signal's number").and_then(|number| {
                i32::try_from(number)
                    .map(Self::Raise)
                    .map_err(|_| format!("{number} is not a signal"))
            }),
            "open" | "o" | "close" | "c" | "reopen" => Err(format!(
                "{name} is not supported: one image is open all the time; start the program anew"
            )),
            "break" | "remove_break" | "resume" | "wait_break" => Err(format!(
                "{name} is not supported: there is nothing to stop requests at; use aio_read, \
                 aio_write and aio_flush"
            )),
            _ if name.starts_with("zone_") => Err(format!(
                "{name} is not supported: qcow2 images have no zones"
            )),
            _ => Err(format!("command \"{name}\" not found")),
        }
    }
}

/// Options and other words of a command. Options may stand anywhere, and
/// several letters behind one dash.
struct Words<'a> {
    name: &'a str,
    options: Vec<(char, &'a str)>,
    numbers: Vec<u64>,
}

impl<'a> Words<'a> {
    /// `flags` are the letters that stand alone, `valued` those with a value.
    fn split(name: &'a str, words: &[&'a str], flags: &str, valued: &str) -> Result<Self, String> {
        let mut options = Vec::new();
        let mut numbers = Vec::new();
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                numbers.push(size::parse(word).map_err(|e| format!("{name}: {e}"))?);
                continue;
            };
            for (at, letter) in letters.char_indices() {
                if flags.contains(letter) {
                    options.push((letter, ""));
                } else if valued.contains(letter) {
                    let rest = &letters[at + letter.len_utf8()..];
                    let value = match rest {
                        "" => words.next().copied(),
                        rest => Some(rest),
                    };
                    let value = value.ok_or_else(|| format!("{name}: -{letter} wants a value"))?;
                    options.push((letter, value));
                    break;
                } else if letter == 'b' {
                    return Err(format!("{name}: -b (VM state) is not supported"));
                } else {
                    return Err(format!("{name} has no option -{letter}"));
                }
            }
        }
        Ok(Self {
            name,
            options,
            numbers,
        })
    }

    fn has(&self, letter: char) -> bool {
        self.value(letter).is_some()
    }

    fn value(&self, letter: char) -> Option<&'a str> {
        let found = self.options.iter().rev().find(|option| option.0 == letter);
        found.map(|option| option.1)
    }

    fn size(&self, letter: char) -> Result<Option<u64>, String> {
        let parse = |text| size::parse(text).map_err(|e| format!("{}: -{letter}: {e}", self.name));
        self.value(letter).map(parse).transpose()
    }

    fn pattern(&self) -> Result<Option<u8>, String> {
        let Some(text) = self.value('P') else {
            return Ok(None);
        };
        size::parse(text)
            .ok()
            .and_then(|number| u8::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| format!("{text} is not a valid pattern byte"))
    }

    /// The range; several lengths are one after the other.
    fn range(&self, longest: u64) -> Result<(u64, u64), String> {
        let [offset, lengths @ ..] = &self.numbers[..] else {
            return Err(format!("{} wants an offset and a length", self.name));
        };
        let several = self.name.ends_with('v') || self.name.starts_with("aio_");
        if lengths.is_empty() || (lengths.len() > 1 && !several) {
            return Err(format!("{} wants an offset and a length", self.name));
        }
        let len = lengths
            .iter()
            .try_fold(0_u64, |sum, &len| sum.checked_add(len));
        match len.filter(|&len| len <= longest) {
            Some(len) => Ok((*offset, len)),
            None => Err(format!("{}: more than {longest} bytes", self.name)),
        }
    }

    fn operation(&self, what: What, longest: u64) -> Result<Command, String> {
        let (offset, len) = self.range(longest)?;
        Ok(Command::Operation(Operation {
            name: self.name.to_owned(),
            what,
            offset,
            len,
            manner: Manner {
                quiet: self.has('q'),
                one_line: self.has('C'),
            },
            in_flight: self.name.starts_with("aio_"),
        }))
    }
}

fn read(name: &str, words: &[&str]) -> Result<Command, String> {
    // p and r choose among QEMU's ways to do the same.
    let words = Words::split(name, words, "Cqvpr", "Psl")?;
    let (_, whole) = words.range(LONGEST)?;
    let part = (words.size('s')?, words.size('l')?);
    let expected = match (words.pattern()?, part) {
        (None, (None, None)) => None,
        (None, _) => return Err(format!("{name}: -s and -l need -P")),
        (Some(pattern), (offset, len)) => {
            let offset = offset.unwrap_or(0);
            let len = len.unwrap_or_else(|| whole.saturating_sub(offset));
            if offset.checked_add(len).is_none_or(|end| end > whole) {
                return Err("pattern verification range exceeds end of read data".to_owned());
            }
            Some(Expected {
                pattern,
                offset,
                len,
            })
        }
    };
    let dump = words.has('v');
    words.operation(What::Read { expected, dump }, LONGEST)
}

fn write(name: &str, words: &[&str]) -> Result<Command, String> {
    let words = Words::split(name, words, "Ccfnquzpr", "Ps")?;
    let zeros = words.has('z');
    if !zeros && (words.has('u') || words.has('n')) {
        return Err(format!("{name}: -u and -n need -z"));
    }
    let content = match (words.pattern()?, words.value('s')) {
        (None, None) if zeros => Content::Zeros {
            unmap: words.has('u'),
            whole_clusters: words.has('n'),
        },
        (None, None) => Content::Pattern(USUAL_PATTERN),
        (Some(pattern), None) if !zeros => Content::Pattern(pattern),
        (None, Some(file)) if !zeros => Content::File(file.into()),
        _ => return Err(format!("{name}: -z, -P and -s exclude each other")),
    };
    let longest = if zeros { i64::MAX as u64 } else { LONGEST };
    let what = What::Write {
        content,
        fua: words.has('f'),
        // Zeros take no space in any case.
        compress: words.has('c') && !zeros,
    };
    words.operation(what, longest)
}

fn alloc(name: &str, words: &[&str]) -> Result<Command, String> {
    let words = Words::split(name, words, "", "")?;
    let (offset, len) = match words.numbers[..] {
        [offset] => (offset, USUAL_ALLOC),
        [offset, len] => (offset, len),
        _ => return Err(format!("{name} wants an offset, and may have a length")),
    };
    Ok(Command::Alloc { offset, len })
}

fn truncate(name: &str, words: &[&str]) -> Result<Command, String> {
    let words = Words::split(name, words, "", "m")?;
    let mode = words.value('m').unwrap_or("off");
    let mode =
        Preallocation::parse(mode).map_err(|_| format!("Invalid preallocation mode '{mode}'"))?;
    match words.numbers[..] {
        [size] => Ok(Command::Truncate(size, mode)),
        _ => Err(format!("{name} wants one argument: the new size")),
    }
}

fn discard(name: &str, words: &[&str]) -> Result<Command, String> {
    let words = Words::split(name, words, "Cq", "")?;
    words.operation(What::Discard, i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(line: &str) -> Operation {
        match Command::parse(line) {
            Ok(Command::Operation(operation)) => operation,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn options_stand_anywhere() {
        let read = operation("read -qCP 0xaa 4k 64k -s 1k");
        assert_eq!((read.offset, read.len), (4096, 65536));
        assert!(read.manner.quiet && read.manner.one_line && !read.in_flight);
        let expected = Expected {
            pattern: 0xaa,
            offset: 1024,
            len: 64512,
        };
        let expected = Some(expected);
        assert_eq!(
            read.what,
            What::Read {
                expected,
                dump: false
            }
        );
        assert_eq!(
            operation("read -P3 0 16").what,
            operation("read 0 16 -P 3").what
        );
        assert_eq!(operation("writev 0 1k 3k").len, 4096);
        assert!(operation("aio_write -z -u 0 1T").in_flight);
        assert_eq!(Command::parse("  \n"), Ok(Command::Nothing));
    }

    #[test]
    fn mistakes_are_named() {
        for line in [
            "foo",
            "read 0",
            "read 0 1 2",
            "read a b",
            "read -x 0 1",
            "read -P",
            "read -P 256 0 1",
            "read -s 1 0 16",
            "read -P 0 -s 10 -l 10 0 16",
            "write -z -P 3 0 16",
            "write -u 0 16",
            "write 0 3G",
            "flush 3",
            "sleep",
            "truncate",
            "truncate -m most 1M",
            "alloc",
            "alloc 0 1 2",
            "map 1",
            "info 1",
        ] {
            assert!(Command::parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn what_only_qemu_has_is_refused_by_name() {
        for line in [
            "open -r a",
            "close",
            "reopen -w",
            "break write_aio A",
            "resume A",
            "zone_report 0 1",
            "write -b 0 512",
            "read -b 0 512",
        ] {
            let text = Command::parse(line).unwrap_err();
            assert!(text.contains("is not supported"), "{text}");
        }
    }
}
