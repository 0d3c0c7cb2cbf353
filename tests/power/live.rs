//! Actions that meet requests: who wrote to a sector while a bitmap's recording
//! began or ended may be in the bitmap or not.

use std::rc::Rc;

use super::Verdict;
use super::actions::online;
use super::bitmaps::{self, refuses_lost};
use super::features;
use super::machine::{self, is_refusal};
use super::model::Value;
use super::op::{Action, Request};
use super::run::text;
use super::task::Task;

impl Task {
    /// One at a time in a wave, beside the requests of other tasks.
    pub(crate) async fn act(&self, action: Action) -> Verdict {
        let size = self.engine.size() / 512;
        if matches!(action, Action::Resize(to) if to <= size) {
            return Ok(());
        }
        let begun = self.log.borrow_mut().tick();
        let started = self.disks.image.recorded();
        let content = Rc::new(machine::read_all(&self.engine).await.map_err(text)?);
        match online(&self.engine, action).await {
            Ok(_) => {}
            Err(error) if is_refusal(&error) => return Ok(()),
            Err(error) if refuses_lost(&self.bitmaps.borrow(), action, &error) => return Ok(()),
            Err(error) => return Err(text(error)),
        }
        let mut log = self.log.borrow_mut();
        let now = log.tick();
        let mut world = log.world().clone();
        world.started = started;
        world.complete = self.disks.image.recorded();
        if let Action::Resize(to) = action {
            let cluster = self.engine.chain().top().cluster_size() / 512;
            let grown = size / cluster..to.div_ceil(cluster);
            self.touched.borrow_mut().extend(grown);
            let first = log.changes.len();
            let sectors = Rc::make_mut(&mut world.sectors);
            sectors.resize(to as usize, (Value::Zeros, first));
        }
        let mut bitmaps = self.bitmaps.borrow_mut();
        bitmaps::follow(&mut bitmaps, action, &content);
        if let Some(bitmap) = action.bitmap().and_then(|name| bitmaps.get_mut(&name)) {
            for change in log.under_way(begun, now) {
                bitmap.doubt(change.named.start * 512, change.named.end * 512);
            }
        }
        world.bitmaps = Rc::new(bitmaps.clone());
        log.worlds.push(world);
        let feature = features::of_request(Request::Live(action));
        self.features.borrow_mut().insert(feature.to_owned());
        Ok(())
    }
}

impl Action {
    /// The bitmap that it is about.
    fn bitmap(self) -> Option<char> {
        match self {
            Self::Bitmap(name, _)
            | Self::Unbitmap(name)
            | Self::Enable(name)
            | Self::Disable(name)
            | Self::Clear(name) => Some(name),
            _ => None,
        }
    }
}
