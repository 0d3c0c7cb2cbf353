//! How a request's data gets to us and back.

use std::fmt;
use std::str::FromStr;

use super::explain;
use super::uapi::Features;
use crate::error::{Error, ErrorKind, Result};

/// How a request's data gets to us and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataPath {
    /// The driver copies it to and from a buffer of ours. Linux 6.0.
    Copy,
    /// We copy it, with pread and pwrite on the character device. Linux 6.5.
    UserCopy,
    /// It is a fixed buffer of the queue's ring, so that a file is read and
    /// written without a copy; what needs one uses [`Self::UserCopy`]. Linux
    /// 6.16.
    AutoBuf,
}

impl DataPath {
    const BEST_FIRST: [Self; 3] = [Self::AutoBuf, Self::UserCopy, Self::Copy];

    /// The features a device needs for it.
    pub(super) fn features(self) -> Features {
        match self {
            Self::Copy => Features::empty(),
            Self::UserCopy => Features::USER_COPY,
            Self::AutoBuf => Features::AUTO_BUF_REG | Features::USER_COPY,
        }
    }

    /// The best one a driver or device with these features has.
    pub fn best(features: Features) -> Self {
        Self::BEST_FIRST
            .into_iter()
            .find(|path| features.contains(path.features()))
            .unwrap_or(Self::Copy)
    }

    /// The one that was asked for, or else the best.
    pub(super) fn choose(wanted: Option<Self>, features: Features) -> Result<Self> {
        let Some(wanted) = wanted else {
            return Ok(Self::best(features));
        };
        match wanted.features().difference(features).iter().next() {
            None => Ok(wanted),
            Some(missing) => Err(explain::lacks(missing, &format!("the data path {wanted}"))),
        }
    }

    /// The longest request by default, in bytes. In copy mode it has a buffer
    /// for each tag.
    pub(super) fn max_request(self) -> u32 {
        match self {
            Self::Copy => 512 << 10,
            Self::UserCopy | Self::AutoBuf => 1 << 20,
        }
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copy => "copy",
            Self::UserCopy => "user-copy",
            Self::AutoBuf => "auto-buf",
        })
    }
}

impl FromStr for DataPath {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::BEST_FIRST
            .into_iter()
            .find(|path| path.to_string() == name)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Usage,
                    format!("no data path \"{name}\": it is copy, user-copy or auto-buf"),
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_that_is_there_or_the_one_asked_for() {
        let old = Features::CMD_IOCTL_ENCODE;
        let middle = old | Features::USER_COPY;
        let new = middle | Features::AUTO_BUF_REG;
        assert_eq!(DataPath::choose(None, old).unwrap(), DataPath::Copy);
        assert_eq!(DataPath::choose(None, middle).unwrap(), DataPath::UserCopy);
        assert_eq!(DataPath::choose(None, new).unwrap(), DataPath::AutoBuf);
        let forced = DataPath::choose(Some(DataPath::Copy), new).unwrap();
        assert_eq!(forced, DataPath::Copy);
        let error = DataPath::choose(Some(DataPath::AutoBuf), middle).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Driver);
        assert!(error.to_string().contains("AUTO_BUF_REG"), "{error}");
        assert!(error.to_string().contains("auto-buf"), "{error}");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for path in DataPath::BEST_FIRST {
            assert_eq!(path.to_string().parse::<DataPath>().unwrap(), path);
        }
        assert!("zero-copy".parse::<DataPath>().is_err());
    }
}
