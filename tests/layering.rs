//! The arrows of DEVELOPERS.md: a module uses only what is below it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module and what of the crate it may use, besides `error` and `block`.
const ALLOWED: &[(&str, &[&str])] = &[
    ("runtime", &[]),
    ("codec", &[]),
    ("crypto", &["runtime"]),
    ("storage", &["runtime"]),
    ("qcow2", &["codec", "crypto", "storage", "runtime"]),
    ("chain", &["crypto", "qcow2", "storage", "runtime"]),
    (
        "engine",
        &["chain", "codec", "crypto", "qcow2", "storage", "runtime"],
    ),
    ("ublk", &["runtime"]),
    ("disk", &["engine", "chain", "qcow2", "runtime"]),
    ("offline", &["disk", "qcow2", "storage"]),
    (
        "convert",
        &[
            "disk", "engine", "chain", "qcow2", "codec", "crypto", "storage", "runtime",
        ],
    ),
    ("report", &["disk", "chain", "qcow2", "storage"]),
    (
        "config",
        &["ublk", "engine", "chain", "crypto", "qcow2", "storage"],
    ),
    (
        "daemon",
        &[
            "config", "ublk", "engine", "disk", "chain", "qcow2", "storage", "runtime",
        ],
    ),
];

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The modules of the crate that a file names.
fn used(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    // Tests inside a file may use what they like.
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    for line in code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
    {
        for part in line.split("crate::").skip(1) {
            let name: String = part
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            found.insert(name);
        }
    }
    found
}

fn all_sources() -> Vec<PathBuf> {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    assert!(files.len() > 30, "the sources are where this test looks");
    files
}

/// The module a file belongs to.
fn module(file: &Path) -> String {
    let inside = file
        .strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))
        .unwrap();
    let first = inside.components().next().unwrap().as_os_str();
    Path::new(first)
        .file_stem()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

#[test]
fn modules_use_only_what_is_below_them() {
    let mut wrong = Vec::new();
    for file in all_sources() {
        let module = module(&file);
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == module) else {
            continue;
        };
        if file
            .file_name()
            .is_some_and(|name| name.to_str().unwrap().contains("test"))
        {
            continue;
        }
        for name in used(&fs::read_to_string(&file).unwrap()) {
            let crate_wide = [
                "error",
                "block",
                "race",
                "rule",
                "Error",
                "ErrorKind",
                "Result",
            ];
            if name != module && !allowed.contains(&&*name) && !crate_wide.contains(&&*name) {
                wrong.push(format!("{} uses crate::{name}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_and_the_driver_stay_in_their_modules() {
    for file in all_sources() {
        let module = module(&file);
        let source = fs::read_to_string(&file).unwrap();
        let code = source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect::<Vec<_>>()
            .join("\n");
        if module != "runtime" && module != "ublk" {
            assert!(!code.contains("unsafe {"), "{}: unsafe", file.display());
            assert!(!code.contains("io_uring::"), "{}: io_uring", file.display());
        }
        if module != "ublk" {
            assert!(!code.contains("libublk::"), "{}: libublk", file.display());
        }
    }
}

#[test]
fn files_stay_small() {
    let mut files = all_sources();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"),
        &mut files,
    );
    for file in files {
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= 800, "{} has {lines} lines", file.display());
    }
}

/// What the roadmap and the pages on tests name as proof is there to be run.
#[test]
fn tests_that_are_named_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = all_sources();
    sources(&root.join("tests"), &mut files);
    let mut functions = BTreeSet::new();
    for source in files {
        let text = fs::read_to_string(source).unwrap();
        for rest in text.split("fn ").skip(1) {
            let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
            functions.insert(rest[..end].to_owned());
        }
    }
    let mut pages = vec![root.join("TODO.md"), root.join("docs/testing.md")];
    let more = fs::read_dir(root.join("docs/testing")).unwrap();
    pages.extend(more.map(|page| page.unwrap().path()));
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        let name = page.display();
        for word in text.split(|c: char| !is_word(c)) {
            // Long enough not to be a field or a file.
            let looks = word.matches('_').count() >= 3 && word.to_lowercase() == word;
            assert!(!looks || functions.contains(word), "{name}: no test {word}");
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}
