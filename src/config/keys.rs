//! Where passphrases come from: files, file descriptors, systemd's
//! credentials, the terminal. Never the command line or the environment, which
//! others can read.
//!
//! A file, descriptor or credential is used to its last byte, a line end
//! included, as QEMU (`--object secret,file=`) and cryptsetup (`--key-file`)
//! do it; the line end that ends what is typed is not part of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use zeroize::Zeroizing;

use super::prompt;
use crate::crypto::{Keyring, Limits, Secret};
use crate::error::{Error, ErrorKind, Result};

/// The longest passphrase: what cryptsetup reads of a key file.
const MAX_LEN: u64 = 8 << 20;

/// Whom to ask for a passphrase that nothing else gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ask {
    /// Nobody.
    #[default]
    Nobody,
    /// Whoever sits at the terminal, if somebody does.
    Terminal,
    /// Standard input has it, or nothing.
    StandardInput,
}

/// What has been said about passphrases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeySources {
    /// A file.
    pub file: Option<PathBuf>,
    /// An open file descriptor.
    pub fd: Option<i32>,
    /// A credential of the service.
    pub credential: Option<String>,
    /// Files for single images of a chain, by image.
    pub layers: BTreeMap<PathBuf, PathBuf>,
    /// Otherwise.
    pub ask: Ask,
    /// What deriving a key may cost.
    pub limits: Limits,
}

impl KeySources {
    /// A keyring that reads each source when it is needed, and once.
    pub fn keyring(self) -> Arc<dyn Keyring> {
        Arc::new(Keys {
            sources: self,
            read: Mutex::default(),
        })
    }

    /// The passphrase for images without one of their own, if there is a
    /// source; `what` is what is asked at the terminal.
    pub fn read(&self, what: &str) -> Result<Option<Secret>> {
        if let Some(path) = &self.file {
            return from_file(path).map(Some);
        }
        if let Some(fd) = self.fd {
            return from_file(Path::new(&format!("/dev/fd/{fd}"))).map(Some);
        }
        if let Some(name) = &self.credential {
            return from_credential(name).map(Some);
        }
        match self.ask {
            Ask::Nobody => Ok(None),
            Ask::Terminal if std::io::stdin().is_terminal() => prompt::ask(what).map(Some),
            Ask::Terminal => Ok(None),
            Ask::StandardInput => {
                let mut bytes = Zeroizing::new(Vec::new());
                std::io::stdin()
                    .lock()
                    .take(MAX_LEN)
                    .read_to_end(&mut bytes)
                    .map_err(|e| Error::io("read the passphrase", e))?;
                let some = !bytes.is_empty();
                Ok(some.then(|| Secret::new(std::mem::take(&mut *bytes))))
            }
        }
    }

    /// The passphrase of an image that is made at `path`: typed, it is typed
    /// twice.
    pub fn read_for_new(&self, path: &Path) -> Result<Secret> {
        match self.layer(path) {
            Some(file) => from_file(file),
            None => self.read_new("the passphrase of the new image"),
        }
    }

    /// True when there is something to read for the image at `path`, and
    /// nobody need be asked.
    pub fn has(&self, path: &Path) -> bool {
        self.layer(path).is_some() || !self.is_silent()
    }

    /// The file for this image alone.
    fn layer(&self, path: &Path) -> Option<&Path> {
        let mut layers = self.layers.iter();
        layers.find_map(|(image, file)| names(image, path).then_some(file.as_path()))
    }

    /// A passphrase for something new: typed, it is typed twice.
    pub fn read_new(&self, what: &str) -> Result<Secret> {
        let typed = self.is_silent();
        let first = self.read(what)?.ok_or_else(|| {
            Error::new(ErrorKind::Usage, "there is no passphrase")
                .cure("give one with --key-file FILE, --key-fd N or --key-credential NAME")
        })?;
        if typed && self.ask == Ask::Terminal {
            let again = prompt::ask("the same again")?;
            if again.expose() != first.expose() {
                return Err(Error::new(
                    ErrorKind::Usage,
                    "the two passphrases are not the same",
                ));
            }
        }
        Ok(first)
    }

    /// True when nothing is said but whom to ask.
    pub fn is_silent(&self) -> bool {
        self.file.is_none() && self.fd.is_none() && self.credential.is_none()
    }
}

fn from_file(path: &Path) -> Result<Secret> {
    let failed = |e| Error::io("read the passphrase", e).path(path);
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    file.take(MAX_LEN + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let problem = match bytes.len() as u64 {
        0 => "the key file is empty",
        len if len > MAX_LEN => "the key file is larger than 8 MiB",
        _ => return Ok(Secret::new(std::mem::take(&mut *bytes))),
    };
    Err(Error::new(ErrorKind::Usage, problem).path(path))
}

fn from_credential(name: &str) -> Result<Secret> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        let what = format!("{name:?} is not the name of a credential");
        return Err(Error::new(ErrorKind::Usage, what));
    }
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("the credential {name} is not there: this is no service with credentials"),
        )
        .cure("see LoadCredential= in systemd.exec(5)")
    })?;
    from_file(&Path::new(&folder).join(name))
}

/// Sources, and what has come from them.
#[derive(Debug)]
struct Keys {
    sources: KeySources,
    /// The passphrase for images without one of their own.
    read: Mutex<Option<Secret>>,
}

impl Keyring for Keys {
    fn passphrase(&self, path: &Path) -> Result<Option<Secret>> {
        if let Some(file) = self.sources.layer(path) {
            return from_file(file).map(Some);
        }
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.is_none() {
            let what = format!("the passphrase of {}", path.display());
            *read = self.sources.read(&what)?;
        }
        Ok(read.clone())
    }

    fn limits(&self) -> Limits {
        self.sources.limits
    }
}

/// True when `said` means the image at `path`: the same file, or, without a
/// folder, the same name.
fn names(said: &Path, path: &Path) -> bool {
    if said.components().count() == 1 && said.file_name() == path.file_name() {
        return true;
    }
    match (fs::canonicalize(said), fs::canonicalize(path)) {
        (Ok(a), Ok(b)) => a == b,
        _ => said == path,
    }
}

/// `[IMAGE=]FILE`, as an option says it. A FILE with an equals sign in its own
/// name needs its image before it.
pub fn parse_key_file(text: &str) -> (Option<PathBuf>, PathBuf) {
    match text.split_once('=') {
        Some((image, file)) => (Some(image.into()), file.into()),
        None => (None, text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_whole_and_by_image() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("general"), "for all\n").unwrap();
        fs::write(at("base-key"), "for base").unwrap();
        fs::write(at("empty"), "").unwrap();
        fs::write(at("base.qcow2"), "").unwrap();
        let sources = KeySources {
            file: Some(at("general")),
            layers: [(at("./base.qcow2"), at("base-key"))].into(),
            ..KeySources::default()
        };
        let keys = sources.clone().keyring();
        let said = |path: PathBuf| keys.passphrase(&path).unwrap().unwrap();
        assert_eq!(said(at("top.qcow2")).expose(), b"for all\n");
        assert_eq!(said(at("base.qcow2")).expose(), b"for base");
        let by_name = KeySources {
            layers: [("base.qcow2".into(), at("base-key"))].into(),
            ..KeySources::default()
        };
        let keys = by_name.keyring();
        assert!(keys.passphrase(&at("base.qcow2")).unwrap().is_some());
        assert!(keys.passphrase(&at("top.qcow2")).unwrap().is_none());
        let empty = KeySources {
            file: Some(at("empty")),
            ..KeySources::default()
        };
        let error = empty.keyring().passphrase(&at("x")).unwrap_err();
        assert!(error.to_string().contains("empty"), "{error}");
        assert_eq!(format!("{:?}", said_debug(&sources)), "Some(Secret)");
    }

    fn said_debug(sources: &KeySources) -> Option<Secret> {
        sources.read("").unwrap()
    }

    #[test]
    fn credentials_have_plain_names() {
        for name in ["", "..", "a/b"] {
            assert_eq!(
                from_credential(name).unwrap_err().kind(),
                ErrorKind::Usage,
                "{name}"
            );
        }
    }

    #[test]
    fn files_may_be_for_one_image() {
        assert_eq!(parse_key_file("k"), (None, "k".into()));
        assert_eq!(
            parse_key_file("a.qcow2=k=1"),
            (Some("a.qcow2".into()), "k=1".into())
        );
    }
}
