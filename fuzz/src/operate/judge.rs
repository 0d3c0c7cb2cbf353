//! Opening an image again, and what it has to be then.

use std::sync::Arc;

use qcow2_ublk::storage::sim::Image;

use super::super::common::check::Checked;
use super::super::common::{lab, read_all};
use super::Work;
use super::state::{Found, State};

impl Work {
    /// The image is opened, after a clean close (`closed`) or anything else. It
    /// is in one of `states`.
    pub(super) async fn open_again(&mut self, states: Vec<State>, closed: bool) {
        self.disk.clear_faults();
        self.leaky |= self.may_fail();
        self.failed = Arc::default();
        let image = self.disk.image();
        self.check_soundness(&image, closed);
        let found = Found::of(&Checked::open(&image).expect("a header"), &image);
        let engine = lab::open(&self.disk, &self.how).await;
        self.engine = Arc::new(engine.expect("it can be opened again"));
        let content = read_all(&self.engine).await.expect("it can be read");
        if self.over {
            // Any content will do.
            self.engine.close().await.expect("it can be closed");
            return;
        }
        self.check_raw(&content);
        let old = self.shape.snapshots.len();
        let mut reasons = Vec::new();
        for mut state in states {
            match state.fits(&found, old, &content, closed) {
                Ok(()) => {
                    state.model.sees(0, &content, "opened again");
                    if !closed {
                        state.bitmaps.become_found(&found.bitmaps, &content);
                    }
                    self.state = state;
                    return;
                }
                Err(reason) => reasons.push(reason),
            }
        }
        panic!("opened again: {}", reasons.join("; or: "));
    }

    /// Leaks at most; where refcounts are postponed, not even that is asked of
    /// an image that was not closed.
    fn check_soundness(&self, image: &Image, closed: bool) {
        let checked = Checked::open(image).expect("a header");
        if closed || !self.shape.lazy {
            let found = checked.check();
            assert_eq!(found.corruptions, Vec::<String>::new());
        }
    }

    /// A raw data file is the disk.
    fn check_raw(&self, content: &[u8]) {
        if let (true, Some(data)) = (self.shape.raw, &self.how.data) {
            let raw = data.image().bytes(0, content.len() as u64);
            assert!(raw == content, "the raw data file is not the disk");
        }
    }

    pub(super) async fn end(mut self) {
        self.disk.clear_faults();
        if self.over {
            return self.check_soundness(&self.disk.image(), false);
        }
        let seen = read_all(&self.engine).await.expect("it can be read");
        self.state.model.sees(0, &seen, "in the end");
        if let Err(error) = self.engine.close().await {
            assert!(self.may_fail(), "the last close: {error:?}");
            self.die().await;
            let closed = self.engine.close().await;
            closed.expect("nothing fails any more");
        }
        let image = self.disk.image();
        let checked = Checked::open(&image).expect("a header");
        let found = checked.check();
        assert_eq!(found.corruptions, Vec::<String>::new());
        let leaks_allowed = self.leaky || self.may_fail();
        assert!(leaks_allowed || found.leaks == 0, "{} leaks", found.leaks);
        self.check_old_and_made(&checked);
        let data = self.how.data.as_ref().map(|data| data.image());
        let shown = if self.shape.encrypted {
            let engine = lab::open(&self.disk, &self.how).await;
            read_all(&engine.expect("it was closed")).await
        } else {
            Ok(checked
                .with_data(data.as_ref())
                .active_content(&self.shape.below))
        };
        let shown = shown.expect("it can be read");
        self.check_raw(&shown);
        let found = Found::of(&Checked::open(&image).expect("a header"), &image);
        let old = self.shape.snapshots.len();
        if let Err(reason) = self.state.fits(&found, old, &shown, true) {
            panic!("closed: {reason}");
        }
    }

    /// Snapshots are as they were, or as they were made.
    fn check_old_and_made(&mut self, checked: &Checked<'_>) {
        let below = &self.shape.below;
        for (index, old) in self.shape.snapshots.iter().enumerate() {
            let now = checked.snapshot_content(index, below);
            assert!(now == *old, "old snapshot {index} has changed");
        }
        let count = self.shape.snapshots.len();
        let made = self.state.made.iter_mut();
        assert_eq!(checked.snapshots().len(), count + made.len());
        for made in made {
            let now = checked.snapshot_content(count, below);
            assert!(now == made.stored, "the snapshot has changed");
            if !self.shape.encrypted {
                made.model.sees(0, &now, "a snapshot");
            }
        }
    }
}
