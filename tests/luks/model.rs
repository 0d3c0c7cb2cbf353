//! Random requests of any offset and length against a vector of bytes.

use proptest::prelude::*;

use super::{Lab, PASSPHRASE, content, options};
use qcow2_ublk::Disk;

const SIZE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zeroes { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || {
        (
            0..SIZE,
            prop_oneof![1..700_u64, 1..9000_u64, 1..300_000_u64],
        )
            .prop_map(|(at, len)| (at, len.min(SIZE - at)))
    };
    let step = prop_oneof![
        6 => (range(), 1..=255_u8).prop_map(|((at, len), byte)| Step::Write { at, len, byte }),
        2 => (range(), any::<bool>())
            .prop_map(|((at, len), unmap)| Step::Zeroes { at, len, unmap }),
        1 => range().prop_map(|(at, len)| Step::Discard { at, len }),
        3 => range().prop_map(|(at, len)| Step::Read { at, len }),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

/// What a step writes: never twice the same 16 bytes, so that a block at the
/// wrong place is found.
fn pattern(at: u64, len: u64, byte: u8) -> Vec<u8> {
    (at..at + len)
        .map(|at| byte ^ (at / 7) as u8 ^ (at >> 12) as u8)
        .collect()
}

fn check(lab: &Lab, path: &std::path::Path, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut model = vec![0; SIZE as usize];
    let open = || Disk::open(path, &options(true, PASSPHRASE)).unwrap();
    let mut disk = open();
    let cluster = disk.engine().chain().top().cluster_size();
    for step in steps {
        match *step {
            Step::Write { at, len, byte } => {
                let bytes = pattern(at, len, byte);
                disk.write_at(&bytes, at).unwrap();
                model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            }
            Step::Zeroes { at, len, unmap } => {
                disk.write_zeroes_at(at, len, unmap).unwrap();
                model[at as usize..(at + len) as usize].fill(0);
            }
            Step::Discard { at, len } => {
                disk.discard_at(at, len).unwrap();
                let start = at.next_multiple_of(cluster);
                let end = if at + len == SIZE {
                    SIZE
                } else {
                    (at + len) / cluster * cluster
                };
                if start < end {
                    model[start as usize..end as usize].fill(0);
                }
            }
            Step::Read { at, len } => {
                let read = super::read(&disk, at, len as usize);
                prop_assert!(read == model[at as usize..(at + len) as usize], "{step:?}");
            }
            Step::Reopen => {
                disk.close().unwrap();
                disk = open();
            }
        }
    }
    disk.close().unwrap();
    prop_assert!(content(path) == model);
    prop_assert!(lab.qemu_content(path) == model);
    lab.qemu_check(path);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_match_a_vector(steps in steps(), bits in prop_oneof![Just(9_u32), Just(12), Just(16), Just(19)]) {
        let lab = Lab::new();
        let path = lab.create("a.qcow2", |_, options| {
            options.size = SIZE;
            options.cluster_size = 1 << bits;
        });
        check(&lab, &path, &steps)?;
    }
}
