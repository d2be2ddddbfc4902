//! The committed bytecode: how it is built, and whether it is what the source says.
//!
//! The same source gives the same bytes in any folder: paths are remapped and the sections with DWARF are taken
//! out. BTF stays, with which the kernel names functions and lines.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command as Process,
};

use anyhow::{Context as _, bail, ensure};
use clap::Subcommand;
use fastswan::{XdpForwarder, table::TableConfig};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::{cargo, workspace};

/// What is done with the bytecode.
#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Command {
    /// Builds it and writes it into the crates.
    Build,
    /// Builds it elsewhere, fails if it differs from the committed one, and tells what it costs.
    Check,
    /// Installs what building it takes: the source of `core`, and bpf-linker.
    Install,
}

/// What the version of bpf-linker must be for the bytes to be the same.
const BPF_LINKER: &str = "0.13.0";

/// Targets, and what the files for them end in.
const TARGETS: [(&str, &str); 2] = [("bpfel-unknown-none", "bpfel.o"), ("bpfeb-unknown-none", "bpfeb.o")];

/// A crate of programs, whose bytecode is committed.
#[derive(Clone, Copy, Debug)]
struct Programs {
    /// The package, and its binary.
    package: &'static str,
    /// Where the bytecode is committed.
    folder: &'static str,
    /// What the files are called.
    name: &'static str,
    /// Features to build it with.
    features: &'static str,
}

/// The library's.
const LIBRARY: Programs =
    Programs { package: "fastswan-ebpf", folder: "fastswan/bpf", name: "fastswan", features: "" };
/// The same, for measurements of what each of its checks costs.
const ABLATION: Programs =
    Programs { folder: "fastswan-testkit/bpf", name: "ablation", features: "ablation", ..LIBRARY };
/// Those that `cargo testkit bench datapath` and `bench veth` compare it with.
const TESTKIT: Programs = Programs {
    package: "fastswan-testkit-ebpf",
    folder: "fastswan-testkit/bpf",
    name: "testkit",
    features: "",
};
const ALL: [Programs; 3] = [LIBRARY, ABLATION, TESTKIT];

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Build => ALL.iter().try_for_each(|programs| programs.build_into(&programs.committed())),
        Command::Check => check(),
        Command::Install => install(),
    }
}

impl Programs {
    fn committed(&self) -> PathBuf {
        workspace().join(self.folder)
    }

    /// The names of the files.
    fn files(&self) -> [String; 2] {
        TARGETS.map(|(_, end)| format!("{}.{end}", self.name))
    }

    fn build_into(&self, folder: &Path) -> anyhow::Result<()> {
        let missing = missing();
        ensure!(missing.is_empty(), "cannot build the bytecode without {}", missing.join("; "));
        fs::create_dir_all(folder)?;
        for ((target, _), file) in TARGETS.iter().zip(self.files()) {
            strip_dwarf(&self.build(target)?, &folder.join(file))?;
        }
        Ok(())
    }

    /// Builds them for one target and returns where they lie.
    fn build(&self, target: &str) -> anyhow::Result<PathBuf> {
        let Self { package, features, .. } = *self;
        let workspace = workspace();
        let target_folder = workspace.join("target/ebpf");
        let home = std::env::var("CARGO_HOME").map(PathBuf::from).or_else(|_| {
            std::env::var("HOME").map(|home| Path::new(&home).join(".cargo")).context("HOME is not set")
        })?;
        let rust_source = sysroot()?.join("lib/rustlib/src/rust");
        let mut flags = vec![
            "-Clinker=bpf-linker".to_owned(),
            // BTF is made from debug information.
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // Atomic instructions that return a value, and 32-bit jumps: Linux 5.12.
            "-Ctarget-cpu=v3".to_owned(),
            // Headers may lie at any address.
            "-Clink-arg=--cpu-features=+allows-misaligned-mem-access".to_owned(),
        ];
        for (path, name) in [(&workspace, "fastswan"), (&home, "cargo"), (&rust_source, "rust")] {
            flags.push(format!("--remap-path-prefix={}=/{name}", path.display()));
        }
        let status = Process::new(cargo())
            .current_dir(&workspace)
            .args(["build", "--quiet", "--locked", "--release", "-Zbuild-std=core", "--target", target])
            .args(["--package", package, "--bin", package, "--features", features, "--target-dir"])
            .arg(&target_folder)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env_remove("RUSTFLAGS")
            .status()?;
        ensure!(status.success(), "building {package} for {target} failed");
        Ok(target_folder.join(target).join("release").join(package))
    }

    /// Builds them elsewhere, and names what is not as committed.
    fn differences(&self) -> anyhow::Result<Vec<String>> {
        let scratch = workspace().join("target/ebpf/check");
        self.build_into(&scratch)?;
        let mut different = Vec::new();
        for file in self.files() {
            let (committed, built) = (fs::read(self.committed().join(&file)), fs::read(scratch.join(&file))?);
            let committed = committed.with_context(|| format!("reading the committed {file}"))?;
            println!("{file}: {} bytes", committed.len());
            if committed != built {
                different.push(format!("{file} ({})", differing_functions(&committed, &built)?));
            }
        }
        Ok(different)
    }
}

/// What is missing to build the bytecode, and how to get it.
pub(crate) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    match sysroot() {
        Ok(sysroot) if sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists() => {}
        _ => missing.push("the source of core: run `rustup component add rust-src`".to_owned()),
    }
    let linker = Process::new("bpf-linker").arg("--version").output();
    match linker.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()) {
        Ok(version) if version == format!("bpf-linker {BPF_LINKER}") => {}
        Ok(version) if !version.is_empty() => {
            missing.push(format!("bpf-linker {BPF_LINKER}, not {version}: run `cargo testkit ebpf install`"));
        }
        _ => missing.push(format!("bpf-linker {BPF_LINKER}: run `cargo testkit ebpf install`")),
    }
    missing
}

/// Installs what [`missing`] names. bpf-linker is linked against the LLVM that rustc itself ships.
pub(crate) fn install() -> anyhow::Result<()> {
    let sysroot = sysroot()?;
    if missing().iter().any(|what| what.starts_with("the source")) {
        let status = Process::new("rustup").args(["component", "add", "rust-src"]).status()?;
        ensure!(status.success(), "`rustup component add rust-src` failed: it needs a network");
    }
    if missing().is_empty() {
        return Ok(());
    }
    let verbose = Process::new("rustc").arg("-vV").output()?;
    let verbose = String::from_utf8_lossy(&verbose.stdout).into_owned();
    let llvm = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: "));
    let llvm = llvm.and_then(|version| version.split('.').next()).context("rustc tells no LLVM version")?;
    let libraries = sysroot.join("lib");
    let library = fs::read_dir(&libraries)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libLLVM.so.")))
        .context("rustc ships no libLLVM.so")?;
    let prefix = workspace().join("target/llvm");
    fs::create_dir_all(prefix.join("lib"))?;
    let link = prefix.join("lib/libLLVM.so");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(library, link)?;
    let status = Process::new(cargo())
        .args(["install", "--locked", "--force", "bpf-linker", "--version", BPF_LINKER])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        .env("LLVM_PREFIX", &prefix)
        .env("RUSTFLAGS", format!("-C link-arg=-Wl,-rpath,{}", libraries.display()))
        .status()?;
    ensure!(status.success(), "installing bpf-linker failed");
    Ok(())
}

fn sysroot() -> anyhow::Result<PathBuf> {
    let output = Process::new("rustc").args(["--print", "sysroot"]).output().context("running rustc")?;
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Takes the sections with DWARF out, with the tool that rustc ships for it.
fn strip_dwarf(from: &Path, to: &Path) -> anyhow::Result<()> {
    let verbose = Process::new("rustc").arg("-vV").output()?;
    let verbose = String::from_utf8(verbose.stdout)?;
    let host = verbose.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc tells no host")?;
    let libraries = sysroot()?.join("lib");
    let status = Process::new(libraries.join("rustlib").join(host).join("bin/rust-objcopy"))
        .arg("--strip-debug")
        .args([from, to])
        .env("LD_LIBRARY_PATH", &libraries)
        .status()
        .context("running rust-objcopy")?;
    ensure!(status.success(), "stripping {} failed", from.display());
    Ok(())
}

fn check() -> anyhow::Result<()> {
    let mut different = Vec::new();
    for programs in ALL {
        different.extend(programs.differences()?);
    }
    if !different.is_empty() {
        bail!(
            "the committed bytecode is not what the source gives: {}; run `cargo testkit ebpf build` and \
             commit the result",
            different.join(", ")
        );
    }
    let (forwarder, _) = XdpForwarder::load(TableConfig::default())?;
    let cost = forwarder.cost()?;
    println!(
        "the program has {} instructions; the verifier walked through {} of 1,000,000",
        cost.instructions, cost.verified_instructions
    );
    Ok(())
}

/// Names the functions whose code differs.
fn differing_functions(one: &[u8], other: &[u8]) -> anyhow::Result<String> {
    let (one, other) = (functions(one)?, functions(other)?);
    let names: Vec<&str> = one
        .keys()
        .chain(other.keys().filter(|name| !one.contains_key(*name)))
        .filter(|name| one.get(*name) != other.get(*name))
        .map(String::as_str)
        .collect();
    Ok(if names.is_empty() {
        "no function differs, but maps, constants or BTF do".to_owned()
    } else {
        format!("functions {}", names.join(", "))
    })
}

fn functions(object: &[u8]) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let file = object::File::parse(object)?;
    let mut functions = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == object::SymbolKind::Text) {
        let Some(section) = symbol.section_index() else { continue };
        let code = file.section_by_index(section)?;
        let code = code.data_range(symbol.address(), symbol.size())?.unwrap_or_default();
        functions.insert(symbol.name()?.to_owned(), code.to_vec());
    }
    Ok(functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_function_is_named() {
        let object = fs::read(LIBRARY.committed().join("fastswan.bpfel.o")).unwrap();
        let file = object::File::parse(&*object).unwrap();
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok("fastswan_clock")).unwrap();
        let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
        let (start, _) = section.file_range().unwrap();
        let mut changed = object.clone();
        changed[usize::try_from(start + symbol.address()).unwrap() + 8] ^= 1;
        assert_eq!(differing_functions(&object, &changed).unwrap(), "functions fastswan_clock");
    }
}
