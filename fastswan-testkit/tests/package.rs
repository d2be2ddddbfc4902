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

#[test]
fn the_packaged_crate_builds_without_ebpf_tools_and_loads_its_program() {
    if !lab::require_root("loading the packaged program") {
        return;
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
    let _ = fs::remove_dir_all(folder.join("scratch"));
    fs::create_dir_all(folder.join("scratch/src")).unwrap();

    let packaged = ["fastswan-ebpf", "fastswan"].map(|name| format!("--package={name}"));
    run(cargo(workspace)
        .args(["package", "--offline", "--no-verify", "--allow-dirty", "--target-dir"])
        .arg(&folder)
        .args(packaged));
    for name in ["fastswan-ebpf", "fastswan"] {
        let archive = folder.join(format!("package/{name}-{}.crate", env!("CARGO_PKG_VERSION")));
        // With the time of now, or cargo would not notice that they have changed since the last test.
        run(Command::new("tar").arg("xzmf").arg(archive).arg("-C").arg(folder.join("scratch")));
    }

    let version = env!("CARGO_PKG_VERSION");
    let manifest = format!(
        "[package]\nname = \"scratch\"\nedition = \"2024\"\n\n\
         [dependencies]\nfastswan = {{ path = \"fastswan-{version}\" }}\n\n\
         [patch.crates-io]\nfastswan-ebpf = {{ path = \"fastswan-ebpf-{version}\" }}\n\n[workspace]\n"
    );
    let scratch = folder.join("scratch");
    fs::write(scratch.join("Cargo.toml"), manifest).unwrap();
    fs::write(scratch.join("src/main.rs"), MAIN).unwrap();
    fs::copy(workspace.join("Cargo.lock"), scratch.join("Cargo.lock")).unwrap();
    let output = run(cargo(&scratch)
        .args(["run", "--offline", "--quiet", "--target-dir"])
        .arg(folder.join("target"))
        .env("PATH", path_without_ebpf_tools()));
    assert!(output.trim().ends_with(" instructions"), "{output}");
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
