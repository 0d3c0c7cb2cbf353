//! Giving clusters back: what was freed, once nobody can miss it, and what was
//! reserved and never used.

use std::ops::Range;

use super::{Allocator, Freed, Image, lock};
use crate::error::{ErrorKind, Result};
use crate::qcow2::spec::addr::HostOffset;
use crate::race::Guard;

impl Image {
    /// Drops the references of what has been unmapped durably and is out of
    /// use: counts fall, space is punched out, the allocator gets it back.
    ///
    /// The caller holds the flush lock.
    pub(in crate::qcow2) async fn release_frees(&self) -> Result<()> {
        self.grace.advance();
        let ready: Vec<Freed> = {
            let mut durable = lock(&self.frees.durable);
            let (over, waiting) = std::mem::take(&mut *durable)
                .into_iter()
                .partition(|(tag, _)| self.grace.is_over(*tag) || Guard::Grace.is_away());
            *durable = waiting;
            let over: Vec<(u64, Vec<Freed>)> = over;
            over.into_iter().flat_map(|(_, freed)| freed).collect()
        };
        for (index, freed) in ready.iter().enumerate() {
            if let Err(error) = self.release(*freed).await {
                // What cannot be given back leaks until it can, or until the
                // image is repaired; the others still go.
                tracing::error!("cannot give clusters back: {error}");
                if error.kind() == ErrorKind::Latched {
                    lock(&self.frees.durable).push((0, ready[index + 1..].to_vec()));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn release(&self, freed: Freed) -> Result<()> {
        let all = freed.first..freed.first + freed.count;
        // Ours is the last reference where the count is 1, and nobody can add
        // one to a cluster that no mapping names. The space goes before the
        // count: once the count is 0 the allocator may find the cluster, and a
        // late punch would hit its next owner.
        let last = {
            let alloc = self.alloc.lock().await;
            match self.last_references(&alloc, all.clone()).await {
                Ok(last) => last,
                Err(error) => {
                    lock(&self.frees.durable).push((0, vec![freed]));
                    return Err(error);
                }
            }
        };
        let mut runs = Vec::with_capacity(last.len());
        for run in last {
            let offset = HostOffset::of_cluster(run.start, self.geometry.cluster_bits);
            let len = (run.end - run.start) << self.geometry.cluster_bits;
            if freed.table {
                self.l2.forget(offset, len);
            }
            self.metadata.remove_range(run.start, run.end - run.start);
            if !Guard::Inflated.is_away() {
                self.inflated.forget(offset, len);
            }
            // Failing to give space back loses nothing.
            let zeroed =
                self.punch_frees && self.storage.punch(offset.0, len).await.unwrap_or(false);
            runs.push((run, zeroed));
        }

        let mut alloc = self.alloc.lock().await;
        let mut result = Ok(());
        for cluster in all.clone() {
            let dropped = alloc
                .refcounts
                .adjust(&self.refblocks, &self.storage, cluster, -1)
                .await;
            if let Err(error) = dropped {
                runs.retain(|(run, _)| !run.contains(&cluster));
                // What contradicts the count is skipped, what could not be
                // read is tried again.
                if error.kind() != ErrorKind::Corrupt {
                    lock(&self.frees.durable).push((
                        0,
                        vec![Freed {
                            first: cluster,
                            count: all.end - cluster,
                            ..freed
                        }],
                    ));
                    runs.retain(|(run, _)| run.end <= cluster);
                    result = Err(error);
                    break;
                }
                result = Err(error);
            }
        }
        for (run, zeroed) in runs {
            alloc.add_free(run.start, run.end - run.start, zeroed);
        }
        result
    }

    /// The runs of clusters whose refcount is 1.
    async fn last_references(
        &self,
        alloc: &Allocator,
        clusters: Range<u64>,
    ) -> Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in clusters {
            let count = alloc
                .refcounts
                .get(&self.refblocks, &self.storage, cluster)
                .await?;
            if count == 1 {
                match runs.last_mut() {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => runs.push(cluster..cluster + 1),
                }
            }
        }
        Ok(runs)
    }

    /// Gives every unused reservation back, for a clean close. No request is
    /// under way.
    pub(in crate::qcow2) async fn give_back_runs(&self) -> Result<()> {
        let packers = self.empty_packer().await;
        let mut alloc = self.alloc.lock().await;
        let alloc = &mut *alloc;
        let mut runs = std::mem::take(&mut alloc.returned);
        runs.append(&mut lock(&self.given_back));
        runs.extend(packers);
        for run in &self.runs {
            let mut run = lock(run);
            let count = run.count;
            if count > 0 {
                runs.push(run.take(count));
            }
        }
        for run in runs {
            let mut left = 0;
            for cluster in run.first..run.first + run.count {
                left += alloc
                    .refcounts
                    .adjust(&self.refblocks, &self.storage, cluster, -1)
                    .await?;
            }
            // Compressed clusters may be in the last one of the packer; those
            // that were there are in the cache.
            if left == 0 && run.count > 0 {
                let bits = self.geometry.cluster_bits;
                let offset = HostOffset::of_cluster(run.first, bits);
                self.inflated.forget(offset, run.count << bits);
                alloc.add_free(run.first, run.count, run.zeroed);
            }
        }
        Ok(())
    }
}
