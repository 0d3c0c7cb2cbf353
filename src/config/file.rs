//! Settings from a TOML file.

use std::path::{Path, PathBuf, absolute};

use super::Settings;
use crate::error::{Error, ErrorKind, Result};

/// Where the files are that are known by name.
const FOLDER: &str = "/etc/qcow2-ublk";

impl Settings {
    /// The file that `text` stands for: a path, or for a bare name
    /// `/etc/qcow2-ublk/NAME.toml`.
    pub fn locate(text: &Path) -> PathBuf {
        let bare = text.components().count() == 1
            && text.is_relative()
            && text.extension().is_none_or(|extension| extension != "toml")
            && text.as_os_str() != "."
            && text.as_os_str() != "..";
        if !bare {
            return text.to_owned();
        }
        let mut name = text.as_os_str().to_owned();
        name.push(".toml");
        Path::new(FOLDER).join(name)
    }

    /// Reads a file. Paths in it are relative to its folder.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::io("read the configuration", e).path(path))?;
        let mut settings = Self::parse(&text).map_err(|e| e.path(path))?;
        let path = absolute(path).map_err(|e| Error::io("find the file", e).path(path))?;
        let folder = path.parent().unwrap_or_else(|| Path::new("/"));
        if let Some(image) = &mut settings.image {
            *image = folder.join(&*image);
        }
        for allowed in &mut settings.allow_path {
            *allowed = folder.join(&*allowed);
        }
        if let Some(file) = &mut settings.key_file {
            *file = folder.join(&*file);
        }
        settings.layer_keys = std::mem::take(&mut settings.layer_keys)
            .into_iter()
            .map(|(image, file)| {
                // A name alone is that of an image anywhere in the chain.
                let alone = image.components().count() == 1;
                let image = if alone { image } else { folder.join(image) };
                (image, folder.join(file))
            })
            .collect();
        Ok(settings)
    }

    fn parse(text: &str) -> Result<Self> {
        let settings: Self = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let message = error.message().replace('\n', " ");
            Error::new(
                ErrorKind::Usage,
                match line {
                    Some(line) => format!("line {line}: {message}"),
                    None => message,
                },
            )
        })?;
        settings.check_key_source()?;
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BarrierSetting, OverlapSetting};
    use crate::config::{CacheSetting, DataPathSetting, DiscardSetting};

    #[test]
    fn every_key_is_understood() {
        let settings = Settings::parse(
            "image = \"a.qcow2\"\nnumber = 3\nqueues = 2\ndepth = 64\n\
             logical-block-size = 4096\nread-only = true\ndata-path = \"user-copy\"\n\
             cache = \"writeback\"\ndiscard = \"ignore\"\npart-scan = false\nsandbox = false\n\
             barrier = \"metadata\"\noverlap-check = \"all\"\n\
             allow-path = [\"/srv/base\"]\ntrust-chain = true\nbacking-format = \"raw\"\n\
             key-file = \"k\"\nkey-memory = 5\nkey-iterations = 6\n\
             [layer-keys]\n\"base.qcow2\" = \"base-key\"\n",
        )
        .unwrap();
        assert_eq!(settings.data_path, Some(DataPathSetting::UserCopy));
        assert_eq!(settings.cache, Some(CacheSetting::Writeback));
        assert_eq!(settings.discard, Some(DiscardSetting::Ignore));
        assert_eq!(settings.barrier, Some(BarrierSetting::Metadata));
        assert_eq!(settings.overlap_check, Some(OverlapSetting::All));
        assert_eq!(settings.part_scan, Some(false));
        assert_eq!(settings.sandbox, Some(false));
        assert_eq!(settings.key_file, Some("k".into()));
        assert_eq!(settings.layer_keys.len(), 1);
        assert_eq!(settings.allow_path, [PathBuf::from("/srv/base")]);
    }

    #[test]
    fn mistakes_are_found_on_their_line() {
        let wrong = |text| Settings::parse(text).unwrap_err().to_string();
        let unknown = wrong("image = \"a\"\n\nquues = 3\n");
        assert!(unknown.starts_with("line 3: "), "{unknown}");
        assert!(unknown.contains("quues"), "{unknown}");
        let value = wrong("image = \"a\"\ncache = \"writethrough\"\n");
        assert!(value.starts_with("line 2: "), "{value}");
        assert!(value.contains("writethrough"), "{value}");
        assert!(wrong("queues = \"two\"\n").starts_with("line 1: "));
        assert!(wrong("image = \n").starts_with("line 1: "));
        let two = wrong("image = \"a\"\nkey-file = \"k\"\nkey-credential = \"c\"\n");
        assert!(two.contains("one of them"), "{two}");
    }

    #[test]
    fn names_and_paths() {
        let located = |text: &str| Settings::locate(Path::new(text));
        assert_eq!(located("vm1"), Path::new("/etc/qcow2-ublk/vm1.toml"));
        assert_eq!(located("vm1.toml"), Path::new("vm1.toml"));
        assert_eq!(located("./vm1"), Path::new("./vm1"));
        assert_eq!(located("/x/vm1"), Path::new("/x/vm1"));
        assert_eq!(located("a.b"), Path::new("/etc/qcow2-ublk/a.b.toml"));
    }
}
