//! One fault, and all that has to be true afterwards.
#![allow(unreachable_pub, reason = "a part of a test program")]

use qcow2_ublk::ErrorKind;
use qcow2_ublk::storage::sim::{Fault, SimKind, SimRequest, crash_images};

use crate::common::check::Checked;
use crate::common::lab;
use crate::run::{Run, operations};
use crate::work::{Step, Work};
use crate::{errno, faults, is_harmless, seeds};

/// Each operation of the work fails once, in every way.
pub fn every_operation(work: &Work) {
    let operations = operations(work);
    assert!(operations.len() > 15, "{}: hardly any work", work.name);
    let mut runs = 0;
    for request in &operations {
        let mut faults = faults(request.kind, request.number);
        if work.is_slow && seeds() == 1 {
            let others = faults.split_off(1);
            faults.push(others[request.number as usize % others.len()]);
        }
        for fault in faults {
            one_fault(work, request, fault);
            runs += 1;
        }
    }
    let count = operations.len();
    eprintln!("{}: {count} operations, {runs} runs", work.name);
}

/// A fault is told of where it matters: not where space is given back, for
/// one, or where something is read in advance.
fn must_be_told(request: &SimRequest, fault: Fault) -> bool {
    !is_harmless(fault) && matches!(request.kind, SimKind::Write | SimKind::Sync)
}

pub fn one_fault(work: &Work, request: &SimRequest, fault: Fault) {
    let SimRequest { number, kind, .. } = *request;
    let mut what = format!("{}: {fault:?} at {request:?}", work.name);
    lab::block_on(async {
        let mut run = Run::new(work);
        run.inject(move |request| (request.number == number).then_some(fault));
        let mut errors = Vec::new();
        if let Err(error) = run.open().await {
            errors.push((None, error));
            // The next attempt is better.
            let again = run.open().await;
            again.unwrap_or_else(|e| panic!("{what}: open again: {e}"));
        }
        for step in &work.steps {
            let before = run.hit().len();
            if let Err(error) = run.step(step).await {
                errors.push((Some(step.clone()), error));
            }
            if run.hit().len() > before {
                what = format!("{what} in {step:?}");
            }
            if run.engine.is_none() {
                let again = run.open().await;
                again.unwrap_or_else(|e| panic!("{what}: open again: {e}"));
            }
            // Reads go on, whatever happened, unless the fault is theirs.
            let before = run.hit().len();
            let seen = run.read_back(step).await;
            let ours = run.hit().len() > before;
            assert!(seen.is_ok() || ours, "{what}: a read failed: {seen:?}");
        }
        run.assert_reads(&what).await;
        let mut latched = run.is_latched();
        if latched {
            judge_latched(&run, &what).await;
        } else {
            if !errors.is_empty() {
                run.judge_power_cuts(number, &what).await;
            }
            let closed = run.engine().close().await;
            if let Err(error) = closed {
                errors.push((Some(Step::Reopen), error));
                latched = run.is_latched();
                if latched {
                    judge_latched(&run, &what).await;
                }
            }
        }
        assert_eq!(run.hit().len(), 1, "{what}: it was not hit");
        if is_harmless(fault) {
            assert!(errors.is_empty(), "{what}: {errors:?}");
        }
        assert!(
            !errors.is_empty() || !must_be_told(request, fault),
            "{what}: nobody was told"
        );
        assert!(!latched || kind == SimKind::Sync, "{what}: latched");
        if latched {
            return;
        }
        for (step, error) in &errors {
            assert_eq!(error.errno(), errno(fault), "{what}: {step:?}: {error:?}");
        }
        assert!(errors.len() <= 1, "{what}: {errors:?}");
        // The fault is over: all that was acknowledged becomes durable.
        let changes = run.disk.recorded();
        let flushed = run.engine().flush().await;
        flushed.unwrap_or_else(|e| panic!("{what}: {e}"));
        run.model.settle();
        if !errors.is_empty() && run.disk.recorded() > changes {
            let what = format!("{what}: flushed");
            run.judge_power_cuts(number, &what).await;
        }
        let closed = run.engine().close().await;
        closed.unwrap_or_else(|e| panic!("{what}: {e}"));
        run.judge(&run.images(), true, &format!("{what}: closed"))
            .await;
        // The power may have failed in between.
        if !errors.is_empty() && number.is_multiple_of(5) {
            let history = run.disk.history();
            let point = history.records.len() * (number as usize % 7) / 7;
            for crash in crash_images(&history, number, 1).from_point(point).take(4) {
                assert_sound(&crash.images, &format!("{what}; {crash}"));
            }
        }
    });
}

/// At most leaks; or it is marked, and says so itself.
pub fn assert_sound(images: &[qcow2_ublk::storage::sim::Image], what: &str) {
    use qcow2_ublk::qcow2::spec::header::Incompatible;
    let checked = Checked::open(&images[0]).unwrap_or_else(|e| panic!("{what}: {e}"));
    let marks = checked.header.incompatible;
    let found = checked.with_data(images.get(1)).check().corruptions;
    let dirty = marks.contains(Incompatible::DIRTY);
    assert!(found.is_empty() || dirty, "{what}: {found:#?}");
}

/// A sync has failed: nothing is changed any more, everybody is told, reads
/// go on; and who opens the file again finds what was flushed.
pub async fn judge_latched(run: &Run<'_>, what: &str) {
    let engine = run.engine();
    let latched = |result: qcow2_ublk::Result<()>, of: &str| match result {
        Ok(()) => panic!("{what}: {of} after a failed sync"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Latched, "{what}: {of}: {error}"),
    };
    latched(lab::write(engine, 0, 0, &[1; 512], false).await, "a write");
    latched(engine.flush().await, "a flush");
    if engine.chain().top().data_file().is_none() {
        let discard = engine.discard(0, 0, run.work.cluster).await;
        latched(discard, "a discard");
    }
    latched(engine.close().await, "a close");
    latched(engine.flush().await, "another flush");
    run.assert_reads(what).await;
    // The process ends, and the file is opened again; or the power fails too.
    run.judge(&run.images(), false, &format!("{what}: opened again"))
        .await;
    run.judge_power_cuts(7, what).await;
}
