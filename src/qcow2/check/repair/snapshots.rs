//! Entries of the snapshot table that lack their disk's size, which version 3
//! requires: they get the image's, which everybody takes for it anyhow. And
//! those with more extra data than anybody handles: what is too much, and so has
//! no meaning, is cut off, as QEMU does.
//!
//! On disk: a new table with new refcounts beside the old ones `|` one sector
//! of the header; see [`shadow`](crate::qcow2::shadow). The refcounts are in
//! order before.

use super::Repairer;
use super::seen::Seen;
use crate::error::{ErrorKind, Result};
use crate::qcow2::check::CheckReport;
use crate::qcow2::open::read_header;
use crate::qcow2::shadow::Shadow;
use crate::qcow2::snapshot;

impl Repairer<'_> {
    /// Completes the table, in an image where nothing else is wrong; true if
    /// there was something to do.
    pub(super) async fn complete_snapshots(
        &mut self,
        seen: &Seen,
        report: &CheckReport,
    ) -> Result<bool> {
        let (incomplete, overlong) = (seen.incomplete_snapshots, seen.overlong_snapshots);
        let other = report.corruptions - incomplete + report.check_errors - overlong;
        if incomplete + overlong == 0 || other > 0 || seen.entries {
            return Ok(false);
        }
        let header = match read_header(self.storage).await {
            Ok(header) => header,
            // Such an image cannot be opened, whatever its table is.
            Err(e) if e.kind() != ErrorKind::Io => return Ok(false),
            Err(e) => return Err(e),
        };
        let len_before = self.storage.len();
        let built = async {
            let mut sh = Shadow::begin(self.storage, header).await?;
            snapshot::complete_table(&mut sh).await?;
            sh.finish().await
        }
        .await;
        if built.is_err() {
            Shadow::give_up(self.storage, len_before).await;
        }
        let ready = built?;
        ready.publish(self.storage).await?;
        ready.punch_freed(self.storage).await;
        self.done.corruptions_fixed += incomplete + overlong;
        Ok(true)
    }
}
