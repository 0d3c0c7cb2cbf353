#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qcow2_ublk_fuzz::bitmaps::run(data));
