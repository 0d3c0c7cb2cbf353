//! seccomp: the system calls of a process that serves, and no others.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use libc::c_long;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter_all_threads,
};

/// Allowed whatever their arguments are.
const ALLOWED: &[c_long] = &[
    // The rings that there are: `io_uring_setup` is missing.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Files that are open, as those who work without ring use them.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    // Sockets that there are: the journal's, the service manager's, the
    // steward's, and the pair by which signals become known.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    // Memory; see below for what is mapped.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_munlock,
    // Threads, and waiting.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    // Signals to ourselves.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // About ourselves.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    // Other filters make something of it.
    libc::SYS_clone3,
];

/// Calls that only some processors have.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[libc::SYS_poll, libc::SYS_dup2, libc::SYS_gettimeofday];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

/// True when the kernel has filters for system calls.
pub(super) fn is_available() -> bool {
    std::fs::exists("/proc/sys/kernel/seccomp/actions_avail").unwrap_or(false)
}

/// Filters the system calls of all threads, for good. Files may be removed
/// where Landlock says which.
pub(super) fn filter(has_landlock: bool) -> Result<(), Error> {
    for program in programs(has_landlock)? {
        apply_filter_all_threads(&program)?;
    }
    Ok(())
}

fn programs(has_landlock: bool) -> Result<[BpfProgram; 2], Error> {
    let errno = |errno: i32| SeccompAction::Errno(errno as u32);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = ALLOWED
        .iter()
        .chain(OLD)
        .map(|&call| (call, Vec::new()))
        .collect();
    for (call, argument, operator, value) in conditions() {
        let length = SeccompCmpArgLen::Qword;
        let condition = SeccompCondition::new(argument, length, operator, value)?;
        let rule = SeccompRule::new(vec![condition])?;
        rules.entry(call).or_default().push(rule);
    }
    if has_landlock {
        rules.insert(libc::SYS_unlinkat, Vec::new());
        #[cfg(target_arch = "x86_64")]
        rules.insert(libc::SYS_unlink, Vec::new());
    }
    let arch = ARCH.try_into()?;
    let allow = SeccompFilter::new(rules, errno(libc::EPERM), SeccompAction::Allow, arch)?;
    // Its flags are where no filter can see them. The C library takes this
    // answer for that of an old kernel, and uses `clone`.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let old = SeccompFilter::new(clone3, SeccompAction::Allow, errno(libc::ENOSYS), arch)?;
    // The narrower one last: it allows no more filters.
    Ok([old.try_into()?, allow.try_into()?])
}

/// Calls allowed with some arguments only: call, argument, how it compares
/// with what.
fn conditions() -> Vec<(c_long, u8, SeccompCmpOp, u64)> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let never = |bits: libc::c_int| MaskedEq(bits as u64);
    vec![
        // No code but what is there.
        (libc::SYS_mmap, 2, never(libc::PROT_EXEC), 0),
        (libc::SYS_mprotect, 2, never(libc::PROT_EXEC), 0),
        // Threads, no processes.
        (
            libc::SYS_clone,
            0,
            MaskedEq(libc::CLONE_THREAD as u64),
            libc::CLONE_THREAD as u64,
        ),
        (libc::SYS_prctl, 0, Eq, libc::PR_SET_NAME as u64),
        // How long a thread's stack is.
        (libc::SYS_prlimit64, 0, Eq, 0),
        // `abort`.
        (libc::SYS_tgkill, 0, Eq, u64::from(std::process::id())),
    ]
}
