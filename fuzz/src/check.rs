//! `check`: whatever the image, an answer, the same each time, with nothing
//! written; and what it calls clean is.

use qcow2_ublk::qcow2::check::Severity;
use qcow2_ublk::storage::sim::SimDisk;

use super::common::check::Checked;
use super::input::Input;
use super::view::View;
use super::{common, images, recipe};

pub fn run(data: &[u8]) {
    let image = recipe::image(&mut Input(data));
    let disk = SimDisk::with_image(image.clone());
    let (report, findings) = match common::block_on(images::check(&disk)) {
        Ok(found) => found,
        Err(error) => return super::header::is_said_well(&error),
    };
    assert_eq!(disk.recorded(), 0, "a check changes nothing");
    let sum = |severity| {
        let times = findings.iter().filter(|f| f.severity == severity);
        times.fold(0_u64, |sum, finding| sum.saturating_add(finding.times))
    };
    assert_eq!(report.corruptions, sum(Severity::Corruption));
    assert_eq!(report.leaks, sum(Severity::Leak));
    assert_eq!(report.check_errors, sum(Severity::Error));
    for finding in &findings {
        assert!(finding.to_string().len() < 1000);
    }
    let again = common::block_on(images::check(&disk)).expect("as before");
    assert_eq!(again, (report, findings));
    // What it calls clean, a simpler checker does too.
    if (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
        && View::open(&image).is_some()
        && image.len() <= 64 << 20
    {
        // That one also counts as leaks what is behind the end of the file.
        let mut found = Checked::open(&image).expect("a header").check();
        // As for QEMU: whoever reads the cluster is told, not who checks.
        found.corruptions.retain(|what| !what.contains("version 2"));
        assert_eq!(found.corruptions, Vec::<String>::new());
    }
}
