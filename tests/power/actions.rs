//! Actions, which no request meets, and the worlds that they make.

use std::rc::Rc;
use std::time::Duration;

use qcow2_ublk::Result;
use qcow2_ublk::chain::{Apart, Chain};
use qcow2_ublk::crypto::{Effort, Limits, Secret};
use qcow2_ublk::engine::{Commit, Engine};
use qcow2_ublk::qcow2::amend::Amendment;
use qcow2_ublk::qcow2::check::{self, Repair};
use qcow2_ublk::qcow2::{BitmapAction, KeySlots, NewSnapshot, Selector, SnapshotJob};
use qcow2_ublk::storage::Storage;

use super::bitmaps::{self, refuses_lost};
use super::common::check::Checked;
use super::features;
use super::judge::{below_bytes, fits};
use super::machine::{self, PASSPHRASE, is_refusal, passphrase};
use super::model::{Taken, Value, World};
use super::op::Action;
use super::run::{Session, text};
use super::{Verdict, ensure};

fn named(name: char) -> Selector {
    Selector::Name(name.to_string().into())
}

fn new(name: char) -> NewSnapshot {
    NewSnapshot {
        name: name.to_string().into(),
        date: Duration::from_secs(1),
    }
}

impl Session<'_> {
    pub(crate) async fn act(&mut self, action: Action) -> Verdict {
        if self.engine.is_none() {
            self.open().await?;
        }
        let content = Rc::new(self.compare().await?);
        if action == Action::Die {
            return self.die().await;
        }
        let size = self.engine().size() / 512;
        let offline = matches!(
            action,
            Action::Reopen
                | Action::OfflineSnapshot(_)
                | Action::OfflineUnsnapshot(_)
                | Action::OfflineApply(_)
                | Action::Width(_)
                | Action::Version(_)
                | Action::Lazy(_)
                | Action::Commit
                | Action::Repair
                | Action::Key(_)
                | Action::Unkey(_)
        );
        if offline {
            self.close().await?;
        }
        let started = self.recorded();
        let done = if offline {
            self.offline(action).await
        } else {
            online(self.engine(), action).await
        };
        match done {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            // Nothing has changed then, which whatever follows shows.
            Err(error) if is_refusal(&error) => return Ok(()),
            Err(error) if refuses_lost(&self.bitmaps.borrow(), action, &error) => return Ok(()),
            Err(error) => return Err(text(error)),
        }
        self.follow(action, started, &content)?;
        if let Action::Resize(to) = action {
            self.touch_from(to.min(size), to);
        }
        if offline {
            self.open().await?;
        }
        self.compare().await?;
        let grows = matches!(action, Action::Resize(to) if to > size);
        let feature = features::of_action(action, grows).to_owned();
        self.features.borrow_mut().insert(feature);
        Ok(())
    }

    /// The process dies: what is in memory is gone, and what is in the file,
    /// durable or not, another one opens.
    async fn die(&mut self) -> Verdict {
        self.engine = None;
        let at_death = self.recorded();
        {
            let image = self.disks.image.image();
            let checked = Checked::open(&image)?;
            bitmaps::follow_death(&mut self.bitmaps.borrow_mut(), &checked);
        }
        self.open().await?;
        let content = machine::read_all(self.engine()).await.map_err(text)?;
        let mut log = self.log.borrow_mut();
        let world = log.world().clone();
        let allowed = log.allowed(&world, at_death);
        fits(&log, &content, &allowed).map_err(|e| format!("after the process died: {e}"))?;
        log.died(at_death, Rc::new(content));
        let world = World {
            started: at_death,
            complete: at_death,
            bitmaps: Rc::new(self.bitmaps.borrow().clone()),
            ..world
        };
        log.worlds.push(world);
        let feature = features::of_action(Action::Die, false);
        self.features.borrow_mut().insert(feature.to_owned());
        Ok(())
    }

    /// With the image closed; it stays so.
    async fn offline(&mut self, action: Action) -> Result<bool> {
        let storage = Storage::simulated(&self.disks.image, self.case.shape.alignment);
        let amended = |amendment: Amendment| {
            let storage = &storage;
            async move { amendment.run(storage).await }
        };
        let unchanged = Amendment::default();
        match action {
            Action::OfflineSnapshot(name) => SnapshotJob::Create(new(name)).run(&storage).await?,
            Action::OfflineUnsnapshot(name) => {
                SnapshotJob::Delete(named(name)).run(&storage).await?;
            }
            Action::OfflineApply(name) => SnapshotJob::Apply(named(name)).run(&storage).await?,
            Action::Width(bits) => {
                let refcount_bits = Some(bits);
                amended(Amendment {
                    refcount_bits,
                    ..unchanged
                })
                .await?;
            }
            Action::Version(version) => {
                let version = Some(version);
                amended(Amendment {
                    version,
                    ..unchanged
                })
                .await?;
            }
            Action::Lazy(on) => {
                let lazy_refcounts = Some(on);
                amended(Amendment {
                    lazy_refcounts,
                    ..unchanged
                })
                .await?;
            }
            Action::Commit => {
                drop(storage);
                return self.commit().await;
            }
            Action::Repair => {
                check::repair(&storage, Repair::Leaks, &mut |_| {}).await?;
            }
            Action::Key(name) => return self.add_key(&storage, name).await,
            Action::Unkey(name) => return self.remove_key(&storage, name).await,
            _ => {}
        }
        Ok(true)
    }

    async fn commit(&mut self) -> Result<bool> {
        // What snapshots show would change with the layer below.
        let snapshots = !self.log.borrow().world().snapshots.is_empty();
        if self.disks.below.is_none() || snapshots {
            return Ok(false);
        }
        self.committed = true;
        let upper = machine::open_image(&self.disks, &self.case.shape).await?;
        let apart = Apart {
            upper: Chain::new(upper, Vec::new()),
            base: machine::open_below(&self.disks, &self.case.shape).await?,
        };
        let commit = Commit::new(apart)?;
        commit.copy(&mut |_, _| {}).await?;
        commit.empty().await?;
        Ok(true)
    }

    async fn add_key(&self, storage: &Storage, name: char) -> Result<bool> {
        if self.case.shape.luks == 0 || self.log.borrow().world().keys.contains(&name) {
            return Ok(false);
        }
        let (first, new) = (Secret::new(PASSPHRASE.to_vec()), passphrase(name));
        let (effort, limits) = (Effort(Duration::ZERO), Limits::default());
        let mut slots = KeySlots::open(storage).await?;
        slots.add(&first, &new, None, effort, &limits).await?;
        Ok(true)
    }

    async fn remove_key(&self, storage: &Storage, name: char) -> Result<bool> {
        if !self.log.borrow().world().keys.contains(&name) {
            return Ok(false);
        }
        let mut slots = KeySlots::open(storage).await?;
        let slot = slots.slot_of(&passphrase(name), &Limits::default()).await?;
        slots.remove(slot, false).await?;
        Ok(true)
    }

    /// Notes the world that the action has made of one that showed `content`.
    fn follow(&self, action: Action, started: usize, content: &Rc<Vec<u8>>) -> Verdict {
        let mut log = self.log.borrow_mut();
        let mut world = log.world().clone();
        world.started = started;
        world.complete = self.recorded();
        let mut snapshots = (*world.snapshots).clone();
        let first = log.changes.len();
        let of_name = |name: char, snapshots: &[Taken]| {
            let name = name.to_string();
            let found = snapshots.iter().position(|taken| taken.name == name);
            found.ok_or_else(|| format!("there is no snapshot {name}"))
        };
        match action {
            Action::Snapshot(name) | Action::OfflineSnapshot(name) => {
                let images = self.disks.images();
                let shape = &self.case.shape;
                let checked = Checked::open(&images[0])?;
                let below = below_bytes(shape, &images, self.committed)?;
                let index = checked.snapshots().len() - 1;
                let stored = checked.snapshot_content(index, &below);
                ensure!(
                    shape.luks != 0 || stored == **content,
                    "the snapshot does not show what the disk did"
                );
                let shown = log.add_content(Rc::clone(content));
                snapshots.push(Taken {
                    name: name.to_string(),
                    content: Rc::new(stored),
                    shown,
                });
            }
            Action::Unsnapshot(name) | Action::OfflineUnsnapshot(name) => {
                let index = of_name(name, &snapshots)?;
                snapshots.remove(index);
            }
            Action::Apply(name) | Action::OfflineApply(name) => {
                let shown = snapshots[of_name(name, &snapshots)?].shown;
                let sectors = log.contents[shown as usize].len() / 512;
                world.sectors = Rc::new(vec![(Value::Content(shown), first); sectors]);
            }
            Action::Resize(to) => {
                let mut sectors = (*world.sectors).clone();
                sectors.resize(to as usize, (Value::Zeros, first));
                world.sectors = Rc::new(sectors);
            }
            Action::Key(name) => drop(Rc::make_mut(&mut world.keys).insert(name)),
            Action::Unkey(name) => drop(Rc::make_mut(&mut world.keys).remove(&name)),
            _ => {}
        }
        world.snapshots = Rc::new(snapshots);
        bitmaps::follow(&mut self.bitmaps.borrow_mut(), action, content);
        world.bitmaps = Rc::new(self.bitmaps.borrow().clone());
        log.worlds.push(world);
        Ok(())
    }
}

/// Does it while the image is open. False when there was nothing to do.
pub(crate) async fn online(engine: &Engine, action: Action) -> Result<bool> {
    let image = engine.chain().top();
    let bitmap = |name: char, action: BitmapAction<'static>| async move {
        let name = name.to_string();
        image.change_bitmap(name.as_bytes(), &action).await
    };
    match action {
        Action::Snapshot(name) => image.create_snapshot(new(name)).await?,
        Action::Unsnapshot(name) => image.delete_snapshot(named(name)).await?,
        Action::Apply(name) => image.apply_snapshot(named(name)).await?,
        Action::Resize(to) if to * 512 > engine.size() => engine.grow(to * 512).await?,
        Action::Resize(to) if to * 512 < engine.size() => engine.shrink(to * 512).await?,
        Action::Bitmap(name, bits) => {
            let granularity = Some(1 << bits);
            bitmap(name, BitmapAction::Add { granularity }).await?;
        }
        Action::Unbitmap(name) => bitmap(name, BitmapAction::Remove).await?,
        Action::Enable(name) => bitmap(name, BitmapAction::Enable).await?,
        Action::Disable(name) => bitmap(name, BitmapAction::Disable).await?,
        Action::Clear(name) => bitmap(name, BitmapAction::Clear).await?,
        _ => return Ok(false),
    }
    Ok(true)
}
