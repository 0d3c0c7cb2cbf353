//! `key`: who can open an encrypted image. Nothing of its data changes: each
//! key slot of the LUKS header holds the same key, behind another passphrase.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::image::KeyArgs;
use super::{done, output};
use crate::config::{Ask, KeySources};
use crate::crypto::{Effort, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::KeySlots;
use crate::runtime::Runtime;
use crate::storage::{OpenOptions, Storage};

/// Add, remove or list the passphrases of an encrypted image
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Let another passphrase open the image too; prints its key slot
    Add(Box<AddArgs>),
    /// Wipe a key slot: its passphrase opens the image no more
    ///
    /// Copies of the image, and of its header, made before can still be opened
    /// with it.
    Remove(Box<RemoveArgs>),
    /// Show the key slots
    List(ListArgs),
}

#[derive(Debug, clap::Args)]
struct AddArgs {
    /// The image
    file: PathBuf,

    /// File with the new passphrase; without any source it is asked for
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,

    /// Open file descriptor with the new passphrase
    #[arg(long, value_name = "N", conflicts_with = "new_key_file")]
    new_key_fd: Option<i32>,

    /// Key slot to use [default: the first free one]
    #[arg(long, value_name = "N")]
    slot: Option<usize>,

    /// Milliseconds that opening the image with it should take
    #[arg(long, value_name = "MS", default_value = "2000")]
    iter_time: u64,

    #[command(flatten)]
    keys: KeyArgs,
}

#[derive(Debug, clap::Args)]
struct RemoveArgs {
    /// The image
    file: PathBuf,

    /// Key slot to wipe [default: that of the passphrase given]
    #[arg(long, value_name = "N")]
    slot: Option<usize>,

    /// Also if it is the last one: all data of the image is lost then
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    keys: KeyArgs,
}

#[derive(Debug, clap::Args)]
struct ListArgs {
    /// The image
    file: PathBuf,

    /// Print JSON
    #[arg(short = 'J', long)]
    json: bool,

    /// Read an image that others may be writing to
    #[arg(short = 'U', long)]
    force_share: bool,
}

/// Does what is asked.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let runtime = Runtime::inline().map_err(|e| Error::io("make an executor", e))?;
    runtime.block_on(async {
        match &args.what {
            What::Add(args) => add(args).await,
            What::Remove(args) => remove(args).await,
            What::List(args) => list(args).await,
        }
    })
}

fn known(keys: &KeySources, file: &Path) -> Result<Secret> {
    let passphrase = keys.clone().keyring().passphrase(file)?;
    passphrase.ok_or_else(|| {
        Error::new(
            ErrorKind::Permission,
            "a passphrase that opens the image is needed",
        )
        .path(file)
        .cure("give one with --key-file FILE, --key-fd N or --key-credential NAME")
    })
}

async fn add(args: &AddArgs) -> Result<ExitCode> {
    let storage = Storage::open(&args.file, &OpenOptions::read_write())?;
    let mut slots = KeySlots::open(&storage).await?;
    let keys = args.keys.sources()?;
    let known = known(&keys, &args.file)?;
    let new = KeySources {
        file: args.new_key_file.clone(),
        fd: args.new_key_fd,
        ask: Ask::Terminal,
        ..KeySources::default()
    };
    let new = new
        .read_new("the new passphrase")
        .map_err(|e| e.path(&args.file).cure("give it with --new-key-file FILE"))?;
    let effort = Effort(Duration::from_millis(args.iter_time));
    let slot = slots
        .add(&known, &new, args.slot, effort, &keys.limits)
        .await?;
    output::print(&format!("{slot}\n"))?;
    done()
}

async fn remove(args: &RemoveArgs) -> Result<ExitCode> {
    let storage = Storage::open(&args.file, &OpenOptions::read_write())?;
    let mut slots = KeySlots::open(&storage).await?;
    let slot = match args.slot {
        Some(slot) => slot,
        None => {
            let keys = args.keys.sources()?;
            let passphrase = known(&keys, &args.file)?;
            slots.slot_of(&passphrase, &keys.limits).await?
        }
    };
    slots.remove(slot, args.force).await?;
    done()
}

/// A key slot as `list --json` prints it.
#[derive(Serialize)]
struct Slot {
    slot: usize,
    active: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    kdf: String,
}

async fn list(args: &ListArgs) -> Result<ExitCode> {
    let mut how = OpenOptions::read_only();
    if args.force_share {
        how.locks = crate::storage::Locks::ForceShare;
    }
    let storage = Storage::open(&args.file, &how)?;
    let slots = KeySlots::open(&storage).await?.header().slots();
    if args.json {
        let slots: Vec<Slot> = slots
            .into_iter()
            .map(|slot| Slot {
                slot: slot.number,
                active: slot.active,
                kdf: slot.kdf,
            })
            .collect();
        output::print_json(&slots)?;
        return done();
    }
    let mut text = String::new();
    for slot in slots {
        let state = if slot.active { &slot.kdf } else { "free" };
        text += &format!("{}: {state}\n", slot.number);
    }
    output::print(&text)?;
    done()
}
