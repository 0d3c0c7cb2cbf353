//! The operations on snapshots, each as a new state of the image's metadata.

use std::time::{SystemTime, UNIX_EPOCH};

use super::table::{self, Selector};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::marks;
use crate::qcow2::shadow::{Ready, Shadow, Tree};
use crate::qcow2::spec::header::Incompatible;
use crate::qcow2::spec::snapshot::Snapshot;
use crate::qcow2::spec::{Header, HostOffset};
use crate::race::Guard;
use crate::storage::Storage;

/// A snapshot to be made of the active disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name; any, even one that another has.
    pub name: Vec<u8>,
    /// When it is taken, since the epoch.
    pub date: std::time::Duration,
}

impl NewSnapshot {
    /// A snapshot that is taken now.
    pub fn now(name: impl Into<Vec<u8>>) -> Self {
        let date = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            name: name.into(),
            // A clock before 1970 is not worth an error.
            date: date.unwrap_or_default(),
        }
    }
}

/// What is to be done with an image's snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotJob {
    /// A snapshot is made of the active disk.
    Create(NewSnapshot),
    /// A snapshot goes, and what it alone has.
    Delete(Selector),
    /// The active disk becomes what it was. What has been written since is
    /// lost, unless another snapshot has it.
    Apply(Selector),
    /// A snapshot gets another name.
    Rename(Selector, Vec<u8>),
}

impl SnapshotJob {
    /// Does it with the image in `storage`, which nobody else has open.
    pub async fn run(&self, storage: &Storage) -> Result<()> {
        let header = marks::sound_header(storage).await?;
        let ready = self.build(storage, header).await?;
        ready.publish(storage).await?;
        ready.punch_freed(storage).await;
        Ok(())
    }

    /// Builds the state in which it is done, beside the one that `header`
    /// describes. Nothing refers to it yet.
    pub(super) async fn build(&self, storage: &Storage, header: Header) -> Result<Ready> {
        storage.check_writable()?;
        refuse_external(&header).map_err(|e| e.path(storage.path()))?;
        let len_before = storage.len();
        let built = self.try_build(storage, header).await;
        if built.is_err() {
            Shadow::give_up(storage, len_before).await;
        }
        built.map_err(|e| e.path(storage.path()))
    }

    async fn try_build(&self, storage: &Storage, header: Header) -> Result<Ready> {
        let (snapshots, table_len) = table::read(storage, &header).await?;
        let work = Work {
            size_before: header.size,
            sh: Shadow::begin(storage, header).await?,
            snapshots,
            table_len,
        };
        match self {
            Self::Create(new) => work.create(new).await,
            Self::Delete(which) => work.delete(which).await,
            Self::Apply(which) => work.apply(which).await,
            Self::Rename(which, name) => work.rename(which, name).await,
        }
    }
}

/// An image whose snapshots are being changed.
struct Work<'a> {
    sh: Shadow<'a>,
    snapshots: Vec<Snapshot>,
    /// Virtual size in bytes, as stored.
    size_before: u64,
    /// Length of the table of snapshots in the file, in bytes.
    table_len: u64,
}

impl Work<'_> {
    async fn create(mut self, new: &NewSnapshot) -> Result<Ready> {
        table::check_name(&new.name)?;
        let id = table::next_id(&self.snapshots)?;
        let mut active = self.take_active().await?;
        // The active table has what is counted now; the new one shall have it
        // too.
        active.adjust(&mut self.sh, 1).await?;
        if !Guard::Copied.is_away() {
            active.set_copied(&mut self.sh, 2).await?;
        }
        let bytes = active.encode();
        self.put_active(&active).await?;
        self.snapshots.push(Snapshot {
            l1_table_offset: self.sh.write_table(&bytes).await?,
            // The active table's is 32 bits long too.
            l1_size: active.l1.len() as u32,
            id,
            name: new.name.clone(),
            date_sec: new.date.as_secs() as u32,
            date_nsec: new.date.subsec_nanos(),
            vm_clock_nsec: 0,
            vm_state_size: 0,
            has_vm_state_64: true,
            disk_size: Some(self.sh.header.virtual_size()),
            // Nobody counted.
            icount: Some(u64::MAX),
            unknown_extra: Vec::new(),
        });
        self.finish().await
    }

    async fn delete(mut self, which: &Selector) -> Result<Ready> {
        let snapshot = self.snapshots.remove(which.require(&self.snapshots)?);
        let tree = self.tree(&snapshot).await?;
        let mut active = self.take_active().await?;
        tree.adjust(&mut self.sh, -1).await?;
        self.sh
            .free(snapshot.l1_table_offset, snapshot.l1_bytes())
            .await?;
        active.set_copied(&mut self.sh, 1).await?;
        self.put_active(&active).await?;
        self.finish().await
    }

    async fn apply(mut self, which: &Selector) -> Result<Ready> {
        let header = &self.sh.header;
        if header.bitmaps().is_some() && header.bitmaps_consistent() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the image has dirty bitmaps, which would not record what changes",
            )
            .cure("remove them first, with `qcow2-ublk bitmap --remove`"));
        }
        let snapshot = self.snapshots[which.require(&self.snapshots)?].clone();
        let size = snapshot.disk_size.unwrap_or(header.size);
        if size & !511 > self.sh.geometry().max_size() {
            return Err(Error::corrupt(
                format!("the snapshot's disk of {size} bytes is larger than any"),
                header.snapshots_offset.0,
            ));
        }
        let mut tree = self.tree(&snapshot).await?;
        let active = self.take_active().await?;
        // Down first: with narrow refcounts there may be no room for one more.
        active.adjust(&mut self.sh, -1).await?;
        tree.adjust(&mut self.sh, 1).await?;
        tree.set_copied(&mut self.sh, 1).await?;
        // The snapshot may have been made before the disk grew, or with VM
        // state past its end; and a disk has to be mapped wholly, to its last byte
        // even where that is no whole sector.
        let needed = self.sh.geometry().l1_entries_for(size) as usize;
        let entries = tree.l1.len().max(needed);
        tree.l1.resize(entries, 0);
        self.sh.header.size = size;
        self.put_active(&tree).await?;
        self.finish().await
    }

    async fn rename(mut self, which: &Selector, name: &[u8]) -> Result<Ready> {
        table::check_name(name)?;
        let index = which.require(&self.snapshots)?;
        self.snapshots[index].name = name.to_vec();
        self.finish().await
    }

    async fn tree(&self, snapshot: &Snapshot) -> Result<Tree> {
        Tree::read(&self.sh, snapshot.l1_table_offset, snapshot.l1_size).await
    }

    /// Reads the active L1 table, and gives its place up.
    async fn take_active(&mut self) -> Result<Tree> {
        let (offset, entries) = (self.sh.header.l1_table_offset, self.sh.header.l1_size);
        let tree = Tree::read(&self.sh, offset, entries).await?;
        let len = self.sh.header.l1_bytes();
        self.sh.free(offset, len).await?;
        Ok(tree)
    }

    /// Writes the active L1 table.
    async fn put_active(&mut self, tree: &Tree) -> Result<()> {
        let offset = self.sh.write_table(&tree.encode()).await?;
        self.sh.header.l1_table_offset = offset;
        // No longer than one that could be read.
        self.sh.header.l1_size = tree.l1.len() as u32;
        Ok(())
    }

    /// Writes the table of snapshots, and all that is left.
    async fn finish(mut self) -> Result<Ready> {
        if self.sh.geometry().version >= 3 {
            // What older programs left out, version 3 requires; and a disk
            // that is resized must not take the snapshot with it.
            table::complete(&mut self.snapshots, self.size_before);
        }
        let bytes = table::encode(&self.snapshots)?;
        let old = self.sh.header.snapshots_offset;
        self.sh.free(old, self.table_len).await?;
        self.sh.header.snapshots_offset = if bytes.is_empty() {
            HostOffset(0)
        } else {
            self.sh.write_table(&bytes).await?
        };
        // At most 65536, as encoded.
        self.sh.header.nb_snapshots = self.snapshots.len() as u32;
        self.sh.finish().await
    }
}

/// With an external data file, clusters are not counted, and cannot be shared.
pub(crate) fn refuse_external(header: &Header) -> Result<()> {
    if header.incompatible.contains(Incompatible::DATA_FILE) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "an image with an external data file cannot have internal snapshots",
        )
        .cure("put an overlay over the image instead"));
    }
    Ok(())
}
