//! The transfers of one request, under way at the same time.

use super::cipher::Moving;
use crate::error::Result;

/// Started transfers. One that is not encrypted costs no allocation.
#[derive(Default)]
pub(super) struct Flight<'a> {
    last: Option<Moving<'a>>,
    others: Vec<Moving<'a>>,
}

impl<'a> Flight<'a> {
    pub(super) fn add(&mut self, transfer: Moving<'a>) {
        if let Some(other) = self.last.replace(transfer) {
            self.others.push(other);
        }
    }

    /// Waits for all of them, and gives the first error.
    pub(super) async fn land(&mut self) -> Result<()> {
        let mut result = Ok(());
        for transfer in self.others.drain(..) {
            result = result.and(transfer.await);
        }
        match self.last.take() {
            Some(transfer) => result.and(transfer.await),
            None => result,
        }
    }
}
