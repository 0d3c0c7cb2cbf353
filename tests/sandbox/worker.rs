//! The worker: an image open, a thread with a ring in the sandbox, as a queue
//! of a device has it.

use std::path::PathBuf;
use std::sync::{Arc, Barrier};

use qcow2_ublk::block::{BlockHandler, Op, Payload, Request};
use qcow2_ublk::daemon::sandbox::{Sandbox, harden};
use qcow2_ublk::engine::{self, Engine};
use qcow2_ublk::qcow2::create::CreateOptions;
use qcow2_ublk::runtime::{Buf, Runtime, pool};
use qcow2_ublk::{Disk, chain};

use crate::{CONFINED, ROLE};

/// What the worker has to work with.
pub(crate) struct Place {
    pub(crate) folder: PathBuf,
}

impl Place {
    /// Of this process, if it is to be the worker.
    pub(crate) fn of_worker() -> Option<Self> {
        std::env::var_os(ROLE)?;
        let folder = std::env::var_os("SANDBOX_TEST_FOLDER")?.into();
        Some(Self { folder })
    }
}

/// Opens an image, confines itself if it is to, and calls `act` in the thread
/// that serves. Ends the process.
pub(crate) fn run(place: &Place, act: fn(&Place)) -> ! {
    let image = place.folder.join("image.qcow2");
    Disk::create(&image, &CreateOptions::new(64 << 20))
        .unwrap()
        .close()
        .unwrap();
    let records = place.folder.join("records");
    let sandbox = (std::env::var(ROLE).unwrap() == CONFINED).then(|| {
        let memory = harden();
        Arc::new(Sandbox::new(&records, memory))
    });
    let inline = Runtime::inline().unwrap();
    let options = chain::Options {
        writable: true,
        ..chain::Options::default()
    };
    let chain = inline.block_on(chain::open(&image, &options)).unwrap();
    let engine = Arc::new(Engine::new(chain, engine::Options::default()));

    let ready = Arc::new(Barrier::new(2));
    let queue = std::thread::scope(|scope| {
        let queue = scope.spawn(|| {
            let runtime = Runtime::uring(16).unwrap();
            runtime.block_on(async {
                engine.queue_started(0).unwrap();
                if let Some(sandbox) = &sandbox {
                    sandbox.enter();
                }
                ready.wait();
                // The main thread closes it.
                ready.wait();
                serve(&engine).await;
            });
            act(place);
        });
        ready.wait();
        if let Some(sandbox) = &sandbox {
            sandbox.enter();
            println!("\n@parts: {}", sandbox.close());
        }
        ready.wait();
        // As the housekeeper's, and the one that closes a stuck image.
        let other = scope.spawn(|| {
            let runtime = Runtime::inline().unwrap();
            runtime.block_on(engine.write_back()).unwrap();
        });
        other.join().unwrap();
        queue.join()
    });
    queue.unwrap();
    inline.block_on(engine.close()).unwrap();
    println!("\n@served: done");
    std::process::exit(0);
}

/// What a device asks of its server, of every kind.
async fn serve(engine: &Engine) {
    let ask = async |op, offset: u64, data: &mut Buf| {
        let len = data.len() as u64;
        // SAFETY: `data` lives and is ours until the request is complete.
        let payload = unsafe { Payload::memory(data.as_mut_ptr(), len) };
        let request = Request {
            op,
            offset,
            len,
            payload,
        };
        engine.handle(0, request).await.unwrap();
    };
    let mut data = Buf::zeroed(1 << 20);
    data.fill(7);
    for turn in 0..8 {
        ask(Op::Write { fua: turn == 3 }, turn << 20, &mut data).await;
    }
    ask(Op::Flush, 0, &mut Buf::zeroed(0)).await;
    data.fill(0);
    ask(Op::Read, 1 << 20, &mut data).await;
    assert!(data.iter().all(|&byte| byte == 7));
    ask(Op::Discard, 0, &mut data).await;
    let zeroes = Op::WriteZeroes {
        unmap: true,
        fua: true,
    };
    ask(zeroes, 1 << 20, &mut data).await;
    ask(Op::Flush, 0, &mut Buf::zeroed(0)).await;
    ask(Op::Read, 1 << 20, &mut data).await;
    assert!(data.iter().all(|&byte| byte == 0));
    // Threads start in the sandbox, and panics end where they should.
    assert_eq!(pool::run(|| 6 * 7).await, 42);
    assert!(std::thread::spawn(|| panic!("as intended")).join().is_err());
}
