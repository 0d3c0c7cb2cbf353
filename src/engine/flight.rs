//! The transfers of one request, under way at the same time.

use crate::error::Result;
use crate::storage::Transfer;

/// Started transfers. One costs no allocation.
#[derive(Default)]
pub(super) struct Flight<'a> {
    last: Option<Transfer<'a>>,
    others: Vec<Transfer<'a>>,
}

impl<'a> Flight<'a> {
    pub(super) fn add(&mut self, transfer: Transfer<'a>) {
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
