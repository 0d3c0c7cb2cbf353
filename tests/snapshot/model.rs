//! Random writes, zeroes, discards and snapshot operations against vectors of
//! bytes, on an open image that is closed and opened now and then.

use crate::common::check::Checked;
use crate::common::lab::{self, Below, How};
use crate::common::{self, half_random};
use qcow2_ublk::engine::Engine;
use qcow2_ublk::qcow2::{NewSnapshot, Selector};
use qcow2_ublk::storage::sim::{self, Rng, SimDisk};

struct Kept {
    id: Vec<u8>,
    name: Vec<u8>,
    content: Vec<u8>,
}

struct Trial {
    disk: SimDisk,
    how: How,
    below: Vec<u8>,
    engine: Engine,
    active: Vec<u8>,
    kept: Vec<Kept>,
    rng: Rng,
    cluster: u64,
    /// A disk with snapshots can grow, and a discard leaves zeros.
    version_3: bool,
    /// Most references of a cluster.
    most: usize,
    done: [u32; 5],
}

impl Trial {
    async fn new(image: sim::Image, below: &[u8], seed: u64, punch: bool) -> Self {
        let checked = Checked::open(&image).unwrap();
        let header = &checked.header;
        let (cluster, version_3) = (header.cluster_size(), header.version >= 3);
        let most = header.geometry().max_refcount().min(8) as usize;
        let active = checked.active_content(below);
        let how = How {
            below: match below {
                [] => Below::Nothing,
                below => Below::Raw(sim::Image::from_bytes(below)),
            },
            queues: 2,
            punch,
            ..How::default()
        };
        let disk = SimDisk::with_image(image);
        Self {
            engine: lab::open(&disk, &how).await.unwrap(),
            disk,
            how,
            below: below.to_vec(),
            active,
            kept: Vec::new(),
            rng: Rng::new(seed),
            cluster,
            version_3,
            most,
            done: [0; 5],
        }
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.active.len() as u64 / 512;
        let first = self.rng.below(sectors);
        let most = (6 * self.cluster.max(2048) / 512).min(sectors - first);
        (first * 512, (1 + self.rng.below(most)) * 512)
    }

    async fn step(&mut self) {
        let queue = self.rng.below(2) as u16;
        match self.rng.below(20) {
            0..8 => {
                let (offset, len) = self.range();
                let bytes = half_random(len as usize, self.rng.next_u64());
                lab::write(&self.engine, queue, offset, &bytes, false)
                    .await
                    .unwrap();
                self.active[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            8..10 => {
                let (offset, len) = self.range();
                let unmap = self.rng.chance(1, 2);
                let zeroed = self.engine.write_zeroes(queue, offset, len, unmap).await;
                zeroed.unwrap();
                self.active[offset as usize..][..len as usize].fill(0);
            }
            // They share clusters, and narrow counts have no room for that.
            10 if self.most >= 8 => self.write_compressed(queue).await,
            10..12 => self.discard(queue).await,
            12 => self.engine.flush().await.unwrap(),
            13 => {
                self.engine.close().await.unwrap();
                self.engine = lab::open(&self.disk, &self.how).await.unwrap();
                self.done[4] += 1;
            }
            14 if self.version_3 && self.active.len() < 3 << 20 => {
                let size = self.active.len() as u64 + 512 * (1 + self.rng.below(300));
                self.engine.grow(size).await.unwrap();
                self.active.resize(size as usize, 0);
            }
            _ => {
                if self.snapshot_step().await {
                    self.judge().await;
                }
            }
        }
    }

    async fn write_compressed(&mut self, queue: u16) {
        let (offset, _) = self.range();
        let start = offset / self.cluster * self.cluster;
        let len = (3 * self.cluster).min(self.active.len() as u64 - start);
        let bytes = half_random(len as usize, self.rng.next_u64());
        let written = self.engine.write_compressed(queue, start, &bytes, None);
        written.await.unwrap();
        self.active[start as usize..][..bytes.len()].copy_from_slice(&bytes);
    }

    async fn discard(&mut self, queue: u16) {
        let (offset, len) = self.range();
        self.engine.discard(queue, offset, len).await.unwrap();
        let now = lab::read(&self.engine, queue, offset, len).await.unwrap();
        let was = &mut self.active[offset as usize..][..len as usize];
        for (now, was) in now.chunks(512).zip(was.chunks_mut(512)) {
            let zeros = now.iter().all(|&b| b == 0);
            assert!(zeros || now == was, "a discard leaves zeros or what was");
            was.copy_from_slice(now);
        }
    }

    /// Whether there was something to do.
    async fn snapshot_step(&mut self) -> bool {
        let image = self.engine.chain().top();
        let name = format!("name {}", self.rng.below(5)).into_bytes();
        let which = self.rng.below(self.kept.len().max(1) as u64) as usize;
        match self.rng.below(5) {
            0 if !self.kept.is_empty() => {
                let kept = self.kept.remove(which);
                image.delete_snapshot(Selector::Id(kept.id)).await.unwrap();
                self.done[0] += 1;
            }
            1 if !self.kept.is_empty() => {
                let id = self.kept[which].id.clone();
                image.apply_snapshot(Selector::Id(id)).await.unwrap();
                self.active = self.kept[which].content.clone();
                self.done[1] += 1;
            }
            2 if !self.kept.is_empty() => {
                let id = Selector::Id(self.kept[which].id.clone());
                image.rename_snapshot(id, name.clone()).await.unwrap();
                self.kept[which].name = name;
                self.done[2] += 1;
            }
            _ if self.kept.len() + 1 < self.most => {
                let new = NewSnapshot::now(name.clone());
                image.create_snapshot(new).await.unwrap();
                let largest = self.kept.iter().map(|kept| number(&kept.id)).max();
                self.kept.push(Kept {
                    id: (largest.unwrap_or(0) + 1).to_string().into_bytes(),
                    name,
                    content: self.active.clone(),
                });
                self.done[3] += 1;
            }
            _ => return false,
        }
        true
    }

    /// Right after an operation on snapshots, the file has everything.
    async fn judge(&self) {
        let size = self.engine.size();
        assert_eq!(size, self.active.len() as u64);
        let seen = lab::read(&self.engine, 0, 0, size).await.unwrap();
        assert!(seen == self.active, "the open disk");
        let image = self.disk.image();
        let checked = Checked::open(&image).unwrap();
        let found = checked.check();
        assert!(found.corruptions.is_empty(), "{:#?}", found.corruptions);
        assert_eq!(found.leaks, 0);
        assert!(checked.active_content(&self.below) == self.active);
        let snapshots = checked.snapshots();
        assert_eq!(snapshots.len(), self.kept.len());
        for (index, (snapshot, kept)) in snapshots.iter().zip(&self.kept).enumerate() {
            assert_eq!(snapshot.id, kept.id);
            assert_eq!(snapshot.name, kept.name);
            let content = checked.snapshot_content(index, &self.below);
            assert!(content == kept.content, "snapshot {index}");
        }
    }

    /// QEMU sees every snapshot as we do.
    async fn ask_qemu(self) {
        self.engine.close().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        self.disk.image().save(&path).unwrap();
        let name = path.to_str().unwrap();
        lab::qemu_check(&path, false);
        if !self.below.is_empty() {
            let below = dir.path().join("below.raw");
            std::fs::write(&below, &self.below).unwrap();
            let below = below.to_str().unwrap();
            common::qemu_img(&["rebase", "-u", "-F", "raw", "-b", below, name]);
        }
        let raw = dir.path().join("raw");
        let raw_name = raw.to_str().unwrap();
        for kept in &self.kept {
            let which = format!("snapshot.id={}", String::from_utf8_lossy(&kept.id));
            common::qemu_img(&["convert", "-l", &which, "-O", "raw", name, raw_name]);
            // QEMU shows as much of it as the active disk is long.
            let theirs = std::fs::read(&raw).unwrap();
            let len = theirs.len().min(kept.content.len());
            assert!(len > 0 && theirs[..len] == kept.content[..len], "{which}");
        }
        common::qemu_img(&["convert", "-O", "raw", name, raw_name]);
        assert!(std::fs::read(&raw).unwrap() == self.active);
    }
}

fn number(id: &[u8]) -> u64 {
    String::from_utf8_lossy(id).parse().unwrap()
}

fn run(image: sim::Image, below: &[u8], seed: u64, steps: u32, punch: bool) -> [u32; 5] {
    eprintln!("seed {seed}");
    lab::watched(120, || {
        lab::block_on(async {
            let mut trial = Trial::new(image, below, seed, punch).await;
            for _ in 0..steps {
                trial.step().await;
            }
            let done = trial.done;
            trial.ask_qemu().await;
            done
        })
    })
}

#[test]
fn every_snapshot_keeps_its_content() {
    let mut seed = 1;
    let mut all = [0; 5];
    for (cluster, sizes) in [("512", 200), ("4096", 700), ("65536", 2000)] {
        for bits in ["2", "8", "16", "64"] {
            let options = format!("cluster_size={cluster},refcount_bits={bits}");
            let image = lab::created(&options, sizes << 10);
            let done = run(image, &[], seed, 90, seed % 3 != 0);
            for (sum, n) in all.iter_mut().zip(done) {
                *sum += n;
            }
            seed += 1;
        }
    }
    let [deleted, applied, renamed, created, reopened] = all;
    eprintln!("{created} {deleted} {applied} {renamed} {reopened}");
    assert!(deleted.min(applied).min(renamed).min(created).min(reopened) > 20);
}

#[test]
fn version_2_keeps_them_too() {
    for seed in 50..52 {
        let image = lab::created("compat=0.10,cluster_size=4096", 700 << 10);
        let below = if seed == 50 {
            Vec::new()
        } else {
            half_random(500 << 10, seed)
        };
        run(image, &below, seed, 80, true);
    }
}

#[test]
fn over_a_backing_file() {
    for seed in 60..62 {
        let image = lab::created("cluster_size=4096", 700 << 10);
        // Its end is not the end of a cluster.
        let below = half_random((500 << 10) + 1536, seed);
        run(image, &below, seed, 80, true);
    }
}

#[test]
fn compressed_clusters_are_counted_in_every_cluster_they_touch() {
    for (seed, cluster, kind) in [
        (70, "512", "zlib"),
        (71, "4096", "zlib"),
        (72, "65536", "zstd"),
    ] {
        let options = format!("cluster_size={cluster},compression_type={kind}");
        let content = half_random(600 << 10, seed);
        let image = lab::converted(&content, &["-c", "-o", &options]);
        run(image, &[], seed, 80, true);
    }
}
