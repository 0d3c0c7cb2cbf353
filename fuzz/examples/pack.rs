//! Packs image files for the fuzzer: `pack IN OUT` makes the recipe for one.

fn main() {
    let mut names = std::env::args_os().skip(1);
    while let (Some(from), Some(to)) = (names.next(), names.next()) {
        let bytes = std::fs::read(from).expect("an image");
        let packed = qcow2_ublk_fuzz::recipe::pack(&bytes);
        // What it makes is what it was made from.
        let image = qcow2_ublk_fuzz::recipe::image(&mut qcow2_ublk_fuzz::input::Input(&packed));
        assert_eq!(image.bytes(0, image.len()), bytes);
        std::fs::write(to, packed).expect("a place for the recipe");
    }
}
