//! The actions of the command line, in the order in which they stand there.

use std::ffi::OsString;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

/// An action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(OsString),
}

impl Action {
    /// What it is called in messages.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// The actions, with where they stand.
#[derive(Clone, Debug, Default)]
pub(super) struct Actions(Vec<(usize, Action)>);

impl Actions {
    pub(super) fn in_order(&self) -> Vec<Action> {
        let mut actions = self.0.clone();
        actions.sort_by_key(|(at, _)| *at);
        actions.into_iter().map(|(_, action)| action).collect()
    }
}

const FLAGS: [(&str, Action, &str); 5] = [
    (
        "add",
        Action::Add,
        "Make the bitmap: all clean, and recording",
    ),
    ("remove", Action::Remove, "Remove the bitmap"),
    ("clear", Action::Clear, "Make everything clean"),
    (
        "enable",
        Action::Enable,
        "Record changes of the disk from now on",
    ),
    ("disable", Action::Disable, "Record no more changes"),
];

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut actions = Vec::new();
        for (name, action, _) in FLAGS {
            let places = matches.indices_of(name).into_iter().flatten();
            actions.extend(places.map(|at| (at, action.clone())));
        }
        let sources = matches.get_many::<OsString>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        let merges = places.zip(sources);
        actions.extend(merges.map(|(at, source)| (at, Action::Merge(source.clone()))));
        Ok(Self(actions))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Actions {
    fn augment_args(command: Command) -> Command {
        let flag = |(name, _, help): (&'static str, Action, &'static str)| {
            Arg::new(name)
                .long(name)
                .help(help)
                .action(ArgAction::Append)
                .num_args(0)
                .default_missing_value("")
        };
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("BITMAP")
            .help("Make dirty what is dirty in BITMAP, of this image or --source-file")
            .value_parser(clap::value_parser!(OsString))
            .action(ArgAction::Append);
        command.args(FLAGS.map(flag)).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Vec<Action> {
        let command = <Actions as clap::Args>::augment_args(Command::new("x"))
            .arg(Arg::new("file").required(true));
        let matches = command.try_get_matches_from(words).unwrap();
        Actions::from_arg_matches(&matches).unwrap().in_order()
    }

    #[test]
    fn actions_keep_their_order() {
        let merge = |name: &str| Action::Merge(name.into());
        let words = [
            "x",
            "--add",
            "--merge",
            "a",
            "f",
            "--disable",
            "--merge=b",
            "--add",
        ];
        let expected = [
            Action::Add,
            merge("a"),
            Action::Disable,
            merge("b"),
            Action::Add,
        ];
        assert_eq!(parse(&words), expected);
        assert_eq!(parse(&["x", "f"]), []);
    }
}
