//! Landlock: no path leads anywhere. What is open already goes on working.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest interface whose rights these rules know; older kernels have
/// fewer.
const KNOWN: ABI = ABI::V9;
/// Where the journal listens.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// True when the kernel has Landlock, and it is not switched off.
pub(super) fn is_available() -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::ReadFile)
        .and_then(Ruleset::create)
        .is_ok()
}

/// Rules for threads.
#[derive(Debug)]
pub(super) struct Rules(RulesetCreated);

impl Rules {
    /// Rules by which files can be removed from `records`, and nothing else can
    /// be done with any path; none where there is no Landlock.
    pub(super) fn new(records: &Path) -> Result<Option<Self>, RulesetError> {
        if !is_available() {
            return Ok(None);
        }
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?;
        let allowed = [
            (records, AccessFs::RemoveFile),
            (Path::new(JOURNAL), AccessFs::ResolveUnix),
        ];
        for (path, access) in allowed {
            // What is not there needs no permission.
            if let Ok(fd) = PathFd::new(path) {
                rules = rules.add_rule(PathBeneath::new(fd, access))?;
            }
        }
        Ok(Some(Self(rules)))
    }

    /// Puts the calling thread, and those it starts, under the rules.
    pub(super) fn restrict_thread(&self) -> io::Result<()> {
        let status = self
            .0
            .try_clone()?
            .restrict_self()
            .map_err(io::Error::other)?;
        match status.ruleset {
            RulesetStatus::NotEnforced => Err(io::Error::from(io::ErrorKind::Unsupported)),
            _ => Ok(()),
        }
    }
}
