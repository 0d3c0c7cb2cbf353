//! Engines over the images of recipes.

use qcow2_ublk::Result;
use qcow2_ublk::chain::Chain;
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::check::{self, CheckReport, Finding, Repair, Repaired};
use qcow2_ublk::qcow2::{Header, Image, ImageOptions, Selector};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{self, SimDisk};

/// The image alone, whatever it names besides; as a program opens it that only
/// reads.
pub async fn open_to_read(disk: &SimDisk) -> Result<Engine> {
    open_as(disk, &ImageOptions::default()).await
}

/// One of its snapshots.
pub async fn open_snapshot(disk: &SimDisk, which: Selector) -> Result<Engine> {
    let options = ImageOptions {
        snapshot: Some(which),
        ..ImageOptions::default()
    };
    open_as(disk, &options).await
}

async fn open_as(disk: &SimDisk, options: &ImageOptions) -> Result<Engine> {
    let storage = Storage::simulated_read_only(disk, 1);
    let image = Image::open(storage, options).await?;
    Ok(Engine::new(
        Chain::new(image, Vec::new()),
        engine::Options::default(),
    ))
}

/// The same for writing, with an empty data file where the image wants one; an
/// image that is marked dirty is repaired.
pub async fn open_to_write(disk: &SimDisk, options: &ImageOptions) -> Result<Engine> {
    let storage = Storage::simulated(disk, 1);
    let header = super::view::header_of(&disk.image());
    let data = header
        .filter(Header::has_data_file)
        .map(|_| Storage::simulated(&SimDisk::with_image(sim::Image::from_bytes(&[])), 1));
    let image = Image::open_with_data(storage, data, options).await?;
    let image = image.repaired(options).await?;
    Ok(Engine::new(
        Chain::new(image, Vec::new()),
        engine::Options::default(),
    ))
}

/// What a check says, finding by finding.
pub async fn check(disk: &SimDisk) -> Result<(CheckReport, Vec<Finding>)> {
    let mut findings = Vec::new();
    let storage = Storage::simulated(disk, 1);
    let report = check::check(&storage, &mut |finding| findings.push(finding.clone())).await?;
    Ok((report, findings))
}

/// A check finds no corruption, and nothing that it cannot judge.
pub async fn is_sound(disk: &SimDisk) -> bool {
    let found = check(disk).await;
    found.is_ok_and(|(report, _)| report.corruptions == 0 && report.check_errors == 0)
}

/// Repairs the image on `disk`.
pub async fn repair(disk: &SimDisk, what: Repair) -> Result<Repaired> {
    let storage = Storage::simulated(disk, 1);
    check::repair(&storage, what, &mut |_| {}).await
}
