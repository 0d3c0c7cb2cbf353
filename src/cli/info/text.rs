//! The report for people: the lines of `qemu-img info`.

use std::fmt::Write;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::view::{Info, SnapshotView, SpecificData};
use crate::cli::output::printable;
use crate::cli::size;

/// The report as lines.
pub(super) fn of(info: &Info) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name}: {}", printable(value));
    };
    line("image", &info.filename);
    line("file format", info.format);
    line("virtual size", &bytes(info.virtual_size));
    line("disk size", &size::human(info.actual_size));
    if info.encrypted {
        line("encrypted", "yes");
    }
    if let Some(cluster_size) = info.cluster_size {
        line("cluster_size", &cluster_size.to_string());
    }
    if info.dirty_flag {
        line("cleanly shut down", "no");
    }
    if let Some(name) = &info.backing_filename {
        match &info.full_backing_filename {
            Some(full) if full != name => {
                line("backing file", &format!("{name} (actual path: {full})"));
            }
            _ => line("backing file", name),
        }
    }
    if let Some(format) = &info.backing_filename_format {
        line("backing file format", format);
    }
    if !info.snapshots.is_empty() {
        text += "Snapshot list:\n";
        snapshots(&mut text, &info.snapshots);
    }
    text += &specific(info);
    for child in &info.children {
        let _ = writeln!(text, "Child node '/{}':", child.name);
        let file = &child.info;
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "    {name}: {}", printable(value));
        };
        line("filename", &file.filename);
        line("protocol type", file.format);
        line("file length", &bytes(file.virtual_size));
        line("disk size", &size::human(file.actual_size));
    }
    text
}

/// What the format has of its own.
pub(super) fn specific(info: &Info) -> String {
    let mut text = String::new();
    if let Some(specific) = &info.format_specific {
        text += "Format specific information:\n";
        details(&mut text, &specific.data);
    }
    text
}

fn bytes(n: u64) -> String {
    format!("{} ({n} bytes)", size::human(n))
}

/// The table of snapshots, with its headings.
pub(super) fn snapshots(text: &mut String, snapshots: &[SnapshotView]) {
    let mut row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = cells;
        let _ = writeln!(
            text,
            "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}"
        );
    };
    row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let seconds = snapshot.vm_clock_sec;
        row([
            &printable(&snapshot.id),
            &printable(&snapshot.name),
            &size::human(snapshot.vm_state_size),
            &date(u64::from(snapshot.date_sec)),
            &format!(
                "{:04}:{:02}:{:02}.{:03}",
                seconds / 3600,
                seconds / 60 % 60,
                seconds % 60,
                snapshot.vm_clock_nsec / 1_000_000
            ),
            &snapshot
                .icount
                .map_or_else(|| "--".to_owned(), |n| n.to_string()),
        ]);
    }
}

/// Seconds since the epoch as a date, in UTC.
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let mut day = days;
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    format!(
        "{year:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        month + 1,
        day + 1,
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

fn details(text: &mut String, data: &SpecificData) {
    let json = serde_json::to_string(data).unwrap_or_default();
    if let Ok(node) = serde_json::from_str(&json) {
        nested(text, &node, 1);
    }
}

/// A value whose keys have kept their order, in which qemu-img shows them.
enum Node {
    Leaf(String),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Nodes)
    }
}

struct Nodes;

impl<'de> Visitor<'de> for Nodes {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Leaf(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Leaf(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Leaf(printable(value)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = from.next_element()? {
            list.push(node);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = from.next_entry()? {
            map.push(entry);
        }
        Ok(Node::Map(map))
    }
}

/// A value as indented lines: keys with blanks for dashes, lists numbered.
fn nested(text: &mut String, node: &Node, depth: usize) {
    let items: Vec<(String, &Node)> = match node {
        Node::Map(map) => map
            .iter()
            .map(|(key, node)| (key.replace('-', " "), node))
            .collect(),
        Node::List(list) => list
            .iter()
            .enumerate()
            .map(|(i, node)| (format!("[{i}]"), node))
            .collect(),
        Node::Leaf(_) => return,
    };
    for (name, node) in items {
        let _ = write!(text, "{:1$}{name}:", "", depth * 4);
        match node {
            Node::Leaf(value) => {
                let _ = writeln!(text, " {value}");
            }
            Node::List(_) | Node::Map(_) => {
                text.push('\n');
                nested(text, node, depth + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_385_582, "2026-11-22 22:13:02"),
            (u64::from(u32::MAX), "2106-02-07 06:28:15"),
        ] {
            assert_eq!(super::date(seconds), text);
        }
    }
}
