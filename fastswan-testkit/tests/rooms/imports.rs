//! Which module of a crate imports from which: read from the source, by the few rules of paths in Rust.
//!
//! A small reader does, since only `mod`, `use` and paths that begin with `crate`, `self` or `super` matter. Tests inside
//! a module may use anything, so what is under `#[cfg(test)]` is left out. What `*` imports is not known by its names.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// The names from the root of the crate to a module or an item.
type Name = Vec<String>;

/// A crate's modules, and what each of them names.
#[derive(Debug, Default)]
pub(crate) struct Imports {
    modules: BTreeSet<Name>,
    /// What a name that a module imports stands for.
    aliases: BTreeMap<Name, Name>,
    /// The module, and what it names.
    uses: Vec<(Name, Name)>,
}

impl Imports {
    /// Reads a crate from its root file on, with a function that reads files.
    pub(crate) fn read(root: &Path, read: &dyn Fn(&Path) -> Option<String>) -> Self {
        let mut imports = Self::default();
        let text = read(root).unwrap_or_else(|| panic!("cannot read {}", root.display()));
        let folder = root.parent().unwrap_or(root).to_path_buf();
        imports.add_file(&text, &Name::new(), &folder, read);
        imports
    }

    /// The names of the modules directly inside a module.
    pub(crate) fn children(&self, parent: &[String]) -> BTreeSet<&str> {
        let inside = self.modules.iter().filter(|name| name.len() == parent.len() + 1);
        inside.filter(|name| name.starts_with(parent)).map(|name| name[parent.len()].as_str()).collect()
    }

    /// Imports between modules directly inside a module, or anything inside those: who imports, from whom, and an
    /// example of each.
    pub(crate) fn between(&self, parent: &[String]) -> BTreeMap<(String, String), String> {
        let children = self.children(parent);
        let child = |name: &Name| {
            let child = name.strip_prefix(parent)?.first()?;
            children.contains(child.as_str()).then(|| child.clone())
        };
        let mut between = BTreeMap::new();
        for (module, named) in &self.uses {
            let target = self.resolve(named.clone());
            if let (Some(from), Some(to)) = (child(module), child(&target))
                && from != to
            {
                let example = format!("{} names {}", module.join("::"), target.join("::"));
                between.entry((from, to)).or_insert(example);
            }
        }
        between
    }

    /// Circles among the modules inside any module of the crate, each told once.
    pub(crate) fn circles(&self) -> Vec<String> {
        self.modules.iter().flat_map(|parent| self.circles_inside(parent)).collect()
    }

    fn circles_inside(&self, parent: &[String]) -> Vec<String> {
        let mut left = self.between(parent);
        // What nobody left imports from, or what imports from nobody left, is in no circle.
        loop {
            let before = left.len();
            let [from, to]: [BTreeSet<String>; 2] = [
                left.keys().map(|(from, _)| from.clone()).collect(),
                left.keys().map(|(_, to)| to.clone()).collect(),
            ];
            left.retain(|(a, b), _| to.contains(a) && from.contains(b));
            if left.len() == before {
                break;
            }
        }
        if left.is_empty() {
            return Vec::new();
        }
        let place = if parent.is_empty() { "crate".to_owned() } else { parent.join("::") };
        vec![format!("in {place}: {}", left.into_values().collect::<Vec<_>>().join("; "))]
    }

    /// Follows imported names to where their items are.
    fn resolve(&self, mut name: Name) -> Name {
        // Aliases of aliases end soon, if not in themselves.
        for _ in 0..16 {
            let prefixes = (1..=name.len()).map(|end| &name[..end]);
            let Some((end, target)) = prefixes
                .filter(|prefix| !self.modules.contains(*prefix))
                .find_map(|prefix| Some((prefix.len(), self.aliases.get(prefix)?)))
            else {
                break;
            };
            name = target.iter().chain(&name[end..]).cloned().collect();
        }
        name
    }

    fn add_file(&mut self, text: &str, module: &Name, folder: &Path, read: &dyn Fn(&Path) -> Option<String>) {
        self.modules.insert(module.clone());
        let tokens = without_tests(&tokens(text));
        let mut inside = vec![(module.clone(), usize::MAX)];
        let mut depth = 0_usize;
        let mut at = 0;
        while at < tokens.len() {
            let here = inside.last().map_or_else(Name::new, |(name, _)| name.clone());
            let token = tokens[at].as_str();
            let next = |by: usize| tokens.get(at + by).map_or("", String::as_str);
            match token {
                "{" => depth += 1,
                "}" => {
                    depth = depth.saturating_sub(1);
                    if inside.last().is_some_and(|(_, opened)| *opened == depth) {
                        inside.pop();
                    }
                }
                "mod" if next(2) == ";" => {
                    let child = child(&here, next(1));
                    let path = folder.join(child[module.len()..].join("/"));
                    let files = [path.with_extension("rs"), path.join("mod.rs")];
                    let text = files.iter().find_map(|file| read(file));
                    let text = text.unwrap_or_else(|| panic!("no file for the module {}", child.join("::")));
                    self.add_file(&text, &child, &path, read);
                    at += 2;
                }
                "mod" if next(2) == "{" => {
                    let child = child(&here, next(1));
                    self.modules.insert(child.clone());
                    inside.push((child, depth));
                    at += 1;
                }
                "use" => {
                    for (path, alias) in tree(&tokens, &mut at, 1) {
                        if let Some(name) = absolute(&path, &here, &self.declared(&here, &tokens)) {
                            let alias = alias.or_else(|| name.last().cloned()).unwrap_or_default();
                            self.aliases.insert(child(&here, &alias), name.clone());
                            self.uses.push((here.clone(), name));
                        }
                    }
                }
                "crate" | "self" | "super" if next(1) == "::" => {
                    let mut end = at;
                    let paths = tree(&tokens, &mut end, 0);
                    at = end - 1;
                    let names =
                        paths.into_iter().filter_map(|(path, _)| absolute(&path, &here, &BTreeSet::new()));
                    self.uses.extend(names.map(|name| (here.clone(), name)));
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// The modules that a file declares: a path may begin with one.
    fn declared(&self, here: &Name, tokens: &[String]) -> BTreeSet<String> {
        let declared = tokens.windows(2).filter(|pair| pair[0] == "mod").map(|pair| pair[1].clone());
        declared.chain(self.children(here).into_iter().map(str::to_owned)).collect()
    }
}

/// Reads the crate whose root is a file on disk.
pub(crate) fn of_crate(root: &Path) -> Imports {
    Imports::read(root, &|file: &Path| std::fs::read_to_string(file).ok())
}

fn child(parent: &Name, name: &str) -> Name {
    parent.iter().cloned().chain([name.to_owned()]).collect()
}

/// A path from the root of the crate; none if it is about another crate.
fn absolute(path: &[String], here: &Name, declared: &BTreeSet<String>) -> Option<Name> {
    let mut base = here.clone();
    let mut rest = path;
    match path.first()?.as_str() {
        "crate" => (base, rest) = (Name::new(), &path[1..]),
        "self" => rest = &path[1..],
        "super" => {}
        first if declared.contains(first) => {}
        _ => return None,
    }
    while rest.first().is_some_and(|first| first == "super") {
        base.pop();
        rest = &rest[1..];
    }
    Some(base.into_iter().chain(rest.iter().cloned()).collect())
}

/// Reads a path with its branches, as in `use a::{b, c::{self, d as e}}`, from `by` tokens on. Leaves `at` behind it.
fn tree(tokens: &[String], at: &mut usize, by: usize) -> Vec<(Vec<String>, Option<String>)> {
    *at += by;
    let mut path = Vec::new();
    loop {
        let token = tokens.get(*at).map_or("", String::as_str);
        if token == "{" {
            let mut branches = Vec::new();
            while tokens.get(*at).is_some_and(|token| token != "}") {
                for (branch, alias) in tree(tokens, at, 1) {
                    let branch = if branch == ["self"] { &[][..] } else { &branch[..] };
                    branches.push((path.iter().chain(branch).cloned().collect(), alias));
                }
            }
            *at += 1;
            return branches;
        }
        if !token.starts_with(|letter: char| letter.is_alphanumeric() || letter == '_') {
            // `*`, or the end of a branch that is not there, as after the last comma.
            *at += usize::from(token == "*");
            break;
        }
        path.push(token.to_owned());
        *at += 1;
        if tokens.get(*at).is_none_or(|token| token != "::") {
            break;
        }
        *at += 1;
    }
    if path.is_empty() {
        return Vec::new();
    }
    let alias = (tokens.get(*at).is_some_and(|token| token == "as")).then(|| {
        *at += 2;
        tokens[*at - 1].clone()
    });
    vec![(path, alias)]
}

/// Words and the signs that matter, without comments, strings and characters.
fn tokens(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let is = |at: usize, sign: &str| {
        sign.chars().enumerate().all(|(by, sign)| letters.get(at + by) == Some(&sign))
    };
    let find =
        |from: usize, sign: &str| (from..letters.len()).find(|at| is(*at, sign)).unwrap_or(letters.len());
    while at < letters.len() {
        let letter = letters[at];
        if is(at, "//") {
            at = find(at, "\n");
        } else if is(at, "/*") {
            at = find(at, "*/") + 2;
        } else if letter == '"' {
            at += 1;
            while at < letters.len() && letters[at] != '"' {
                at += 1 + usize::from(letters[at] == '\\');
            }
            at += 1;
        } else if letter == '\'' {
            // A character, unless it is a lifetime.
            let end = if is(at + 1, "\\") { find(at + 3, "'") } else { at + 2 };
            at = if letters.get(end) == Some(&'\'') { end + 1 } else { at + 1 };
        } else if letter.is_alphanumeric() || letter == '_' {
            let start = at;
            while at < letters.len() && (letters[at].is_alphanumeric() || letters[at] == '_') {
                at += 1;
            }
            let word: String = letters[start..at].iter().collect();
            let hashes = letters[at..].iter().take_while(|letter| **letter == '#').count();
            if matches!(word.as_str(), "r" | "br" | "cr") && letters.get(at + hashes) == Some(&'"') {
                let end = format!("\"{}", "#".repeat(hashes));
                at = find(at + hashes + 1, &end) + end.len();
            } else {
                tokens.push(word);
            }
        } else if is(at, "::") {
            tokens.push("::".to_owned());
            at += 2;
        } else {
            if !letter.is_whitespace() {
                tokens.push(letter.to_string());
            }
            at += 1;
        }
    }
    tokens
}

/// Leaves out every item under `#[cfg(test)]`, with a feature or without, and what is for tests and fuzzing.
fn without_tests(tokens: &[String]) -> Vec<String> {
    const TEST: [&[&str]; 3] = [
        &["#", "[", "cfg", "(", "test", ")", "]"],
        &["#", "[", "cfg", "(", "all", "(", "test", ","],
        &["#", "[", "cfg", "(", "any", "(", "test", ",", "fuzzing", ")", ")", "]"],
    ];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let Some(attribute) =
            TEST.into_iter().find(|test| tokens[at..].iter().take(test.len()).eq(test.iter()))
        else {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        };
        // Words may have been left out of the pattern: the attribute ends where its brackets do.
        let mut depth = attribute.iter().filter(|word| matches!(**word, "(" | "[")).count()
            - attribute.iter().filter(|word| matches!(**word, ")" | "]")).count();
        at += attribute.len();
        while let Some(token) = tokens.get(at) {
            at += 1;
            match token.as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && matches!(token.as_str(), ";" | "}") {
                break;
            }
        }
    }
    kept
}

/// The files of a crate, as a function that reads them.
pub(crate) fn files(texts: &[(&str, &str)]) -> impl Fn(&Path) -> Option<String> + use<> {
    let texts: BTreeMap<PathBuf, String> =
        texts.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
    move |path| texts.get(path).cloned()
}
