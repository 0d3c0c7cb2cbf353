//! `info`: what an image says about itself. With the keys and lines of
//! `qemu-img info`.

mod text;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;

use super::image::{PolicyArgs, Report};
use super::{done, output};
use crate::chain;
use crate::error::Result;
use crate::qcow2::spec::snapshot::Snapshot;
use crate::report::{self, LayerInfo};

/// Show what an image says about itself: size, features, snapshots, bitmaps
///
/// Other files that the image refers to are named, and opened only with
/// --backing-chain.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    file: PathBuf,

    #[command(flatten)]
    report: Report,

    /// Show the files below the image too
    #[arg(short, long)]
    backing_chain: bool,

    /// Read images that others may be writing to; what is shown may be wrong
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Shows snapshots: as `qemu-img snapshot -l`, or in JSON as the image's
/// report has them.
pub(super) fn show_snapshots(snapshots: &[Snapshot], json: bool) -> Result<()> {
    let views: Vec<_> = snapshots.iter().map(view::SnapshotView::new).collect();
    if json {
        return output::print_json(&views);
    }
    let mut text = String::new();
    if !views.is_empty() {
        text += "Snapshot list:\n";
        text::snapshots(&mut text, &views);
    }
    output::print(&text)
}

/// What the format has of its own, as lines.
pub(super) fn specific(layer: &LayerInfo) -> String {
    text::specific(&view::Info::new(layer))
}

/// Shows the image.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let options = chain::Options {
        force_share: args.force_share,
        no_backing: !args.backing_chain,
        ..args.policy.chain_options()?
    };
    let layers = report::info(&args.file, &options)?;
    for layer in &layers {
        for problem in layer.image.iter().flat_map(|image| &image.problems) {
            output::report(problem);
        }
    }
    let views: Vec<view::Info> = layers.iter().map(view::Info::new).collect();
    if args.report.json() {
        if args.backing_chain {
            output::print_json(&views)?;
        } else {
            output::print_json(&views[0])?;
        }
    } else {
        let texts: Vec<String> = views.iter().map(text::of).collect();
        output::print(&texts.join("\n"))?;
    }
    done()
}
