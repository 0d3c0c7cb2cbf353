//! `list`: the devices there are.

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::del::belongs;
use super::output::Align::{Left, Right};
use super::output::{self, Table};
use super::{done, size};
use crate::daemon::Record;
use crate::error::Result;
use crate::ublk::{self, DeviceInfo};

/// Show all ublk devices, whoever serves them
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show them as JSON
    #[arg(short = 'J', long)]
    json: bool,
}

/// What there is to know, as JSON.
#[derive(Debug, Serialize)]
struct View {
    version: u32,
    devices: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    device: PathBuf,
    id: u32,
    /// Only known of devices of ours, and to root.
    image: Option<PathBuf>,
    size: u64,
    read_only: bool,
    queues: u16,
    depth: u16,
    data_path: String,
    cache: Option<String>,
    state: String,
    pid: Option<u32>,
}

impl Row {
    fn new(device: &DeviceInfo, record: Option<&Record>) -> Self {
        Self {
            device: format!("/dev/ublkb{}", device.id).into(),
            id: device.id,
            image: record.map(|record| record.image.clone()),
            size: device.size,
            read_only: device.read_only,
            queues: device.queues,
            depth: device.depth,
            data_path: device.data_path.to_string(),
            cache: record.map(|record| record.cache.clone()),
            state: device.state.to_string(),
            pid: device.pid,
        }
    }
}

/// Prints the list.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let devices = ublk::list()?;
    let records = Record::all();
    // What a killed process has left, and no device belongs to.
    let speaks = |record: &&Record| devices.iter().any(|device| belongs(record, device));
    for record in records.iter().filter(|r| !speaks(r) && !r.is_alive()) {
        record.remove();
    }
    let rows: Vec<Row> = devices
        .iter()
        .map(|device| Row::new(device, records.iter().find(|r| belongs(r, device))))
        .collect();
    if args.json {
        output::print_json(&View {
            version: 1,
            devices: rows,
        })?;
    } else {
        output::print(&table(&rows).render())?;
    }
    done()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        ("DEVICE", Left),
        ("SIZE", Right),
        ("RO", Right),
        ("QUEUES", Right),
        ("DEPTH", Right),
        ("DATA-PATH", Left),
        ("STATE", Left),
        ("PID", Right),
        ("IMAGE", Left),
    ]);
    for row in rows {
        let image = row.image.as_ref();
        table.row([
            row.device.display().to_string(),
            size::human(row.size),
            u8::from(row.read_only).to_string(),
            row.queues.to_string(),
            row.depth.to_string(),
            row.data_path.clone(),
            row.state.clone(),
            row.pid
                .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            image.map_or_else(|| "-".to_owned(), |image| image.display().to_string()),
        ]);
    }
    table
}
