//! What people and programs read.
//!
//! Data goes to standard output: JSON, or a table. Errors go to standard error
//! as `qcow2-ublk: FILE: what is wrong`, with a line that begins `hint:` where
//! there is a cure. Colour only where standard error is a terminal and
//! `NO_COLOR` is not set.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::error::{Error, Result};

/// Writes to standard output and flushes it.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Error::io("write to standard output", e))
}

/// Writes a value to standard output as JSON for people and programs.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&json(value)?)
}

/// JSON indented by four, as qemu-img writes it, with a final newline.
fn json(value: &impl Serialize) -> Result<String> {
    let mut out = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, format);
    value
        .serialize(&mut serializer)
        .map_err(|e| Error::io("write JSON", e.into()))?;
    out.push(b'\n');
    let text = String::from_utf8(out).expect("JSON is UTF-8");
    Ok(plain_json(text))
}

/// JSON without characters that change what one sees: they are in texts only,
/// where their numbers will do.
pub(super) fn plain_json(text: String) -> String {
    let hidden = |c: char| c != '\n' && is_hidden(c);
    if !text.contains(hidden) {
        return text;
    }
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if hidden(c) {
            plain += &format!("\\u{:04x}", u32::from(c));
        } else {
            plain.push(c);
        }
    }
    plain
}

/// Tells the user about an error.
pub(super) fn report(error: &Error) {
    // Whoever read our output has had enough: not worth a word.
    if error.errno() == libc::EPIPE {
        return;
    }
    let (name, hint) = if colour() {
        ("\x1b[1;31mqcow2-ublk:\x1b[0m", "\x1b[1mhint:\x1b[0m")
    } else {
        ("qcow2-ublk:", "hint:")
    };
    let mut text = format!("{name} {}\n", printable(&error.to_string()));
    if let Some(cure) = error.cure_text() {
        text += &format!("{hint} {}\n", printable(cure));
    }
    // One write, so that several processes do not mix their lines.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Whether standard error takes colours.
pub(super) fn colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused && io::stderr().is_terminal()
}

/// Control characters, and those that one does not see but that turn the
/// writing round, or hide in it. None of them is above U+FFFF.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
}

/// The text without control characters: file names and texts from images are
/// not to play with the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let hidden = is_hidden(c);
            let shown = (!hidden).then_some(c);
            let escaped = hidden.then(|| c.escape_default());
            shown.into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

/// Where a column's text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    /// Texts.
    Left,
    /// Numbers.
    Right,
}

/// Columns with a heading each.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(super) fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            columns: columns
                .iter()
                .map(|&(name, align)| (name.to_owned(), align))
                .collect(),
            rows: Vec::new(),
        }
    }

    /// Appends a row, with as many cells as there are columns.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().map(|cell| printable(&cell)).collect();
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    /// The table as text, headings first; no blanks at the ends of lines.
    pub(super) fn render(&self) -> String {
        let heading: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let rows: Vec<&Vec<String>> = std::iter::once(&heading).chain(&self.rows).collect();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut text = String::new();
        for row in rows {
            let mut line = String::new();
            for ((cell, &width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                line += &match align {
                    Align::Left => format!("{cell:<width$}"),
                    Align::Right => format!("{cell:>width$}"),
                };
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_do_not_play_with_the_terminal() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right)]);
        table.row(["a".to_owned(), "1000".to_owned()]);
        table.row(["evil\x1b[2J\n".to_owned(), "7".to_owned()]);
        assert_eq!(
            table.render(),
            "NAME             SIZE\n\
             a                1000\n\
             evil\\u{1b}[2J\\n     7\n"
        );
    }

    #[test]
    fn json_is_indented_by_four() {
        let value = serde_json::json!({"filename": "a"});
        assert_eq!(json(&value).unwrap(), "{\n    \"filename\": \"a\"\n}\n");
    }
}
