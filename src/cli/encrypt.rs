//! The options `encrypt.*` of new images, with qemu-img's names and values.

use std::sync::Arc;
use std::time::Duration;

use crate::crypto::{Algorithm, CipherSpec, Effort, Hash, IvGenerator, Mode, Secret, luks1, luks2};
use crate::error::{Error, ErrorKind, Result};

/// What was said about encryption.
#[derive(Debug, Default)]
pub(super) struct Encrypt {
    luks: bool,
    /// The cipher and the bytes of its key.
    cipher: Option<(Algorithm, usize)>,
    mode: Option<Mode>,
    ivgen: Option<String>,
    ivgen_hash: Option<Hash>,
    hash: Option<Hash>,
    effort: Option<Effort>,
}

fn usage(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, what)
}

fn wrong(name: &str, value: &str) -> Error {
    usage(format!(
        "Parameter '{name}' does not accept value '{value}'"
    ))
}

fn hash(name: &str, value: &str) -> Result<Hash> {
    Hash::from_name(value).ok_or_else(|| {
        let names = Hash::ALL.map(Hash::name).join(", ");
        wrong(name, value).cure(format!("There are {names}"))
    })
}

/// "aes-256": the cipher and the bytes of its key.
fn cipher(name: &str, value: &str) -> Result<(Algorithm, usize)> {
    value
        .rsplit_once('-')
        .and_then(|(cipher, bits)| {
            let cipher = Algorithm::from_name(cipher)?;
            let len = bits.parse::<usize>().ok()? / 8;
            cipher.key_sizes().contains(&len).then_some((cipher, len))
        })
        .ok_or_else(|| {
            wrong(name, value)
                .cure("There are aes, serpent and twofish with -128, -192 or -256, and cast5-128")
        })
}

/// Who says the passphrase of a new image, if it needs one.
pub(super) type Passphrase<'a> = &'a dyn Fn() -> Result<Secret>;

/// For what a LUKS header is made.
pub(super) enum Purpose<'a> {
    /// An image, with this passphrase.
    Image(Passphrase<'a>),
    /// To see how long it is.
    Measure,
}

impl Encrypt {
    /// Takes an option; false if it is not about encryption.
    pub(super) fn take(&mut self, name: &str, value: &str) -> Result<bool> {
        match name {
            "encrypt.format" => match value {
                "luks" => self.luks = true,
                "aes" => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        "the old AES encryption is weak and is not made any more",
                    )
                    .cure("use encrypt.format=luks"));
                }
                _ => return Err(wrong(name, value)),
            },
            "encrypt.cipher-alg" => self.cipher = Some(cipher(name, value)?),
            "encrypt.cipher-mode" => {
                self.mode = Some(Mode::from_name(value).ok_or_else(|| wrong(name, value))?);
            }
            "encrypt.ivgen-alg" => {
                if !matches!(value, "plain" | "plain64" | "essiv") {
                    return Err(wrong(name, value));
                }
                self.ivgen = Some(value.to_owned());
            }
            "encrypt.ivgen-hash-alg" => self.ivgen_hash = Some(hash(name, value)?),
            "encrypt.hash-alg" => self.hash = Some(hash(name, value)?),
            "encrypt.iter-time" => {
                let time = value.parse().ok().filter(|&time| time > 0);
                let time = time.ok_or_else(|| wrong(name, value))?;
                self.effort = Some(Effort(Duration::from_millis(time)));
            }
            "encrypt.key-secret" => {
                return Err(usage("there are no secret objects here").cure(
                    "give the passphrase with --key-file FILE, --key-fd N or --key-credential NAME",
                ));
            }
            "encryption" if !matches!(value, "off" | "no" | "false" | "n") => {
                return Err(
                    usage("the option encryption means the old, weak AES encryption")
                        .cure("use encrypt.format=luks"),
                );
            }
            "encryption" => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The LUKS header of the new image, if it is to be encrypted, and the
    /// passphrase that opens it.
    pub(super) fn header(
        &self,
        version2: bool,
        purpose: &Purpose<'_>,
    ) -> Result<Option<(Arc<[u8]>, Secret)>> {
        if !self.luks {
            let said = self.cipher.is_some()
                || self.mode.is_some()
                || self.ivgen.is_some()
                || self.ivgen_hash.is_some()
                || self.hash.is_some()
                || self.effort.is_some();
            if said || version2 {
                return Err(
                    usage("there is no encryption for --luks2 and the encrypt.* options")
                        .cure("say encrypt.format=luks too"),
                );
            }
            return Ok(None);
        }
        let usual = luks1::Format::default();
        let (algorithm, len) = self.cipher.unwrap_or((Algorithm::Aes, 32));
        let mode = self.mode.unwrap_or(usual.spec.mode);
        let ivgen = self.ivgen.as_deref().unwrap_or("plain64");
        // As QEMU: SHA-256 where the generator needs one.
        let ivgen_hash = self.ivgen_hash.or(Some(Hash::Sha256));
        let iv = IvGenerator::from_names(ivgen, ivgen_hash).expect("a known generator");
        let mut format = luks1::Format {
            spec: CipherSpec {
                algorithm,
                mode,
                iv,
            },
            key_len: if mode == Mode::Xts { 2 * len } else { len },
            hash: self.hash.unwrap_or(usual.hash),
            effort: self.effort.unwrap_or(usual.effort),
        };
        let passphrase = match purpose {
            Purpose::Image(passphrase) => passphrase()?,
            Purpose::Measure => {
                format.effort = Effort(Duration::ZERO);
                Secret::random()?
            }
        };
        let region = if version2 {
            luks2::make(&format, passphrase.expose())?
        } else {
            format.make(passphrase.expose())?
        };
        Ok(Some((region.into(), passphrase)))
    }
}
