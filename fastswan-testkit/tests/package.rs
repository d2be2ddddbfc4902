//! What `cargo add fastswan` gives: the packaged crates, built and used outside the workspace.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use fastswan_testkit::lab;

const MAIN: &str = r#"
fn main() {
    let loaded = fastswan::XdpForwarder::load(&fastswan::table::TableConfig::default());
    let (forwarder, _table) = loaded.expect("the program loads");
    println!("{} instructions", forwarder.cost().expect("the kernel tells").instructions);
}
"#;

/// What decides, without the kernel.
const CORE_MAIN: &str = r#"
fn main() {
    use fastswan::OffloadTable as _;
    let mut table = fastswan::MemoryTable::new(&fastswan::table::TableConfig::default());
    let mut compiler = fastswan::Compiler::new(table.capacity());
    let update = compiler.compile(&fastswan::Database::default());
    table.apply(&update).expect("an empty table has room");
    println!("compiled");
}
"#;

#[test]
fn the_packaged_crate_builds_without_ebpf_tools_and_loads_its_program() {
    if !lab::require_root("loading the packaged program") {
        return;
    }
    let folder = packaged("default");
    let output = run_program(&folder, MAIN, "");
    assert!(output.trim().ends_with(" instructions"), "{output}");
}

#[test]
fn the_packaged_crate_without_features_decides_without_io() {
    let folder = packaged("core");
    let output = run_program(&folder, CORE_MAIN, ", default-features = false");
    assert_eq!(output.trim(), "compiled");
    let tree = ["tree", "--offline", "--edges", "normal", "--prefix", "none"];
    let tree = run(cargo(&folder.join("scratch")).args(tree));
    for name in ["tokio ", "aya ", "netlink-"] {
        assert!(!tree.contains(name), "it depends on {name}:\n{tree}");
    }
}

#[test]
fn the_packaged_readme_is_whole_outside_the_repository() {
    let folder = packaged("readme");
    for name in ["fastswan-ebpf", "fastswan"] {
        let package = folder.join(format!("scratch/{name}-{}", env!("CARGO_PKG_VERSION")));
        let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
        assert!(manifest.contains("readme = \"README.md\""), "{name} names no README of its own");
        let readme = fs::read_to_string(package.join("README.md")).unwrap();
        let links: Vec<&str> = readme.split("](").skip(1).filter_map(|link| link.split(')').next()).collect();
        assert!(!links.is_empty(), "{name}");
        for link in links {
            assert!(link.starts_with("https://"), "{name}: {link} leads nowhere outside the repository");
        }
    }
}

/// Packs the crates, and unpacks them into `scratch` in the folder that is returned.
fn packaged(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package").join(name);
    let _ = fs::remove_dir_all(folder.join("scratch"));
    fs::create_dir_all(folder.join("scratch/src")).unwrap();
    let packaged = ["fastswan-ebpf", "fastswan"].map(|name| format!("--package={name}"));
    run(cargo(&workspace())
        .args(["package", "--offline", "--no-verify", "--allow-dirty", "--target-dir"])
        .arg(&folder)
        .args(packaged));
    for name in ["fastswan-ebpf", "fastswan"] {
        let archive = folder.join(format!("package/{name}-{}.crate", env!("CARGO_PKG_VERSION")));
        // With the time of now, or cargo would not notice that they have changed since the last test.
        run(Command::new("tar").arg("xzmf").arg(archive).arg("-C").arg(folder.join("scratch")));
    }
    folder
}

/// Builds and runs a program that depends on the unpacked crate.
fn run_program(folder: &Path, main: &str, options: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let manifest = format!(
        "[package]\nname = \"scratch\"\nedition = \"2024\"\n\n\
         [dependencies]\nfastswan = {{ path = \"fastswan-{version}\"{options} }}\n\n\
         [patch.crates-io]\nfastswan-ebpf = {{ path = \"fastswan-ebpf-{version}\" }}\n\n[workspace]\n"
    );
    let scratch = folder.join("scratch");
    fs::write(scratch.join("Cargo.toml"), manifest).unwrap();
    fs::write(scratch.join("src/main.rs"), main).unwrap();
    fs::copy(workspace().join("Cargo.lock"), scratch.join("Cargo.lock")).unwrap();
    run(cargo(&scratch)
        .args(["run", "--offline", "--quiet", "--target-dir"])
        .arg(folder.join("target"))
        .env("PATH", path_without_ebpf_tools()))
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The toolchain's own folder and the system's.
fn path_without_ebpf_tools() -> String {
    let sysroot = run(Command::new("rustc").args(["--print", "sysroot"]));
    let path = [PathBuf::from(sysroot.trim()).join("bin"), "/usr/bin".into(), "/bin".into()];
    for folder in &path {
        assert!(!folder.join("bpf-linker").exists(), "{} has bpf-linker", folder.display());
    }
    env::join_paths(path).unwrap().into_string().unwrap()
}

fn cargo(folder: &Path) -> Command {
    let mut command = Command::new(env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.current_dir(folder);
    command
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{error}");
    String::from_utf8(output.stdout).unwrap()
}
