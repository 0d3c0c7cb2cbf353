//! What happened when, and whether what was seen can be. Knows nothing of
//! images.
//!
//! A sector has a *tag*: that of the change that wrote it, or 0 for zeros. A
//! change takes effect at some moment between its begin and its end, and a read
//! shows what was current at some moment between its own. So a tag that was
//! seen is wrong if another change, which for certain came after that of the
//! tag, was over when the read began. Seeing a change shows that it has taken
//! effect: for all that begins later, it is over.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) type Tag = u64;

/// What shows where there is nothing.
pub(crate) const ZEROS: Tag = 0;

/// Numbers moments.
#[derive(Debug, Default)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn now(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

/// From before something began until after it was over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) begin: u64,
    pub(crate) end: u64,
}

/// A change of some sectors.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) what: &'static str,
    pub(crate) span: Span,
    pub(crate) first: u64,
    /// Of each sector from the first on.
    pub(crate) tags: Vec<Tag>,
    /// It has happened when it is over; a discard need not.
    pub(crate) surely: bool,
}

impl Change {
    pub(crate) fn sectors(&self) -> Range<u64> {
        self.first..self.first + self.tags.len() as u64
    }
}

/// What was seen of some sectors: of one that was seen while it changed,
/// perhaps several tags.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) span: Span,
    pub(crate) sectors: Vec<(u64, Tag)>,
}

/// What a queue did and saw.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) changes: Vec<Change>,
    pub(crate) reads: Vec<Seen>,
    /// What snapshots show, and when they were made.
    pub(crate) snapshots: Vec<Seen>,
    /// What was wrong at once. Nobody panics who has a request under way:
    /// others would wait for it.
    pub(crate) wrong: Vec<String>,
}

impl Log {
    pub(crate) fn add(&mut self, other: Self) {
        self.changes.extend(other.changes);
        self.reads.extend(other.reads);
        self.snapshots.extend(other.snapshots);
        self.wrong.extend(other.wrong);
    }
}

/// A change of one sector.
#[derive(Debug)]
struct Event {
    begin: u64,
    end: u64,
    tag: Tag,
    surely: bool,
    /// The whole change, among all.
    change: usize,
}

/// All that happened to a sector.
#[derive(Debug, Default)]
struct Sector {
    events: Vec<Event>,
    /// The events with each tag.
    by_tag: HashMap<Tag, Vec<usize>>,
    /// For moments at which something was over: the latest begin of all that
    /// was over by then.
    over: BTreeMap<u64, u64>,
}

impl Sector {
    /// What was over before this moment has no effect any more at `now` or
    /// later: something that came after it was over, too.
    fn stale(&self, now: u64) -> u64 {
        let last = self.over.range(..now).next_back();
        last.map_or(0, |(_, &begin)| begin)
    }

    /// Whether the tag can be what a span shows.
    fn can_show(&self, tag: Tag, span: Span) -> bool {
        let stale = self.stale(span.begin);
        let events = self.by_tag.get(&tag).into_iter().flatten();
        let mut events = events.map(|&index| &self.events[index]);
        events.any(|event| event.begin < span.end && event.end >= stale)
    }

    /// The one change that a tag can be from, if that is known.
    fn only(&self, tag: Tag) -> Option<&Event> {
        match self.by_tag.get(&tag).map(Vec::as_slice) {
            Some(&[index]) => Some(&self.events[index]),
            _ => None,
        }
    }
}

/// Everything that happened, judged.
#[derive(Debug)]
pub(crate) struct History {
    changes: Vec<Change>,
    sectors: Vec<Sector>,
}

impl History {
    /// Of a disk that showed `at_first`. What the reads saw has taken effect.
    pub(crate) fn new(at_first: &[Tag], log: &Log) -> Self {
        let first = Change {
            what: "at first",
            span: Span { begin: 0, end: 0 },
            first: 0,
            tags: at_first.to_vec(),
            surely: true,
        };
        let changes: Vec<_> = std::iter::once(first)
            .chain(log.changes.iter().cloned())
            .collect();
        let mut sectors: Vec<Sector> = at_first.iter().map(|_| Sector::default()).collect();
        for (number, change) in changes.iter().enumerate() {
            for (sector, &tag) in change.sectors().zip(&change.tags) {
                let sector = &mut sectors[sector as usize];
                let index = sector.events.len();
                sector.by_tag.entry(tag).or_default().push(index);
                sector.events.push(Event {
                    begin: change.span.begin,
                    end: change.span.end,
                    tag,
                    surely: change.surely,
                    change: number,
                });
            }
        }
        for seen in &log.reads {
            for &(sector, tag) in &seen.sectors {
                let sector = &mut sectors[sector as usize];
                if let Some(&[index]) = sector.by_tag.get(&tag).map(Vec::as_slice) {
                    let event = &mut sector.events[index];
                    event.end = event.end.min(seen.span.end);
                }
            }
        }
        for sector in &mut sectors {
            let mut over: Vec<_> = sector.events.iter().filter(|event| event.surely).collect();
            over.sort_by_key(|event| event.end);
            let mut latest = 0;
            for event in over {
                latest = latest.max(event.begin);
                sector.over.insert(event.end, latest);
            }
        }
        Self { changes, sectors }
    }

    /// Judges everything that was read and every snapshot.
    pub(crate) fn judge(&self, log: &Log) -> Result<(), String> {
        if let Some(wrong) = log.wrong.first() {
            return Err(wrong.clone());
        }
        for read in &log.reads {
            self.judge_read(read)?;
        }
        for snapshot in &log.snapshots {
            self.judge_snapshot(snapshot)
                .map_err(|what| format!("a snapshot: {what}"))?;
        }
        Ok(())
    }

    fn judge_read(&self, seen: &Seen) -> Result<(), String> {
        for &(sector, tag) in &seen.sectors {
            if !self.sectors[sector as usize].can_show(tag, seen.span) {
                return Err(self.wrong(sector, tag, seen.span));
            }
        }
        Ok(())
    }

    /// A snapshot shows one moment: with a change that it shows, it shows all
    /// of it, and all that was over when that began.
    fn judge_snapshot(&self, seen: &Seen) -> Result<(), String> {
        let mut span = seen.span;
        let mut shown = Vec::new();
        for &(sector, tag) in &seen.sectors {
            if let Some(event) = self.sectors[sector as usize].only(tag) {
                span.begin = span.begin.max(event.begin);
                if event.surely && tag != ZEROS {
                    shown.push(event.change);
                }
            }
        }
        self.judge_read(&Seen {
            span,
            sectors: seen.sectors.clone(),
        })?;
        shown.sort_unstable();
        shown.dedup();
        let tags: HashMap<u64, Tag> = seen.sectors.iter().copied().collect();
        for change in shown {
            let change = &self.changes[change];
            for number in change.sectors() {
                let sector = &self.sectors[number as usize];
                let tag = tags[&number];
                let events = sector.by_tag.get(&tag).into_iter().flatten();
                let mut events = events.map(|&index| &sector.events[index]);
                if !events.any(|event| event.end >= change.span.begin) {
                    return Err(format!(
                        "it shows a part of the change {change:?} only: {}",
                        self.wrong(number, tag, span)
                    ));
                }
            }
        }
        Ok(())
    }

    fn wrong(&self, sector: u64, tag: Tag, span: Span) -> String {
        let events = &self.sectors[sector as usize].events;
        let near: Vec<_> = events
            .iter()
            .filter(|event| event.tag == tag || event.end + 60 > span.begin)
            .filter(|event| event.begin < span.end)
            .map(|event| {
                let change = &self.changes[event.change];
                let (what, first, len) = (change.what, change.first, change.tags.len());
                let (begin, end, tag) = (event.begin, event.end, event.tag);
                format!("{begin} to {end}, {what} of {len} from {first}: {tag:#x}")
            })
            .collect();
        format!("sector {sector} shows {tag:#x} at {span:?}, after {near:#?}")
    }
}

/// The judge sees what is wrong, and nothing else.
#[test]
fn of_what_was_seen_only_what_can_be_is_believed() {
    let change = |begin, end, first, tags: &[Tag]| Change {
        what: "write",
        span: Span { begin, end },
        first,
        tags: tags.to_vec(),
        surely: true,
    };
    let seen = |begin, end, sectors: &[(u64, Tag)]| Seen {
        span: Span { begin, end },
        sectors: sectors.to_vec(),
    };
    let discard = Change {
        surely: false,
        ..change(50, 51, 0, &[ZEROS])
    };
    let mut log = Log {
        changes: vec![
            change(10, 19, 0, &[1, 1]),
            change(20, 29, 1, &[2, 2]),
            change(22, 27, 2, &[3]),
            discard,
        ],
        ..Log::default()
    };
    let judge = |log: &Log| History::new(&[ZEROS; 4], log).judge(log);
    let mut read = |read: Seen| {
        log.reads = vec![read];
        judge(&log).is_ok()
    };
    assert!(read(seen(1, 12, &[(0, ZEROS)])) && read(seen(1, 12, &[(0, 1)])));
    assert!(!read(seen(20, 21, &[(0, ZEROS)])), "an older one");
    assert!(!read(seen(1, 9, &[(0, 1)])), "one from the future");
    assert!(!read(seen(1, 90, &[(0, 7)])), "one that was never there");
    for tag in [2, 3] {
        assert!(read(seen(30, 31, &[(2, tag)])), "either may be the last");
    }
    assert!(!read(seen(30, 31, &[(2, ZEROS)])));
    assert!(read(seen(60, 61, &[(0, 1)])) && read(seen(60, 61, &[(0, ZEROS)])));
    // Once seen, there for all who come later.
    log.reads = vec![seen(21, 23, &[(1, 2)]), seen(24, 25, &[(1, 1)])];
    assert!(judge(&log).is_err());
    log.reads = Vec::new();
    let mut snapshot = |sectors: &[(u64, Tag)]| {
        log.snapshots = vec![seen(5, 40, sectors)];
        judge(&log).is_ok()
    };
    assert!(snapshot(&[(0, ZEROS), (1, ZEROS), (2, ZEROS), (3, ZEROS)]));
    assert!(snapshot(&[(0, 1), (1, 1), (2, ZEROS), (3, ZEROS)]));
    assert!(snapshot(&[(0, 1), (1, 2), (2, 3), (3, ZEROS)]));
    let torn = [(0, 1), (1, ZEROS), (2, ZEROS), (3, ZEROS)];
    assert!(!snapshot(&torn), "half of a change");
    let early = [(0, ZEROS), (1, 2), (2, 2), (3, ZEROS)];
    assert!(!snapshot(&early), "a change without the one before");
}
