//! Encryption of images: sector ciphers, and the LUKS headers that hold their
//! keys. Works on bytes; knows neither files nor qcow2.

mod block_cipher;
mod hash;
mod iv;
mod kdf;
pub mod legacy;
pub mod luks;
pub mod luks1;
pub mod luks2;
mod mode;
mod secret;
mod sector;
mod split;
mod volume_key;

pub use block_cipher::Algorithm;
pub use hash::Hash;
pub use iv::IvGenerator;
pub use kdf::Effort;
pub use mode::Mode;
pub use secret::{Keyring, Limits, Secret};
pub use sector::{CipherSpec, SECTOR, SectorCipher};
pub use volume_key::VolumeKey;
