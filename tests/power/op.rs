//! What is done to an image: requests of several tasks at the same time, and
//! actions that meet no request. Each has a short text.

use std::fmt;

/// A request of the guest's. Sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Write {
        at: u64,
        len: u64,
        fua: bool,
    },
    /// A write of zeros, which the engine may notice.
    Nulls {
        at: u64,
        len: u64,
    },
    Zero {
        at: u64,
        len: u64,
        unmap: bool,
        fua: bool,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Compressed {
        at: u64,
        len: u64,
    },
    Flush,
    /// What is dirty is written back, as now and then.
    WriteBack,
    /// An action that may meet requests: a bitmap's, or growing.
    Live(Action),
}

impl Request {
    /// The sectors it changes.
    pub(crate) fn range(self) -> Option<(u64, u64)> {
        match self {
            Self::Write { at, len, .. }
            | Self::Nulls { at, len }
            | Self::Zero { at, len, .. }
            | Self::Discard { at, len }
            | Self::Compressed { at, len } => Some((at, len)),
            Self::Flush | Self::WriteBack | Self::Live(_) => None,
        }
    }
}

/// What no request is under way with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Close and open again.
    Reopen,
    /// The process dies, and another opens the image.
    Die,
    Snapshot(char),
    Unsnapshot(char),
    Apply(char),
    /// With the image closed.
    OfflineSnapshot(char),
    OfflineUnsnapshot(char),
    OfflineApply(char),
    /// To so many sectors.
    Resize(u64),
    /// A bitmap with granules of 2^bits bytes.
    Bitmap(char, u8),
    Unbitmap(char),
    Enable(char),
    Disable(char),
    Clear(char),
    /// Refcounts get this many bits.
    Width(u64),
    Version(u8),
    Lazy(bool),
    /// The layer below gets everything.
    Commit,
    /// What leaks is given back.
    Repair,
    /// Another passphrase opens the image.
    Key(char),
    Unkey(char),
}

/// A step of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Requests and which task makes them, each task one after the other.
    Wave(Vec<(u8, Request)>),
    Act(Action),
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |on: bool, letter| if on { letter } else { "" };
        match *self {
            Self::Write { at, len, fua } => write!(f, "w{at}+{len}{}", flag(fua, "F")),
            Self::Nulls { at, len } => write!(f, "n{at}+{len}"),
            Self::Zero {
                at,
                len,
                unmap,
                fua,
            } => {
                write!(f, "z{at}+{len}{}{}", flag(unmap, "u"), flag(fua, "F"))
            }
            Self::Discard { at, len } => write!(f, "d{at}+{len}"),
            Self::Compressed { at, len } => write!(f, "c{at}+{len}"),
            Self::Flush => f.write_str("f"),
            Self::WriteBack => f.write_str("b"),
            Self::Live(action) => write!(f, "!{action}"),
        }
    }
}

impl Request {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "f" => return Some(Self::Flush),
            "b" => return Some(Self::WriteBack),
            _ => {}
        }
        if let Some(action) = text.strip_prefix('!') {
            return Action::parse(action).map(Self::Live);
        }
        let fua = text.ends_with('F');
        let rest = text.trim_end_matches('F');
        let unmap = rest.ends_with('u');
        let rest = rest.trim_end_matches('u');
        let (at, len) = rest.get(1..)?.split_once('+')?;
        let (at, len) = (at.parse().ok()?, len.parse().ok()?);
        Some(match text.chars().next()? {
            'w' => Self::Write { at, len, fua },
            'n' => Self::Nulls { at, len },
            'z' => Self::Zero {
                at,
                len,
                unmap,
                fua,
            },
            'd' => Self::Discard { at, len },
            'c' => Self::Compressed { at, len },
            _ => return None,
        })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Reopen => f.write_str("reopen"),
            Self::Die => f.write_str("die"),
            Self::Snapshot(name) => write!(f, "snap={name}"),
            Self::Unsnapshot(name) => write!(f, "unsnap={name}"),
            Self::Apply(name) => write!(f, "apply={name}"),
            Self::OfflineSnapshot(name) => write!(f, "off-snap={name}"),
            Self::OfflineUnsnapshot(name) => write!(f, "off-unsnap={name}"),
            Self::OfflineApply(name) => write!(f, "off-apply={name}"),
            Self::Resize(sectors) => write!(f, "resize={sectors}"),
            Self::Bitmap(name, bits) => write!(f, "bitmap={name}{bits}"),
            Self::Unbitmap(name) => write!(f, "unbitmap={name}"),
            Self::Enable(name) => write!(f, "enable={name}"),
            Self::Disable(name) => write!(f, "disable={name}"),
            Self::Clear(name) => write!(f, "clear={name}"),
            Self::Width(bits) => write!(f, "width={bits}"),
            Self::Version(version) => write!(f, "version={version}"),
            Self::Lazy(on) => write!(f, "lazy={}", u8::from(on)),
            Self::Commit => f.write_str("commit"),
            Self::Repair => f.write_str("repair"),
            Self::Key(name) => write!(f, "key={name}"),
            Self::Unkey(name) => write!(f, "unkey={name}"),
        }
    }
}

impl Action {
    fn parse(text: &str) -> Option<Self> {
        let (word, value) = text.split_once('=').unwrap_or((text, ""));
        let name = value.chars().next();
        let number = || value.parse::<u64>().ok();
        Some(match word {
            "reopen" => Self::Reopen,
            "die" => Self::Die,
            "commit" => Self::Commit,
            "repair" => Self::Repair,
            "key" => Self::Key(name?),
            "unkey" => Self::Unkey(name?),
            "snap" => Self::Snapshot(name?),
            "unsnap" => Self::Unsnapshot(name?),
            "apply" => Self::Apply(name?),
            "off-snap" => Self::OfflineSnapshot(name?),
            "off-unsnap" => Self::OfflineUnsnapshot(name?),
            "off-apply" => Self::OfflineApply(name?),
            "resize" => Self::Resize(number()?),
            "bitmap" => Self::Bitmap(name?, value.get(1..)?.parse().ok()?),
            "unbitmap" => Self::Unbitmap(name?),
            "enable" => Self::Enable(name?),
            "disable" => Self::Disable(name?),
            "clear" => Self::Clear(name?),
            "width" => Self::Width(number()?),
            "version" => Self::Version(number()? as u8),
            "lazy" => Self::Lazy(number()? == 1),
            _ => return None,
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Act(action) => write!(f, "{action}"),
            Self::Wave(requests) => {
                let texts: Vec<String> = requests
                    .iter()
                    .map(|(task, request)| format!("{task}{request}"))
                    .collect();
                write!(f, "[{}]", texts.join(" "))
            }
        }
    }
}

/// The steps of a text like `[0w1+2 1f] snap=a [0d0+8]`.
pub(crate) fn parse_steps(text: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        if let Some(inside) = rest.strip_prefix('[') {
            let (wave, after) = inside.split_once(']')?;
            let requests: Option<Vec<_>> = wave
                .split_whitespace()
                .map(|word| {
                    let task = word.chars().next()?.to_digit(10)? as u8;
                    Some((task, Request::parse(&word[1..])?))
                })
                .collect();
            steps.push(Step::Wave(requests?));
            rest = after.trim_start();
        } else {
            let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
            steps.push(Step::Act(Action::parse(word)?));
            rest = after.trim_start();
        }
    }
    Some(steps)
}
