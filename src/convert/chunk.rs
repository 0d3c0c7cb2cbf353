//! A piece of a disk on its way: read, searched for zeros, compressed. Says
//! what is to be done to the target, and does nothing to it.

use std::ops::Range;

use super::Source;
use super::target::{Before, Target};
use crate::chain::MapEntry;
use crate::codec;
use crate::engine::is_zero;
use crate::error::Result;
use crate::qcow2::CompressionType;

/// Unit in which zeros are looked for, in bytes.
const BLOCK: u64 = 4096;

/// Bytes of the disk; it begins with a cluster of the target, and ends with
/// one or with the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// What the target is to show.
#[derive(Debug)]
pub(super) enum Action {
    /// These bytes of the chunk.
    Write(Range<usize>),
    /// Zeros.
    Zero { at: u64, len: u64 },
    /// A cluster, compressed.
    Stream { at: u64, bytes: Vec<u8> },
}

/// A job done.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) at: u64,
    pub(super) buf: Vec<u8>,
    pub(super) actions: Vec<Action>,
}

/// What has to be done with a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The target shows it already.
    Skip,
    Zero,
    Data,
}

/// How chunks are made.
#[derive(Debug)]
pub(super) struct Maker<'a> {
    pub(super) source: &'a Source,
    pub(super) target: &'a Target,
    /// Method and level, if it is to be compressed.
    pub(super) compress: Option<(CompressionType, i32)>,
    /// See [`super::Options::sparse`].
    pub(super) sparse: u64,
}

impl Maker<'_> {
    pub(super) fn kind(&self, entry: &MapEntry) -> Kind {
        match &self.target.before {
            Before::Layer(depth) if entry.depth >= *depth => Kind::Skip,
            _ if !entry.zero || self.sparse == 0 => Kind::Data,
            Before::Zeros => Kind::Skip,
            _ => Kind::Zero,
        }
    }

    pub(super) async fn make(&self, job: Job, mut buf: Vec<u8>) -> Result<Chunk> {
        buf.resize(job.len as usize, 0);
        let mut chunk = Chunk {
            at: job.at,
            buf,
            actions: Vec::new(),
        };
        let end = job.at + job.len;
        let mut parts: Vec<(Range<u64>, Kind)> = Vec::new();
        let mut at = job.at;
        while at < end {
            let entry = self.source.extent(at, end - at).await?;
            let kind = self.kind(&entry);
            match parts.last_mut() {
                Some((range, last)) if *last == kind => range.end += entry.len,
                _ => parts.push((at..at + entry.len, kind)),
            }
            at += entry.len;
        }
        if self.compress.is_some() || matches!(self.target.before, Before::Disk(_)) {
            self.by_cluster(&mut chunk, &parts).await?;
        } else {
            for (range, kind) in parts {
                match kind {
                    Kind::Skip => {}
                    Kind::Zero => chunk.zero(range.start, range.end - range.start),
                    Kind::Data => self.by_run(&mut chunk, range).await?,
                }
            }
        }
        Ok(chunk)
    }

    /// Each cluster as a whole.
    async fn by_cluster(&self, chunk: &mut Chunk, parts: &[(Range<u64>, Kind)]) -> Result<()> {
        let cluster_size = self.target.cluster_size();
        let end = chunk.at + chunk.buf.len() as u64;
        let mut at = chunk.at;
        while at < end {
            let next = end.min(at + cluster_size);
            let mut kinds = parts
                .iter()
                .filter(|(range, _)| range.start < next && at < range.end)
                .map(|(_, kind)| *kind);
            let first = kinds.next().unwrap_or(Kind::Data);
            let kind = if kinds.all(|kind| kind == first) {
                first
            } else {
                Kind::Data
            };
            match kind {
                Kind::Skip => {}
                Kind::Zero => chunk.zero(at, next - at),
                Kind::Data => self.one_cluster(chunk, at, next).await?,
            }
            at = next;
        }
        Ok(())
    }

    async fn one_cluster(&self, chunk: &mut Chunk, at: u64, end: u64) -> Result<()> {
        let range = (at - chunk.at) as usize..(end - chunk.at) as usize;
        self.source.read(at, &mut chunk.buf[range.clone()]).await?;
        let bytes = &chunk.buf[range.clone()];
        if let Before::Disk(below) = &self.target.before {
            let mut shown = vec![0; bytes.len()];
            below.read(at, &mut shown).await?;
            if shown == *bytes {
                return Ok(());
            }
        }
        if self.sparse > 0 && is_zero(bytes) {
            self.zeros(chunk, at, end - at);
            return Ok(());
        }
        let Some((kind, level)) = self.compress else {
            chunk.actions.push(Action::Write(range));
            return Ok(());
        };
        let cluster_size = self.target.cluster_size() as usize;
        let mut stream = vec![0; cluster_size];
        let len = if bytes.len() == cluster_size {
            codec::compress(kind, level, bytes, &mut stream)
        } else {
            // The last one is not whole: there are zeros past the disk's end.
            let mut whole = bytes.to_vec();
            whole.resize(cluster_size, 0);
            codec::compress(kind, level, &whole, &mut stream)
        };
        chunk.actions.push(match len {
            Some(len) => {
                stream.truncate(len);
                stream.shrink_to_fit();
                Action::Stream { at, bytes: stream }
            }
            None => Action::Write(range),
        });
        Ok(())
    }

    /// What is not zeros.
    async fn by_run(&self, chunk: &mut Chunk, range: Range<u64>) -> Result<()> {
        let start = (range.start - chunk.at) as usize;
        let end = (range.end - chunk.at) as usize;
        self.source
            .read(range.start, &mut chunk.buf[start..end])
            .await?;
        if self.sparse == 0 {
            chunk.actions.push(Action::Write(start..end));
            return Ok(());
        }
        for (run, zero) in runs(&chunk.buf[start..end], self.sparse) {
            if zero {
                let at = range.start + run.start as u64;
                self.zeros(chunk, at, run.len() as u64);
            } else {
                let run = start + run.start..start + run.end;
                chunk.actions.push(Action::Write(run));
            }
        }
        Ok(())
    }

    fn zeros(&self, chunk: &mut Chunk, at: u64, len: u64) {
        if !matches!(self.target.before, Before::Zeros) {
            chunk.zero(at, len);
        }
    }
}

impl Chunk {
    /// Bytes that are written, but for zeros.
    pub(super) fn stored_bytes(&self) -> u64 {
        let bytes = |action: &Action| match action {
            Action::Write(range) => range.len(),
            Action::Zero { .. } => 0,
            Action::Stream { bytes, .. } => bytes.len(),
        };
        self.actions.iter().map(bytes).sum::<usize>() as u64
    }

    fn zero(&mut self, at: u64, len: u64) {
        self.actions.push(Action::Zero { at, len });
    }
}

/// Runs of bytes that are zeros or not. Zeros make a run of their own where
/// there are at least `least` of them in whole blocks.
fn runs(bytes: &[u8], least: u64) -> Vec<(Range<usize>, bool)> {
    let block = BLOCK.min(least) as usize;
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for (nth, part) in bytes.chunks(block).enumerate() {
        let zero = is_zero(part);
        let start = nth * block;
        match runs.last_mut() {
            Some((run, last)) if *last == zero => run.end = start + part.len(),
            _ => runs.push((start..start + part.len(), zero)),
        }
    }
    let mut kept: Vec<(Range<usize>, bool)> = Vec::new();
    for (run, zero) in runs {
        let zero = zero && (run.len() as u64 >= least || run.len() == bytes.len());
        match kept.last_mut() {
            Some((before, last)) if *last == zero => before.end = run.end,
            _ => kept.push((run, zero)),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_runs_of_their_own_where_they_are_long_enough() {
        let mut bytes = vec![1; 5 * 4096];
        bytes[4096..2 * 4096].fill(0);
        bytes[3 * 4096..].fill(0);
        let found = |least| {
            runs(&bytes, least)
                .into_iter()
                .map(|(run, zero)| (run.start / 512, run.end / 512, zero))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            found(4096),
            [
                (0, 8, false),
                (8, 16, true),
                (16, 24, false),
                (24, 40, true)
            ]
        );
        assert_eq!(found(8192), [(0, 24, false), (24, 40, true)]);
        assert_eq!(found(16384), [(0, 40, false)]);
        bytes[512..1024].fill(0);
        let first = &runs(&bytes, 512)[..3];
        assert_eq!(
            first,
            [(0..512, false), (512..1024, true), (1024..4096, false)]
        );
    }
}
