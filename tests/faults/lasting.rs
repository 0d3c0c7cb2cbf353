//! Faults that last: the disk is bad from some operation on, for a while or
//! for good; or it is full, and has space again later, or never.

use qcow2_ublk::ErrorKind;
use qcow2_ublk::storage::sim::{self, Fault, SimKind};

use crate::common::half_random;
use crate::common::lab;
use crate::requests::{K, plain, with_bitmaps, with_data_file, with_snapshot};
use crate::run::{Run, operations};
use crate::trial::judge_latched;
use crate::work::{Files, Step, Work};

fn works() -> Vec<Work> {
    let resizes = [Step::Grow(160 * K), Step::Shrink(120 * K), Step::Reopen];
    let snapshots = [
        Step::Snapshot("two"),
        Step::Apply("one"),
        Step::Delete("two"),
    ];
    let bitmaps = [Step::ClearBitmap("a"), Step::Reopen, Step::AddBitmap("b")];
    let (image, files) = with_data_file(false, false);
    let compressed = lab::converted(&half_random(96 << 10, 4), &["-c", "-o", "cluster_size=4k"]);
    let raw = Files {
        raw: Some(sim::Image::from_bytes(&half_random(90 << 10, 2))),
        ..Files::default()
    };
    let over = lab::created("cluster_size=4k", 128 * K);
    let subclusters = lab::created("extended_l2=on,cluster_size=16k", 128 * K);
    vec![
        plain(
            "512-byte clusters",
            lab::created("cluster_size=512", 96 * K),
        )
        .steps(1, 8, &[]),
        Work::new("over a raw file", over, raw.clone(), lab::How::default()).steps(2, 8, &resizes),
        Work::new("data file", image, files, lab::How::default()).steps(3, 8, &[]),
        plain("compressed writes", compressed)
            .steps(4, 8, &[])
            .compressing(),
        Work::new("subclusters", subclusters, raw, lab::How::default()).steps(5, 8, &[]),
        plain(
            "lazy bitmaps",
            with_bitmaps("cluster_size=4k,lazy_refcounts=on"),
        )
        .steps(6, 6, &bitmaps),
        plain("snapshots", with_snapshot("cluster_size=4k")).steps(7, 4, &snapshots),
    ]
}

/// Does the work, as far as it can be done. Requests that fail say why.
async fn work(run: &mut Run<'_>, errno: i32, what: &str) -> usize {
    let mut failed = 0;
    for step in &run.work.steps {
        if run.engine.is_none() && run.open().await.is_err() {
            failed += 1;
            continue;
        }
        if let Err(error) = run.step(step).await {
            failed += 1;
            let latched = error.kind() == ErrorKind::Latched;
            let known = error.errno() == errno || latched;
            assert!(known, "{what}: {step:?}: {error:?}");
        }
    }
    failed
}

/// The disk is well again, and so is the image, unless a sync has failed.
async fn recovered(run: &mut Run<'_>, seed: u64, what: &str) {
    if run.engine.is_none() {
        run.open().await.unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    run.assert_reads(what).await;
    if run.is_latched() {
        return judge_latched(run, what).await;
    }
    run.judge_power_cuts(seed, what).await;
    let closed = run.engine().close().await;
    closed.unwrap_or_else(|e| panic!("{what}: {e}"));
    run.model.settle();
    let what = format!("{what}: closed");
    run.judge(&run.images(), true, &what).await;
}

/// Nothing is written for a while.
#[test]
fn no_write_succeeds_for_a_while() {
    for work_to_do in &works() {
        let end = operations(work_to_do).len() as u64;
        for at in 0..end {
            let errno = [libc::EIO, libc::ENOSPC][at as usize % 2];
            let what = format!("{}: no write from {at} on", work_to_do.name);
            lab::block_on(async {
                let mut run = Run::new(work_to_do);
                run.inject(move |request| {
                    let spared = matches!(request.kind, SimKind::Sync | SimKind::Read);
                    let bad = (at..at + 25).contains(&request.number) && !spared;
                    bad.then_some(Fault::Errno(errno))
                });
                work(&mut run, errno, &what).await;
                run.disk.clear_faults();
                recovered(&mut run, at, &what).await;
            });
        }
    }
}

/// The disk is gone: nothing succeeds any more, and whoever closes the image
/// is told so. Found again, it has what was flushed.
#[test]
fn nothing_succeeds_any_more() {
    for work_to_do in &works() {
        let end = operations(work_to_do).len() as u64;
        for at in 0..end {
            let what = format!("{}: nothing from {at} on", work_to_do.name);
            lab::block_on(async {
                let mut run = Run::new(work_to_do);
                run.inject(move |request| {
                    (request.number >= at).then_some(Fault::Errno(libc::EIO))
                });
                let failed = work(&mut run, libc::EIO, &what).await;
                if let Some(engine) = &run.engine {
                    let closed = engine.close().await;
                    assert!(closed.is_err() || run.hit().is_empty(), "{what}: closed");
                    if closed.is_ok() {
                        run.model.settle();
                    }
                } else {
                    assert!(failed > 0, "{what}: nobody was told");
                }
                run.disk.clear_faults();
                run.judge(&run.images(), false, &what).await;
                run.judge_power_cuts(at, &what).await;
            });
        }
    }
}

/// Row 20: the file system fills up in the middle of an allocation. At most
/// leaks, old data intact; and with space again, all goes on. Without, it can
/// be closed or says why not, and what was flushed is there.
#[test]
fn row_20_enospc_in_mid_allocation() {
    for work_to_do in &works() {
        let mut refused = 0;
        for room in (0..).map(|n| n * 4096) {
            let what = format!("{}: {room} bytes left", work_to_do.name);
            let failed = lab::block_on(async {
                let mut run = Run::new(work_to_do);
                run.limit(Some(room));
                let failed = work(&mut run, libc::ENOSPC, &what).await;
                assert!(!run.is_latched(), "{what}: latched");
                run.assert_reads(&what).await;
                run.judge_power_cuts(room, &what).await;
                if room % 8192 == 0 {
                    run.limit(None);
                    recovered(&mut run, room, &what).await;
                    return failed;
                }
                match run.engine().close().await {
                    Ok(()) => {
                        run.model.settle();
                        run.judge(&run.images(), true, &what).await;
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
                        run.judge(&run.images(), false, &what).await;
                    }
                }
                failed
            });
            refused += failed;
            if failed == 0 {
                break;
            }
        }
        assert!(refused > 2, "{}: there was room", work_to_do.name);
    }
}
