//! The `qcow2-ublk` program: everything it does is in the library.

fn main() -> std::process::ExitCode {
    qcow2_ublk::cli::main()
}
