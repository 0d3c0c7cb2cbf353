//! Where the data of a request lives: in our memory, behind the ublk device,
//! or nowhere (zeros). Lets one engine serve every data path.

use std::io;
use std::os::fd::RawFd;

use super::buf::{Buf, zeros};
use super::ops::{self, Op};

/// The data of one request, or a part of it. A plain description: copying it
/// copies no data.
#[derive(Clone, Copy, Debug)]
pub struct Payload {
    place: Place,
    len: u64,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Zeros,
    Memory {
        ptr: *mut u8,
    },
    /// The pages of a block request, reached by pread and pwrite on the ublk
    /// character device at `position` (UBLK_F_USER_COPY) and, where the driver
    /// registered them with the ring (UBLK_F_AUTO_BUF_REG), as a fixed buffer
    /// from byte `start`.
    Device {
        fd: RawFd,
        position: u64,
        fixed: Option<u16>,
        start: u64,
    },
}

// The two constructors that refer to memory are where the contract is made:
// whoever calls them keeps the memory alive until the request is complete.
impl Payload {
    /// `len` zeros, to be written.
    pub fn zeros(len: u64) -> Self {
        Self {
            place: Place::Zeros,
            len,
        }
    }

    /// Memory of this process.
    ///
    /// # Safety
    /// `ptr` is valid for reads and writes (reads only, if the payload is only
    /// written from) of `len` bytes until every request it is given to is
    /// complete, and nobody else accesses it meanwhile.
    pub unsafe fn memory(ptr: *mut u8, len: u64) -> Self {
        Self {
            place: Place::Memory { ptr },
            len,
        }
    }

    /// The pages of a request of a ublk device; `position` is where the
    /// character device `fd` shows them.
    ///
    /// # Safety
    /// The request is not completed while the payload is in use, and `fixed`
    /// is the slot of the current thread's ring that holds its pages.
    pub unsafe fn device(fd: RawFd, position: u64, fixed: Option<u16>, len: u64) -> Self {
        Self {
            place: Place::Device {
                fd,
                position,
                fixed,
                start: 0,
            },
            len,
        }
    }

    /// A buffer's memory.
    ///
    /// The caller keeps `buf` alive and unused until the request is complete:
    /// inside the crate this is used where the same function awaits it.
    pub(crate) fn of_buf(buf: &Buf) -> Self {
        Self {
            place: Place::Memory { ptr: buf.as_raw() },
            len: buf.len() as u64,
        }
    }

    /// Lends a slice for the length of a call that waits for the request.
    pub(crate) fn of_slice_mut(slice: &mut [u8]) -> Self {
        Self {
            place: Place::Memory {
                ptr: slice.as_mut_ptr(),
            },
            len: slice.len() as u64,
        }
    }

    /// Lends a slice, only to be written from.
    pub(crate) fn of_slice(slice: &[u8]) -> Self {
        Self {
            place: Place::Memory {
                ptr: slice.as_ptr().cast_mut(),
            },
            len: slice.len() as u64,
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True for [`Self::zeros`].
    pub fn is_zeros(&self) -> bool {
        matches!(self.place, Place::Zeros)
    }

    /// The part of `len` bytes from `offset`.
    ///
    /// # Panics
    /// When the part is not inside.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Self {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "a payload of {} bytes has no {len} bytes at {offset}",
            self.len
        );
        let place = match self.place {
            Place::Zeros => Place::Zeros,
            Place::Memory { ptr } => Place::Memory {
                ptr: ptr.wrapping_add(offset as usize),
            },
            Place::Device {
                fd,
                position,
                fixed,
                start,
            } => Place::Device {
                fd,
                position: position + offset,
                fixed,
                start: start + offset,
            },
        };
        Self { place, len }
    }

    /// True when a transfer of it needs memory aligned to `alignment` and it
    /// is not, or when it has no memory a file operation could use: it then
    /// goes through a [`Buf`].
    pub fn needs_bounce(&self, alignment: usize) -> bool {
        match self.place {
            Place::Zeros => self.len > zeros().len() as u64,
            Place::Memory { ptr } => !(ptr as usize).is_multiple_of(alignment),
            Place::Device { fixed, start, .. } => fixed.is_none() || start % alignment as u64 != 0,
        }
    }

    /// Starts reading a file into it. Not for payloads that
    /// [need a bounce buffer](Self::needs_bounce).
    pub fn read_from(&self, fd: RawFd, offset: u64) -> Op<'static> {
        match self.place {
            Place::Zeros => unreachable!("zeros are only written from"),
            Place::Memory { ptr } => {
                // SAFETY: by the constructor's contract the memory lives until
                // the request, and so this part of it, is complete.
                unsafe { ops::read_raw(fd, ptr, self.len as usize, offset) }
            }
            Place::Device { fixed, start, .. } => {
                let index = fixed.expect("needs_bounce was checked");
                ops::read_fixed(fd, index, start, self.len as u32, offset)
            }
        }
    }

    /// Starts writing it to a file. Not for payloads that
    /// [need a bounce buffer](Self::needs_bounce).
    pub fn write_to(&self, fd: RawFd, offset: u64) -> Op<'static> {
        match self.place {
            Place::Zeros => ops::write(fd, &zeros()[..self.len as usize], offset),
            Place::Memory { ptr } => {
                // SAFETY: as in `read_from`.
                unsafe { ops::write_raw(fd, ptr, self.len as usize, offset) }
            }
            Place::Device { fixed, start, .. } => {
                let index = fixed.expect("needs_bounce was checked");
                ops::write_fixed(fd, index, start, self.len as u32, offset)
            }
        }
    }

    /// Copies the bytes out, to `target` of the same length.
    pub fn copy_to(&self, target: &mut [u8]) -> io::Result<()> {
        assert_eq!(target.len() as u64, self.len);
        match self.place {
            Place::Zeros => target.fill(0),
            Place::Memory { ptr } => {
                // SAFETY: by the constructor's contract; `target` is a
                // distinct live borrow.
                unsafe { std::ptr::copy_nonoverlapping(ptr, target.as_mut_ptr(), target.len()) };
            }
            Place::Device { fd, position, .. } => {
                let mut done = 0;
                while done < target.len() {
                    let rest = &mut target[done..];
                    // SAFETY: reads into a live slice.
                    let n = unsafe {
                        libc::pread64(
                            fd,
                            rest.as_mut_ptr().cast(),
                            rest.len(),
                            (position + done as u64) as i64,
                        )
                    };
                    done += transferred(n)?;
                }
            }
        }
        Ok(())
    }

    /// Copies `source`, of the same length, in.
    pub fn copy_from(&self, source: &[u8]) -> io::Result<()> {
        assert_eq!(source.len() as u64, self.len);
        match self.place {
            Place::Zeros => unreachable!("zeros are only written from"),
            Place::Memory { ptr } => {
                // SAFETY: as in `copy_to`.
                unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), ptr, source.len()) };
            }
            Place::Device { fd, position, .. } => {
                let mut done = 0;
                while done < source.len() {
                    let rest = &source[done..];
                    // SAFETY: writes from a live slice.
                    let n = unsafe {
                        libc::pwrite64(
                            fd,
                            rest.as_ptr().cast(),
                            rest.len(),
                            (position + done as u64) as i64,
                        )
                    };
                    done += transferred(n)?;
                }
            }
        }
        Ok(())
    }

    /// Fills it with zeros.
    pub fn fill_zeros(&self) -> io::Result<()> {
        if let Place::Memory { ptr } = self.place {
            // SAFETY: as in `copy_to`.
            unsafe { std::ptr::write_bytes(ptr, 0, self.len as usize) };
            return Ok(());
        }
        let mut done = 0;
        while done < self.len {
            let part = (self.len - done).min(zeros().len() as u64);
            self.slice(done, part)
                .copy_from(&zeros()[..part as usize])?;
            done += part;
        }
        Ok(())
    }
}

/// A transfer between us and the request's pages that moves nothing would
/// never end: it is an error.
fn transferred(n: isize) -> io::Result<usize> {
    match n {
        0 => Err(io::Error::from_raw_os_error(libc::EIO)),
        n if n > 0 => Ok(n as usize),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_copy_to_and_from_the_right_bytes() {
        let mut bytes: Vec<u8> = (0..100).collect();
        let payload = Payload::of_slice_mut(&mut bytes);
        let mut out = [0; 10];
        payload
            .slice(20, 30)
            .slice(5, 10)
            .copy_to(&mut out)
            .unwrap();
        assert_eq!(out, [25, 26, 27, 28, 29, 30, 31, 32, 33, 34]);
        payload.slice(98, 2).copy_from(&[7, 8]).unwrap();
        payload.slice(0, 3).fill_zeros().unwrap();
        assert_eq!(bytes[..4], [0, 0, 0, 3]);
        assert_eq!(bytes[98..], [7, 8]);
    }

    #[test]
    #[should_panic(expected = "has no 2 bytes at 9")]
    fn a_part_outside_is_refused() {
        let _ = Payload::zeros(10).slice(9, 2);
    }
}
