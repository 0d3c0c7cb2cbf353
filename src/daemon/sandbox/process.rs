//! What holds for the process as a whole, and its capabilities.

use caps::{CapSet, errors::CapsError};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// linux/mman.h: lock a page when it is used, not what is merely reserved.
const MCL_ONFAULT: MlockAllFlags = MlockAllFlags::from_bits_retain(4);

/// No core dump, nobody else to look into the memory, and no swap: best
/// effort; true when all of it holds. To be called as long as the process has
/// its capabilities.
pub fn harden() -> bool {
    let kept = prctl::set_dumpable(false).and_then(|()| setrlimit(Resource::RLIMIT_CORE, 0, 0));
    if let Err(error) = kept {
        tracing::warn!("cannot forbid core dumps: {error}");
    }
    // Not without the limit out of the way: an allocation above it would fail.
    let locked = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).and_then(|()| {
        mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | MCL_ONFAULT)
    });
    if let Err(error) = locked {
        tracing::debug!("cannot lock all memory, only keys: {error}");
    }
    kept.is_ok() && locked.is_ok()
}

/// The calling thread has none, and gets none by executing a file.
pub(super) fn drop_capabilities() -> Result<(), CapsError> {
    if caps::has_cap(None, CapSet::Permitted, caps::Capability::CAP_SETPCAP)? {
        // Needed only to execute files, which others forbid too.
        let _ = caps::clear(None, CapSet::Ambient);
        let _ = caps::clear(None, CapSet::Bounding);
    }
    caps::clear(None, CapSet::Inheritable)?;
    caps::clear(None, CapSet::Effective)?;
    caps::clear(None, CapSet::Permitted)?;
    prctl::set_no_new_privs().map_err(|e| CapsError::from(format!("no_new_privs: {e}")))?;
    // Changing capabilities has changed it.
    let _ = prctl::set_dumpable(false);
    Ok(())
}
