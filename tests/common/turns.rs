//! Random work done in turns, by QEMU and by us.

use std::path::Path;

use qcow2_ublk::Disk;
use qcow2_ublk::storage::sim::Rng;

/// Some writes and writes of zeros, each of whole sectors.
pub struct Turn(Vec<Operation>);

struct Operation {
    what: What,
    at: u64,
    len: u64,
}

#[derive(Clone, Copy)]
enum What {
    Write(u8),
    Zero { unmap: bool },
}

impl Turn {
    /// On a disk of `size` bytes.
    pub fn random(rng: &mut Rng, size: u64) -> Self {
        let operation = |_| {
            let at = rng.below(size / 512) * 512;
            let largest = [4 << 10, 40 << 10, 1 << 20][rng.below(3) as usize];
            let len = (512 + rng.below(largest / 512) * 512).min(size - at);
            let what = match rng.below(8) {
                0..4 => What::Write(rng.next_u64() as u8 | 1),
                4..6 => What::Zero { unmap: true },
                _ => What::Zero { unmap: false },
            };
            Operation { what, at, len }
        };
        Self((0..12).map(operation).collect())
    }

    /// What the disk shows afterwards.
    pub fn on_model(&self, model: &mut [u8]) {
        for Operation { what, at, len } in &self.0 {
            model[*at as usize..(at + len) as usize].fill(match what {
                What::Write(byte) => *byte,
                What::Zero { .. } => 0,
            });
        }
    }

    pub fn by_qemu(&self, image: &Path) {
        let commands: Vec<String> = self
            .0
            .iter()
            .map(|Operation { what, at, len }| match what {
                What::Write(byte) => format!("write -P {byte} {at} {len}"),
                What::Zero { unmap: true } => format!("write -z -u {at} {len}"),
                What::Zero { unmap: false } => format!("write -z {at} {len}"),
            })
            .collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        super::qemu_io(image, &commands);
    }

    pub fn by_us(&self, disk: &Disk) {
        for &Operation { what, at, len } in &self.0 {
            match what {
                What::Write(byte) => disk.write_at(&vec![byte; len as usize], at),
                What::Zero { unmap } => disk.write_zeroes_at(at, len, unmap),
            }
            .unwrap();
        }
    }
}
