//! `bitmap list` and `bitmap dump`: what there is, and what is dirty.

use std::ffi::OsString;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::super::image::Report;
use super::super::output::{self, Align, Table};
use super::{done, open};
use crate::disk::blocking;
use crate::error::Result;
use crate::qcow2::{BitmapContent, BitmapInfo};

/// Text that is collected before it is written.
const BATCH: usize = 64 << 10;

/// What is shown.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Show {
    /// Show the bitmaps: granularity, whether they record, what is dirty
    List {
        /// The image
        file: PathBuf,
        #[command(flatten)]
        how: How,
    },
    /// Show the dirty ranges of the disk, in bytes
    Dump {
        /// The image
        file: PathBuf,
        /// The bitmap's name
        bitmap: OsString,
        #[command(flatten)]
        how: How,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct How {
    #[command(flatten)]
    report: Report,

    /// Read an image that others may be writing to; bitmaps in use are
    /// inconsistent then
    #[arg(short = 'U', long)]
    force_share: bool,
}

/// A bitmap in a list.
#[derive(Serialize)]
struct Listed {
    name: String,
    granularity: u64,
    flags: Vec<&'static str>,
    recording: bool,
    inconsistent: bool,
    /// Dirty bytes; absent where the bitmap cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
}

impl Listed {
    fn new(info: &BitmapInfo, content: Option<&BitmapContent>) -> Self {
        let mut flags = Vec::new();
        if info.inconsistent {
            flags.push("in-use");
        }
        if info.enabled {
            flags.push("auto");
        }
        Self {
            name: String::from_utf8_lossy(&info.name).into_owned(),
            granularity: info.granularity,
            flags,
            recording: info.enabled && !info.inconsistent,
            inconsistent: info.inconsistent,
            count: content.map(BitmapContent::count),
        }
    }
}

impl Show {
    pub(super) fn run(&self) -> Result<ExitCode> {
        match self {
            Self::List { file, how } => {
                let listed = blocking(async {
                    let chain = open(file, false, how.force_share).await?;
                    let image = chain.top();
                    let mut listed = Vec::new();
                    for info in image.bitmaps().await? {
                        let content = if info.inconsistent || info.extra_data {
                            None
                        } else {
                            Some(image.bitmap(&info.name).await?)
                        };
                        listed.push(Listed::new(&info, content.as_ref()));
                    }
                    Ok(listed)
                })?;
                if how.report.json() {
                    output::print_json(&listed)?;
                } else {
                    output::print(&table(&listed))?;
                }
            }
            Self::Dump { file, bitmap, how } => {
                let content = blocking(async {
                    let chain = open(file, false, how.force_share).await?;
                    chain.top().bitmap(bitmap.as_bytes()).await
                })?;
                dump(&bitmap.to_string_lossy(), &content, how.report.json())?;
            }
        }
        done()
    }
}

fn table(listed: &[Listed]) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("GRANULARITY", Align::Right),
        ("DIRTY", Align::Right),
        ("STATE", Align::Left),
    ]);
    for bitmap in listed {
        let state = match (bitmap.inconsistent, bitmap.recording) {
            (true, _) => "inconsistent",
            (false, true) => "recording",
            (false, false) => "disabled",
        };
        let count = bitmap
            .count
            .map_or_else(|| "-".to_owned(), |n| n.to_string());
        table.row([
            bitmap.name.clone(),
            bitmap.granularity.to_string(),
            count,
            state.to_owned(),
        ]);
    }
    table.render()
}

/// As one JSON object with a range on each line, or as a table of ranges.
fn dump(name: &str, content: &BitmapContent, json: bool) -> Result<()> {
    // Writing to a String does not fail.
    let mut text = String::new();
    if json {
        let name = serde_json::Value::from(name);
        let (granularity, size) = (content.granularity(), content.size());
        let _ = writeln!(
            text,
            "{{ \"name\": {name}, \"granularity\": {granularity}, \"virtual-size\": {size}, \
             \"count\": {}, \"ranges\": [",
            content.count()
        );
    } else {
        let _ = writeln!(text, "{:<16}Length", "Offset");
    }
    let mut first = true;
    content.ranges(|start, len| {
        if json {
            let comma = if first { "" } else { ",\n" };
            first = false;
            let _ = write!(text, "{comma}{{ \"start\": {start}, \"length\": {len} }}");
        } else {
            let _ = writeln!(text, "{:<16}{len:#x}", format!("{start:#x}"));
        }
        if text.len() >= BATCH {
            output::print(&text)?;
            text.clear();
        }
        Ok(())
    })?;
    if json {
        text.push_str(if first { "] }\n" } else { "\n] }\n" });
    }
    output::print(&text)
}
