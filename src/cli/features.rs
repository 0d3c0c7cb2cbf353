//! `features`: what the kernel's driver can do, and its means for the sandbox.

use std::process::ExitCode;

use serde::Serialize;

use super::done;
use super::output::{self, Align::Left, Table};
use crate::daemon::sandbox::Parts;
use crate::error::Result;
use crate::ublk::{self, DataPath};

/// Show what the kernel's ublk driver can do, and what of the sandbox it has
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show it as JSON
    #[arg(short = 'J', long)]
    json: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct View {
    version: u32,
    data_path: String,
    features: Vec<&'static str>,
    /// The parts of the sandbox that the kernel can hold a server in.
    sandbox: Vec<&'static str>,
}

/// Prints the features.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let features = ublk::features()?;
    let data_path = DataPath::best(features).to_string();
    let parts = Parts::available();
    if args.json {
        output::print_json(&View {
            version: 1,
            data_path,
            features: features.names().collect(),
            sandbox: parts.held().collect(),
        })?;
        return done();
    }
    let mut table = Table::new(&[("FEATURE", Left), ("SINCE", Left)]);
    for feature in features.iter() {
        for name in feature.names() {
            table.row([name.to_owned(), format!("Linux {}", feature.since())]);
        }
    }
    let text = format!(
        "Best data path: {data_path}\nSandbox: {parts}\n\n{}",
        table.render()
    );
    output::print(&text)?;
    done()
}
