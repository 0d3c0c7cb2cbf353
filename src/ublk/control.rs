//! The control plane: one command after another over `/dev/ublk-control`.
//!
//! A command that the kernel never answers must not hang us: each has a time
//! limit, after which we stop waiting (its buffer is then left to the kernel).
//! An interrupted wait goes on; a late answer to an earlier command is told
//! apart by its number.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;

use super::explain;
use super::steward::Steward;
use super::uapi::{Features, Params, Plain, ublksrv_ctrl_cmd, ublksrv_ctrl_dev_info};
use crate::error::Result;

/// How long a command may take unless the caller says otherwise.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(30);
/// How long a removed device's number is waited for.
const FREE_NUMBER: Duration = Duration::from_secs(1);
/// The driver's control node.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";
/// How often a waiting command looks at what its caller watches.
const SLICE: Duration = Duration::from_millis(100);
/// The answer to a cancellation; commands are numbered from 1.
const CANCEL: u64 = 0;
/// "No id" and "no queue" in a command.
const NONE_ID: u32 = u32::MAX;
const NONE_QUEUE: u16 = u16::MAX;

/// A command of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    /// Its name in the driver's documentation, for messages.
    pub(super) name: &'static str,
    pub(super) code: u32,
}

macro_rules! commands {
    ($($name:ident = $code:ident,)*) => {
        $(pub(super) const $name: Command = Command { name: stringify!($name), code: sys::$code };)*
    };
}

commands! {
    GET_FEATURES = UBLK_U_CMD_GET_FEATURES,
    ADD_DEV = UBLK_U_CMD_ADD_DEV,
    SET_PARAMS = UBLK_U_CMD_SET_PARAMS,
    GET_PARAMS = UBLK_U_CMD_GET_PARAMS,
    START_DEV = UBLK_U_CMD_START_DEV,
    STOP_DEV = UBLK_U_CMD_STOP_DEV,
    TRY_STOP_DEV = UBLK_U_CMD_TRY_STOP_DEV,
    DEL_DEV = UBLK_U_CMD_DEL_DEV,
    DEL_DEV_ASYNC = UBLK_U_CMD_DEL_DEV_ASYNC,
    GET_DEV_INFO2 = UBLK_U_CMD_GET_DEV_INFO2,
    GET_QUEUE_AFFINITY = UBLK_U_CMD_GET_QUEUE_AFFINITY,
    UPDATE_SIZE = UBLK_U_CMD_UPDATE_SIZE,
    START_USER_RECOVERY = UBLK_U_CMD_START_USER_RECOVERY,
    END_USER_RECOVERY = UBLK_U_CMD_END_USER_RECOVERY,
    QUIESCE_DEV = UBLK_U_CMD_QUIESCE_DEV,
}

/// Why a command has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The driver's answer.
    Errno(i32),
    /// No answer within the time limit.
    TimedOut(Duration),
    /// The watch ended the wait.
    GivenUp,
    /// Our ring is broken.
    Ring(io::Error),
}

/// What a watch says about a command that is still waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// Nothing new: the time limit counts on.
    Waiting,
    /// There is progress: the time limit starts again.
    Progress,
    /// It will not succeed.
    GiveUp,
}

/// A command on its way to the driver.
struct Call<'a> {
    command: Command,
    id: u32,
    data: u64,
    /// A path the driver checks permissions with, before the buffer.
    path: Option<&'a Path>,
    buffer: &'a mut [u8],
}

/// A command as it goes to the driver, but for its memory: that begins with
/// `path_len` bytes of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) code: u32,
    pub(super) id: u32,
    pub(super) data: u64,
    pub(super) path_len: u16,
}

impl Order {
    /// What a server may need while it serves a device.
    pub(super) fn is_for_stewards(self) -> bool {
        [
            START_DEV,
            STOP_DEV,
            DEL_DEV,
            DEL_DEV_ASYNC,
            GET_PARAMS,
            GET_DEV_INFO2,
            UPDATE_SIZE,
            QUIESCE_DEV,
        ]
        .iter()
        .any(|command| command.code == self.code)
    }
}

/// The way to the driver.
pub(super) struct Control {
    way: Way,
    limit: Duration,
}

enum Way {
    /// An open control node with a ring of its own.
    Here(Box<Here>),
    /// Somebody else has that.
    Steward(Arc<Steward>),
}

struct Here {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    node: File,
    calls: u64,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Opens the driver's control node.
    pub(super) fn open(limit: Duration) -> Result<Self> {
        let node = OpenOptions::new()
            .read(true)
            .write(true)
            .open(CONTROL_PATH)
            .map_err(explain::open_control)?;
        let ring = IoUring::builder()
            .dontfork()
            .build(8)
            .map_err(explain::make_ring)?;
        let here = Here {
            ring,
            node,
            calls: 0,
        };
        Ok(Self {
            way: Way::Here(Box::new(here)),
            limit,
        })
    }

    /// The driver as a steward can reach it; the node itself without one.
    pub(super) fn through(steward: Option<&Arc<Steward>>, limit: Duration) -> Result<Self> {
        match steward {
            Some(steward) => Ok(Self {
                way: Way::Steward(Arc::clone(steward)),
                limit,
            }),
            None => Self::open(limit),
        }
    }

    /// What the driver can do. A driver older than 6.5 cannot say; it has
    /// nothing of what we look for.
    pub(super) fn features(&mut self) -> Result<Features> {
        let mut bits = [0; 8];
        match self.buffer_call(GET_FEATURES, NONE_ID, 0, &mut bits) {
            Ok(_) => Ok(Features::from_bits_retain(u64::from_ne_bytes(bits))),
            Err(Failure::Errno(libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV)) => {
                Ok(Features::empty())
            }
            Err(failure) => Err(explain::command(GET_FEATURES, None, failure)),
        }
    }

    /// Adds a device; `info` comes back as the driver made it. With an id of
    /// `u32::MAX` the driver chooses one.
    pub(super) fn add(&mut self, info: &mut ublksrv_ctrl_dev_info) -> Result<()> {
        let wanted = info.dev_id;
        let id = (wanted != NONE_ID).then_some(wanted);
        self.buffer_call(ADD_DEV, wanted, 0, info.bytes_mut())
            .map_err(|failure| explain::command(ADD_DEV, id, failure))?;
        Ok(())
    }

    /// Sets the device's parameters, before it is started.
    pub(super) fn set_params(&mut self, id: u32, params: &Params) -> Result<()> {
        let mut params = *params;
        self.named(SET_PARAMS, id, 0, params.bytes_mut())
    }

    /// The device's parameters.
    pub(super) fn params(&mut self, id: u32) -> Result<Params> {
        let mut params = Params {
            len: size_of::<Params>() as u32,
            ..Params::default()
        };
        self.named(GET_PARAMS, id, 0, params.bytes_mut())?;
        Ok(params)
    }

    /// Starts the device: its disk appears. `watch` may end the wait when the
    /// queues cannot serve.
    pub(super) fn start(
        &mut self,
        id: u32,
        watch: &mut dyn FnMut() -> Watch,
    ) -> Result<(), Failure> {
        let data = u64::from(std::process::id());
        self.call(
            Call {
                command: START_DEV,
                id,
                data,
                path: None,
                buffer: &mut [],
            },
            watch,
        )
        .map(drop)
    }

    /// Stops the device: its disk goes away, once what is in flight is done.
    /// The wait for that has no end but the server's: see [`super::apart`].
    pub(super) fn stop(
        &mut self,
        id: u32,
        watch: &mut dyn FnMut() -> Watch,
    ) -> Result<(), Failure> {
        let call = Call {
            command: STOP_DEV,
            id,
            data: 0,
            path: None,
            buffer: &mut [],
        };
        self.call(call, watch).map(drop)
    }

    /// Stops the device if nobody has it open; `EBUSY` otherwise.
    pub(super) fn try_stop(&mut self, id: u32) -> Result<(), Failure> {
        self.buffer_call(TRY_STOP_DEV, id, 0, &mut []).map(drop)
    }

    /// Removes a device unless somebody was faster.
    ///
    /// DEL_DEV answers when the number is free again, which takes until the
    /// last process that has the stopped disk open closes it. That is not
    /// worth more than a moment's wait.
    pub(super) fn delete(&mut self, id: u32) -> Result<()> {
        match self.buffer_call(DEL_DEV_ASYNC, id, 0, &mut []) {
            // Since Linux 6.9.
            Ok(_) | Err(Failure::Errno(libc::EOPNOTSUPP)) => {}
            Err(Failure::Errno(libc::ENODEV)) => return Ok(()),
            Err(failure) => return Err(explain::command(DEL_DEV, Some(id), failure)),
        }
        let call = Call {
            command: DEL_DEV,
            id,
            data: 0,
            path: None,
            buffer: &mut [],
        };
        let end = Instant::now() + FREE_NUMBER;
        let mut watch = || {
            if Instant::now() < end {
                Watch::Waiting
            } else {
                Watch::GiveUp
            }
        };
        match self.call(call, &mut watch) {
            Ok(_) | Err(Failure::Errno(libc::ENODEV)) => Ok(()),
            Err(Failure::GivenUp) => {
                tracing::warn!("ublk device {id} is removed, but its disk is still open somewhere");
                Ok(())
            }
            Err(failure) => Err(explain::command(DEL_DEV, Some(id), failure)),
        }
    }

    /// The device's record.
    pub(super) fn info(&mut self, id: u32) -> Result<ublksrv_ctrl_dev_info> {
        let mut info = ublksrv_ctrl_dev_info::default();
        let path = char_path(id);
        self.call(
            Call {
                command: GET_DEV_INFO2,
                id,
                data: 0,
                path: Some(&path),
                buffer: info.bytes_mut(),
            },
            &mut || Watch::Waiting,
        )
        .map_err(|failure| explain::command(GET_DEV_INFO2, Some(id), failure))?;
        Ok(info)
    }

    /// The processors whose requests go to a queue, one bit each.
    pub(super) fn affinity(&mut self, id: u32, queue: u16) -> Result<Vec<u8>> {
        // For 8192 processors, as many as Linux can have.
        let mut mask = vec![0; 1024];
        self.named(GET_QUEUE_AFFINITY, id, u64::from(queue), &mut mask)?;
        Ok(mask)
    }

    /// Changes the size of a running device, in sectors of 512 bytes.
    pub(super) fn update_size(&mut self, id: u32, sectors: u64) -> Result<()> {
        self.named(UPDATE_SIZE, id, sectors, &mut [])
    }

    /// Makes a device whose server has died ready for the next one.
    #[expect(dead_code, reason = "recovery is still to come")]
    pub(super) fn start_recovery(&mut self, id: u32) -> Result<()> {
        self.named(START_USER_RECOVERY, id, 0, &mut [])
    }

    /// Starts a device again, with this process as its server.
    #[expect(dead_code, reason = "recovery is still to come")]
    pub(super) fn end_recovery(&mut self, id: u32) -> Result<()> {
        self.named(
            END_USER_RECOVERY,
            id,
            u64::from(std::process::id()),
            &mut [],
        )
    }

    /// Takes a running device from its server, for the next one.
    #[expect(dead_code, reason = "recovery is still to come")]
    pub(super) fn quiesce(&mut self, id: u32, within: Duration) -> Result<()> {
        self.named(QUIESCE_DEV, id, within.as_millis() as u64, &mut [])
    }

    /// A command on a device whose failures need no special answer.
    fn named(&mut self, command: Command, id: u32, data: u64, buffer: &mut [u8]) -> Result<()> {
        self.buffer_call(command, id, data, buffer)
            .map(drop)
            .map_err(|failure| explain::command(command, Some(id), failure))
    }

    fn buffer_call(
        &mut self,
        command: Command,
        id: u32,
        data: u64,
        buffer: &mut [u8],
    ) -> Result<i32, Failure> {
        let call = Call {
            command,
            id,
            data,
            path: None,
            buffer,
        };
        self.call(call, &mut || Watch::Waiting)
    }

    fn call(&mut self, call: Call<'_>, watch: &mut dyn FnMut() -> Watch) -> Result<i32, Failure> {
        // What the driver reads and writes is a copy, so that it can be left
        // behind when the driver does not answer.
        let mut memory = Vec::new();
        if let Some(path) = call.path {
            memory.extend_from_slice(path.as_os_str().as_bytes());
            memory.push(0);
        }
        let path_len = memory.len();
        memory.extend_from_slice(call.buffer);
        let order = Order {
            code: call.command.code,
            id: call.id,
            data: call.data,
            path_len: path_len as u16,
        };
        let (result, memory) = self.give(order, memory, watch)?;
        call.buffer.copy_from_slice(&memory[path_len..]);
        Ok(result)
    }

    /// Gives an order, and the memory back when the driver has accepted it.
    pub(super) fn give(
        &mut self,
        order: Order,
        mut memory: Vec<u8>,
        watch: &mut dyn FnMut() -> Watch,
    ) -> Result<(i32, Vec<u8>), Failure> {
        let result = match &mut self.way {
            Way::Here(here) => return here.give(order, memory, self.limit, watch),
            Way::Steward(steward) => steward.run(order, &mut memory, self.limit, watch)?,
        };
        if result < 0 {
            return Err(Failure::Errno(-result));
        }
        Ok((result, memory))
    }
}

impl Here {
    fn give(
        &mut self,
        order: Order,
        mut memory: Vec<u8>,
        limit: Duration,
        watch: &mut dyn FnMut() -> Watch,
    ) -> Result<(i32, Vec<u8>), Failure> {
        let mut header = ublksrv_ctrl_cmd {
            dev_id: order.id,
            queue_id: NONE_QUEUE,
            len: memory.len() as u16,
            addr: if memory.is_empty() {
                0
            } else {
                memory.as_mut_ptr() as u64
            },
            data: [order.data],
            dev_path_len: order.path_len,
            ..ublksrv_ctrl_cmd::default()
        };
        let mut payload = [0; 80];
        payload[..size_of::<ublksrv_ctrl_cmd>()].copy_from_slice(header.bytes_mut());
        self.calls += 1;
        let number = self.calls;
        let entry = opcode::UringCmd80::new(types::Fd(self.node.as_raw_fd()), order.code)
            .cmd(payload)
            .build()
            .user_data(number);
        // SAFETY: `memory`, which the command refers to, lives until the
        // answer has come; without one it is leaked below.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            return Err(Failure::Ring(io::Error::from_raw_os_error(libc::EBUSY)));
        }
        match self.wait(number, limit, watch) {
            Ok(result) if result >= 0 => Ok((result, memory)),
            Ok(result) => Err(Failure::Errno(-result)),
            Err(failure) => {
                std::mem::forget(memory);
                self.cancel(number);
                Err(failure)
            }
        }
    }

    fn wait(
        &mut self,
        number: u64,
        limit: Duration,
        watch: &mut dyn FnMut() -> Watch,
    ) -> Result<i32, Failure> {
        let mut since = Instant::now();
        loop {
            let left = limit.saturating_sub(since.elapsed());
            let slice = left.min(SLICE);
            let spec = types::Timespec::new()
                .sec(slice.as_secs())
                .nsec(slice.subsec_nanos());
            let args = types::SubmitArgs::new().timespec(&spec);
            if let Err(error) = self.ring.submitter().submit_with_args(1, &args) {
                match error.raw_os_error() {
                    // Over; interrupted; the completion queue wants reaping.
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                    _ => return Err(Failure::Ring(error)),
                }
            }
            // All of them: what is left of earlier calls is dropped.
            let answer = self
                .ring
                .completion()
                .filter(|completion| completion.user_data() == number)
                .last();
            if let Some(answer) = answer {
                return Ok(answer.result());
            }
            match watch() {
                Watch::Waiting => {}
                Watch::Progress => since = Instant::now(),
                Watch::GiveUp => return Err(Failure::GivenUp),
            }
            if since.elapsed() >= limit {
                return Err(Failure::TimedOut(limit));
            }
        }
    }

    /// Asks the kernel to drop a command that is not answered: it can where
    /// the driver waits interruptibly. Best effort.
    fn cancel(&mut self, number: u64) {
        let entry = opcode::AsyncCancel::new(number).build().user_data(CANCEL);
        // SAFETY: a cancellation refers to no memory.
        if unsafe { self.ring.submission().push(&entry.into()) }.is_ok() {
            let _ = self.ring.submit();
        }
    }
}

/// The character device of a device: where its server works.
pub(super) fn char_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

/// The disk of a device.
pub(super) fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}
