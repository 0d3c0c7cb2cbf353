//! The snapshot table: what is read says the same when it is written; each
//! snapshot shows what its tables say; and jobs on snapshots leave a sound
//! image sound, with the others as they were.

use qcow2_ublk::qcow2::info;
use qcow2_ublk::qcow2::spec::HostOffset;
use qcow2_ublk::qcow2::spec::snapshot::{self, Snapshot};
use qcow2_ublk::qcow2::{NewSnapshot, Selector, SnapshotJob};
use qcow2_ublk::storage::Storage;
use qcow2_ublk::storage::sim::{Image, SimDisk};

use super::common::{self, lab};
use super::input::Input;
use super::view::{View, header_of};
use super::{images, recipe};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let job = job(&mut input);
    let image = recipe::image(&mut input);
    let disk = SimDisk::with_image(image.clone());
    let listed = common::block_on(async {
        let storage = Storage::simulated_read_only(&disk, 1);
        let _ = info::info(&storage).await;
        info::snapshots(&storage).await
    });
    assert_eq!(disk.recorded(), 0, "nothing is written by reading");
    let listed = match listed {
        Ok(listed) => listed,
        Err(error) => return super::header::is_said_well(&error),
    };
    entries_come_back(&image, &listed);
    for (index, snapshot) in listed.iter().take(4).enumerate() {
        // There may be two of the same name and ID: the first is meant.
        let alike = |other: &Snapshot| (&other.id, &other.name) == (&snapshot.id, &snapshot.name);
        if listed.iter().position(alike) == Some(index) {
            shows_what_it_says(&image, snapshot);
        }
    }
    jobs(&image, &job);
}

fn job(input: &mut Input<'_>) -> SnapshotJob {
    let what = input.u8();
    let which = Selector::Id(vec![b'1' + what / 4 % 4]);
    match what % 4 {
        0 => SnapshotJob::Create(NewSnapshot {
            name: vec![b'n'; usize::from(what)],
            ..NewSnapshot::default()
        }),
        1 => SnapshotJob::Delete(which),
        2 => SnapshotJob::Apply(which),
        _ => SnapshotJob::Rename(which, vec![what; 3]),
    }
}

fn entries_come_back(image: &Image, listed: &[Snapshot]) {
    let Some(header) = header_of(image) else {
        return;
    };
    for snapshot in listed {
        let mut bytes = Vec::new();
        if snapshot.encode(&mut bytes).is_err() {
            continue;
        }
        let len = snapshot::entry_len(&bytes, HostOffset(0)).expect("our own");
        assert!(len <= bytes.len());
        let (again, used) =
            Snapshot::parse(&bytes, HostOffset(0), &header.geometry()).expect("our own");
        assert!(
            again == *snapshot && used == bytes.len(),
            "{again:?}, {snapshot:?}"
        );
    }
}

fn shows_what_it_says(image: &Image, snapshot: &Snapshot) {
    let Some(mut view) = View::open(image) else {
        return;
    };
    let which = Selector::Both {
        id: snapshot.id.clone(),
        name: snapshot.name.clone(),
    };
    common::block_on(async {
        let disk = SimDisk::with_image(image.clone());
        let Ok(engine) = images::open_snapshot(&disk, which).await else {
            return;
        };
        if engine.size() != snapshot.disk_size.unwrap_or(view.header.size) & !511 {
            return;
        }
        view.shows(snapshot, engine.size());
        for cluster in 0..view.clusters().min(64) {
            let at = cluster << view.geometry.cluster_bits;
            let len = (engine.size() - at).min(view.geometry.cluster_size());
            let seen = lab::read(&engine, 0, at, len).await;
            let said = view.cluster(cluster);
            assert_eq!(seen.is_ok(), said.is_some(), "cluster {cluster}: {seen:?}");
            if let (Ok(seen), Some(said)) = (seen, said) {
                assert!(seen == said, "guest cluster {cluster} of a snapshot");
            }
        }
    });
}

fn jobs(image: &Image, job: &SnapshotJob) {
    let disk = SimDisk::with_image(image.clone());
    let sound = common::block_on(images::is_sound(&disk));
    let before = View::open(image).map(|view| view.content());
    let done = common::block_on(job.run(&Storage::simulated(&disk, 1)));
    if let Err(error) = &done {
        assert!(error.to_string().len() > 8);
    }
    if !sound {
        return;
    }
    assert!(
        common::block_on(images::is_sound(&disk)),
        "{job:?}: {done:?}"
    );
    let applied = matches!(job, SnapshotJob::Apply(_)) && done.is_ok();
    if let (Some(before), false) = (before, applied) {
        let after = disk.image();
        let after = View::open(&after).expect("it was one before");
        assert!(after.content() == before, "{job:?} has changed the disk");
    }
}
