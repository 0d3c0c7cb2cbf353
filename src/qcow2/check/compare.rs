//! Refcounts against uses.

use super::{Checker, Problem, Severity};
use crate::error::Result;
use crate::qcow2::spec::refcount;

impl Checker<'_> {
    /// Compares the refcount of every cluster of the file with the number of
    /// its uses.
    pub(super) async fn compare(&mut self) -> Result<()> {
        // The cluster behind the last is there if somebody uses it: the file
        // may end inside it.
        let mut clusters = self.clusters;
        if clusters < self.counts.len() && self.counts.get(clusters) > 0 {
            clusters += 1;
        }
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcounts_per_block();
        let mut highest = 0;
        let mut first = 0;
        // No cluster between the current one and this is used.
        let mut next_used = 0;
        while first < clusters {
            let index = first / per_block;
            let end = clusters.min((index + 1) * per_block);
            let block = self.refcount_block(index).await?;
            if self.refcounts_unreadable(index) {
                let problem = Problem::UnreadableRefcounts {
                    first,
                    block: self.refcount_block_offset(index),
                };
                self.found(Severity::Error, end - first, problem);
                first = end;
                continue;
            }
            let missing = self.refcount_block_offset(index) == 0;
            let mut cluster = first;
            while cluster < end {
                let stored = match &block {
                    Some(block) => {
                        refcount::get(block, order, (cluster - index * per_block) as usize)
                    }
                    None => {
                        if next_used <= cluster {
                            next_used = self.counts.next_used(cluster);
                        }
                        cluster = next_used.max(cluster);
                        if cluster >= end {
                            break;
                        }
                        0
                    }
                };
                let counted = self.counts.get(cluster);
                if stored > 0 || counted > 0 {
                    highest = cluster;
                }
                if stored != counted {
                    self.seen.no_block |= stored < counted && missing;
                    self.found_refcount(cluster, stored, counted);
                } else if counted > 1 && self.counts.overlaps(cluster) {
                    let problem = Problem::Overlap { cluster, counted };
                    self.found(Severity::Corruption, 1, problem);
                }
                cluster += 1;
            }
            first = end;
            if self.refcounts_end_before(index) {
                // Only uses are left to be found.
                next_used = self.counts.next_used(first);
                first = first.max(next_used / per_block * per_block);
            }
        }
        self.report.image_end_offset = (highest + 1) << self.geometry.cluster_bits;
        Ok(())
    }

    #[cold]
    fn found_refcount(&mut self, cluster: u64, stored: u64, counted: u64) {
        let severity = if stored < counted {
            Severity::Corruption
        } else {
            Severity::Leak
        };
        let problem = Problem::Refcount {
            cluster,
            stored,
            counted,
        };
        self.found(severity, 1, problem);
    }
}
