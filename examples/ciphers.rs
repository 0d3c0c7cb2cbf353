//! How fast the cipher of encrypted images is: AES-256-XTS on one core, pieces of
//! 1 MiB, with sectors of 512 bytes (LUKS1) and of 4096 (LUKS2).
//!
//! ```console
//! $ cargo run --release --example ciphers
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use qcow2_ublk::Result;
use qcow2_ublk::crypto::{CipherSpec, SectorCipher};

/// How long each figure is measured.
const TIME: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let spec = CipherSpec::parse("aes", "xts-plain64")?;
    let mut data = vec![0; 1 << 20];
    for size in [512, 4096] {
        let cipher = SectorCipher::new(spec, &[0x5a; 64], size)?;
        for (name, work) in [
            ("encrypt", SectorCipher::encrypt as fn(&_, _, &mut _)),
            ("decrypt", SectorCipher::decrypt),
        ] {
            let begun = Instant::now();
            let mut bytes = 0;
            while begun.elapsed() < TIME {
                work(&cipher, bytes, black_box(&mut data));
                bytes += data.len() as u64;
            }
            let rate = bytes as f64 / begun.elapsed().as_secs_f64() / 1e9;
            println!("{name}, {size} bytes: {rate:.2} GB/s");
        }
    }
    Ok(())
}
