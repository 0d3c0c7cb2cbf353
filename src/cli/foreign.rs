//! Options of QEMU's programs that are not here: refused by name, with what to
//! do instead.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue};

use crate::error::{Error, ErrorKind};

/// Options that every verb of qemu-img has.
const EVERYWHERE: [(&str, &str, &str); 4] = [
    (
        "--object",
        "there are no objects of QEMU's here",
        "give passphrases with --key-file [IMAGE=]FILE, --key-fd N or --key-credential NAME",
    ),
    (
        "--image-opts",
        "images are named by their files, not by QEMU's options",
        "give the file, its format with -f, and passphrases with --key-file",
    ),
    (
        "--source-image-opts",
        "images are named by their files, not by QEMU's options",
        "give the file, its format with -f, and passphrases with --key-file",
    ),
    (
        "--target-image-opts",
        "images are named by their files, not by QEMU's options",
        "give the file with -n, and its format with -O",
    ),
];

/// Those of one verb: verb, option, why not, and what instead.
const OF_VERBS: [(&str, &str, &str, &str); 7] = [
    (
        "convert",
        "-C",
        "the host is not asked to copy: everything is read and written",
        "leave it out",
    ),
    (
        "rebase",
        "-U",
        "an image that is changed is not shared",
        "leave it out, when nobody uses the image",
    ),
    (
        "bench",
        "-i",
        "the engine uses io_uring and nothing else",
        "leave it out",
    ),
    (
        "check",
        "-T",
        "a check goes through the host's page cache",
        "leave it out",
    ),
    (
        "amend",
        "-t",
        "an amended image is durable in any case, and only tables are written",
        "leave it out",
    ),
    (
        "amend",
        "-p",
        "amending tells no progress: it is over at once",
        "leave it out",
    ),
    (
        "amend",
        "--force",
        "the last key of an encrypted image is not removed with `amend`",
        "see `qcow2-ublk key remove --help`",
    ),
];

/// What there is to say about an option or a verb of QEMU's, if it is one.
pub(super) fn refusal(error: &clap::Error, args: &[OsString]) -> Option<Error> {
    if let Some(ContextValue::String(verb)) = error.get(ContextKind::InvalidSubcommand) {
        return (verb == "dd").then(|| {
            let what = "dd is not supported: a part of a disk is copied from a device";
            Error::new(ErrorKind::Unsupported, what)
                .cure("use `qcow2-ublk convert` for all of it, or dd behind `qcow2-ublk add`")
        });
    }
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let verb = args.iter().skip(1).find_map(|arg| {
        let arg = arg.to_str()?;
        (!arg.starts_with('-')).then_some(arg)
    });
    let (why, instead) = EVERYWHERE
        .iter()
        .find(|(name, ..)| name == option)
        .map(|&(_, why, instead)| (why, instead))
        .or_else(|| {
            OF_VERBS
                .iter()
                .find(|(of, name, ..)| Some(*of) == verb && name == option)
                .map(|&(_, _, why, instead)| (why, instead))
        })?;
    let what = format!("{option} is not supported: {why}");
    Some(Error::new(ErrorKind::Unsupported, what).cure(instead))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn refused(line: &str) -> Option<String> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let error = Cli::try_parse_from(&args).unwrap_err();
        refusal(&error, &args).map(|error| error.to_string())
    }

    #[test]
    fn options_of_qemu_are_refused_by_name() {
        for (verb, option, ..) in OF_VERBS {
            let text = refused(&format!("qcow2-ublk {verb} {option} a b"));
            let text = text.unwrap_or_else(|| panic!("{verb} {option}"));
            assert!(text.contains(option), "{text}");
        }
        for verb in ["info", "convert", "check", "create"] {
            for (option, ..) in EVERYWHERE {
                let text = refused(&format!("qcow2-ublk -v {verb} {option} x a b"));
                assert!(text.is_some_and(|text| text.contains(option)), "{option}");
            }
        }
        assert_eq!(refused("qcow2-ublk info --nothing a"), None);
        assert!(refused("qcow2-ublk dd if=a of=b").is_some());
        assert_eq!(refused("qcow2-ublk nothing"), None);
    }
}
