//! What the tests that work with QEMU's programs share.
#![allow(dead_code, unreachable_pub, reason = "a part of every test program")]

pub mod check;
pub mod lab;
pub mod shapes;
pub mod storm;
pub mod turns;

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use qcow2_ublk::codec;
use qcow2_ublk::qcow2::spec::header::Prefix;
use qcow2_ublk::qcow2::spec::{
    Geometry, GuestOffset, Header, HostOffset, L1Entry, L2Entry, RawL2Entry, Subcluster,
};

/// Runs `qemu-img` and returns what it printed. QEMU is needed: a test that
/// cannot run it has not passed.
pub fn qemu_img<S: AsRef<OsStr>>(args: &[S]) -> String {
    let (code, text) = run("qemu-img", args);
    assert_eq!(code, Some(0), "qemu-img failed: {text}");
    text
}

/// Has QEMU make a qcow2 image, with options as for its `-o`.
pub fn qemu_create(path: impl AsRef<Path>, options: &str, size: &str) {
    let path = path.as_ref().as_os_str();
    let mut args: Vec<&OsStr> = ["create", "-q", "-f", "qcow2", "-o", options]
        .map(OsStr::new)
        .to_vec();
    args.extend([path, size.as_ref()]);
    qemu_img(&args);
}

/// Runs `qemu-io -f qcow2 -c COMMAND... IMAGE`.
pub fn qemu_io(image: &Path, commands: &[&str]) -> String {
    let mut args: Vec<&OsStr> = vec!["-f".as_ref(), "qcow2".as_ref()];
    for command in commands {
        args.extend([OsStr::new("-c"), OsStr::new(command)]);
    }
    args.push(image.as_os_str());
    let (code, text) = run("qemu-io", &args);
    assert_eq!(code, Some(0), "qemu-io failed: {text}");
    text
}

/// Runs a program; its exit code, and what it printed on either stream.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> (Option<i32>, String) {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}, which this test needs: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// The simplest reader there can be: an image without backing file, all in
/// memory, and one cluster after the other.
pub struct Reader {
    pub file: Vec<u8>,
    pub header: Header,
}

impl Reader {
    pub fn open(path: &Path) -> Self {
        let file = std::fs::read(path).unwrap();
        let prefix = Prefix::parse(&file).unwrap();
        let cluster0 = &file[..prefix.cluster_size().min(file.len())];
        let header = Header::parse(cluster0, file.len() as u64).unwrap();
        Self { file, header }
    }

    pub fn geometry(&self) -> Geometry {
        self.header.geometry()
    }

    /// `len` bytes at `offset`; zeros behind the end of the file.
    pub fn bytes(&self, offset: HostOffset, len: u64) -> Vec<u8> {
        let start = self.file.len().min(offset.0 as usize);
        let end = self.file.len().min((offset.0 + len) as usize);
        let mut bytes = self.file[start..end].to_vec();
        bytes.resize(len as usize, 0);
        bytes
    }

    pub fn be64(&self, offset: HostOffset) -> u64 {
        u64::from_be_bytes(self.bytes(offset, 8).try_into().unwrap())
    }

    /// The L2 entry that maps `guest`.
    pub fn entry(&self, guest: GuestOffset) -> L2Entry {
        let geometry = self.geometry();
        let l1 = self.header.l1_table_offset + geometry.l1_index(guest) * 8;
        match L1Entry::decode(self.be64(l1), &geometry).unwrap() {
            L1Entry::Unallocated => L2Entry::Unallocated,
            L1Entry::Table { offset, .. } => {
                let len = geometry.l2_entry_bytes();
                let l2 = self.bytes(offset + geometry.l2_index(guest) * len, len);
                L2Entry::decode(RawL2Entry::read(&l2, &geometry), &geometry).unwrap()
            }
        }
    }

    /// The whole disk.
    pub fn disk(&self) -> Vec<u8> {
        let size = self.header.virtual_size();
        let cluster_size = self.header.cluster_size();
        let mut disk = Vec::new();
        for at in (0..size).step_by(cluster_size as usize) {
            match self.entry(GuestOffset(at)) {
                L2Entry::Unallocated | L2Entry::Zero | L2Entry::ZeroAllocated { .. } => {
                    disk.resize(disk.len() + cluster_size as usize, 0);
                }
                L2Entry::Data { host, .. } => disk.extend(self.bytes(host, cluster_size)),
                L2Entry::Mixed {
                    host, subclusters, ..
                } => {
                    let len = cluster_size / 32;
                    for index in 0..32 {
                        match (subclusters.get(index), host) {
                            (Subcluster::Data, Some(host)) => {
                                disk.extend(self.bytes(host + u64::from(index) * len, len));
                            }
                            _ => disk.resize(disk.len() + len as usize, 0),
                        }
                    }
                }
                L2Entry::Compressed(range) => {
                    let input = self.bytes(range.offset, range.max_len);
                    let mut output = vec![0; cluster_size as usize];
                    codec::decompress(self.header.compression_type, &input, &mut output).unwrap();
                    disk.append(&mut output);
                }
            }
        }
        disk.truncate(size as usize);
        disk
    }

    /// The refcount of host cluster number `cluster`.
    pub fn refcount(&self, cluster: u64) -> u64 {
        use qcow2_ublk::qcow2::spec::{ReftableEntry, refcount};
        let geometry = self.geometry();
        let per_block = geometry.refcounts_per_block();
        let entry = self.header.refcount_table_offset + cluster / per_block * 8;
        match ReftableEntry::decode(self.be64(entry), &geometry).unwrap() {
            ReftableEntry::Absent => 0,
            ReftableEntry::Block(offset) => {
                let block = self.bytes(offset, geometry.cluster_size());
                refcount::get(
                    &block,
                    geometry.refcount_order,
                    (cluster % per_block) as usize,
                )
            }
        }
    }
}

/// Bytes that compress to about half, different at every offset.
pub fn half_random(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        for _ in 0..32 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.push(state as u8);
        }
        bytes.extend_from_slice(&[state as u8; 32]);
    }
    bytes.truncate(len);
    bytes
}
