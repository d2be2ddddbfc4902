//! What a guest boots: a kernel and an initial RAM disk that holds everything else.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{
    Kernel, VmError, create_folder, remove_folder, run,
    trees::{Tree, link},
};

/// Kernel modules that guests load, each with those that it needs.
const MODULES: [&str; 35] = [
    "8021q",
    "9p",
    "9pnet_virtio",
    "act_gact",
    "act_mirred",
    "aesni_intel",
    "bonding",
    "bridge",
    "cls_bpf",
    "cls_flower",
    "cls_u32",
    "dummy",
    "echainiv",
    "esp4",
    "esp4_offload",
    "esp6",
    "esp6_offload",
    "gcm",
    "ip_vs_rr",
    "ipvlan",
    "macvlan",
    "nf_flow_table_inet",
    "nf_tables",
    "nfnetlink_hook",
    "nft_chain_nat",
    "nft_ct",
    "nft_flow_offload",
    "nft_masq",
    "nft_reject_inet",
    "sch_ingress",
    "seqiv",
    "veth",
    "vrf",
    "xfrm_interface",
    "xfrm_user",
];

/// Modules that not all kernels have: in later ones they are part of others.
const OLDER_MODULES: [&str; 1] = ["ghash_generic"];

/// What is not needed in a guest, and large.
const LEFT_OUT: [&str; 12] = [
    "usr/include",
    "usr/lib/modules",
    "usr/lib/systemd",
    "usr/share/bash-completion",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/zoneinfo",
    "usr/src",
    "var/cache/apt",
    "var/lib/apt",
];

/// A kernel and its initial RAM disk.
#[derive(Clone, Debug)]
pub struct Image {
    /// Which kernel.
    pub kernel: Kernel,
    /// Its full version, as `uname -r` prints it.
    pub version: String,
    pub(super) vmlinuz: PathBuf,
    pub(super) initrd: PathBuf,
}

impl Image {
    pub(super) fn build(folder: &Path, kernel: Kernel) -> Result<Self, VmError> {
        let root = Tree::of_root(folder)?;
        let tree = Tree::of_kernel(folder, kernel)?;
        let version = tree.kernel_version()?;
        let finished = folder.join("images").join(kernel.name());
        let image = |folder: &Path| Self {
            kernel,
            version: version.clone(),
            vmlinuz: folder.join("vmlinuz"),
            initrd: folder.join("initrd"),
        };
        let sources = [nic_sources(), testkit().join("vm/init"), testkit().join("src/vm")];
        let made_of = digest_of_folders(&sources)?;
        let made_of = format!("{} {} {version} {MODULES:?} {LEFT_OUT:?} {made_of:x}", root.stamp, tree.stamp);
        let stamp =
            |image: &Self| Ok(format!("{made_of} {:x}", digest_of_files(&[&image.vmlinuz, &image.initrd])?));
        let cached = image(&finished);
        let is_current = |stamp: Result<String, VmError>| {
            stamp.is_ok_and(|stamp| fs::read_to_string(finished.join("stamp")).is_ok_and(|old| old == stamp))
        };
        if is_current(stamp(&cached)) {
            return Ok(cached);
        }

        eprintln!("building the image with Linux {version}");
        let unfinished = folder.join("images").join(format!("{kernel}.new"));
        remove_folder(&unfinished)?;
        create_folder(&unfinished)?;
        let built = image(&unfinished);
        copy(&vmlinuz(&tree, &version)?, &built.vmlinuz)?;
        let added = unfinished.join("added");
        add_kernel_parts(&tree, &version, &added)?;
        write_archive(&[&root.folder, &added], &built.initrd)?;
        remove_folder(&added)?;
        let path = unfinished.join("stamp");
        fs::write(&path, stamp(&built)?).map_err(VmError::system(format!("writing {}", path.display())))?;
        remove_folder(&finished)?;
        fs::rename(&unfinished, &finished)
            .map_err(VmError::system(format!("renaming {}", unfinished.display())))?;
        Ok(cached)
    }
}

/// Files that the root file system does not have: the guest's first process, modules, mount points.
fn add_kernel_parts(tree: &Tree, version: &str, added: &Path) -> Result<(), VmError> {
    for name in ["dev", "host", "modules", "proc", "root", "run", "sys", "tmp", "usr/bin", "var"] {
        create_folder(&added.join(name))?;
    }
    let init = added.join("init");
    copy(&testkit().join("vm/init"), &init)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))
        .map_err(VmError::system(format!("making {} executable", init.display())))?;
    link("../run", &added.join("var/run"))?;
    // Tools that no package of the root has.
    for name in ["cat", "cut", "dmesg", "ls", "mkdir", "mount", "poweroff", "sleep", "sync", "umount"] {
        link("busybox", &added.join("usr/bin").join(name))?;
    }
    for (number, path) in modules(tree, version)?.iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        copy(
            &tree.folder.join(path.strip_prefix("/").unwrap_or(path)),
            &added.join(format!("modules/{number:03}-{name}")),
        )?;
    }
    build_nic(tree, version, &added.join("testnic.ko"))
}

/// Paths of [`MODULES`] and those that they need in a tree, in the order in which they can be loaded.
fn modules(tree: &Tree, version: &str) -> Result<Vec<PathBuf>, VmError> {
    let inside = |arguments: &[&str]| {
        let attempt = format!("running {} in {}", arguments.join(" "), tree.folder.display());
        run(&attempt, "coreutils", "chroot", Command::new("chroot").arg(&tree.folder).args(arguments))
    };
    inside(&["/usr/sbin/depmod", version])?;
    let mut paths: Vec<PathBuf> = Vec::new();
    let needed = |module| inside(&["/usr/sbin/modprobe", "--set-version", version, "--show-depends", module]);
    let older = OLDER_MODULES.into_iter().filter_map(|module| needed(module).ok());
    for needed in older.map(Ok).chain(MODULES.into_iter().map(needed)) {
        let needed = needed?;
        for path in needed.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            // Parameters may follow.
            let path = PathBuf::from(path.split_whitespace().next().unwrap_or_default());
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    Ok(paths)
}

/// Builds the test NIC with the compiler and the headers of a tree. A warning is an error.
fn build_nic(tree: &Tree, version: &str, module: &Path) -> Result<(), VmError> {
    let inside = Path::new("tmp/testnic");
    let folder = tree.folder.join(inside);
    remove_folder(&folder)?;
    create_folder(&folder)?;
    create_folder(&tree.folder.join("proc"))?;
    let sources = nic_sources();
    let attempt = || format!("reading {}", sources.display());
    for entry in fs::read_dir(&sources).map_err(VmError::system(attempt()))?.flatten() {
        copy(&entry.path(), &folder.join(entry.file_name()))?;
    }
    let mut command = Command::new("unshare");
    // objtool reads its limits from /proc.
    command
        .args(["--mount", "--pid", "--fork", "--mount-proc"])
        .arg(format!("--root={}", tree.folder.display()))
        .args(["make", "--silent", "--directory"])
        .arg(format!("/usr/src/linux-headers-{version}"))
        .arg(format!("M=/{}", inside.display()))
        .args(["CC=gcc-14", "HOSTCC=gcc-14", "KCFLAGS=-Werror", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"]);
    run(&format!("building the test NIC for Linux {version}"), "util-linux", "unshare", &mut command)?;
    copy(&folder.join("testnic.ko"), module)?;
    remove_folder(&folder)
}

/// Where Debian has put the kernel.
fn vmlinuz(tree: &Tree, version: &str) -> Result<PathBuf, VmError> {
    let places = [format!("boot/vmlinuz-{version}"), format!("usr/lib/modules/{version}/vmlinuz")];
    let found = places.iter().map(|place| tree.folder.join(place)).find(|path| path.exists());
    found.ok_or_else(|| VmError::Failed {
        attempt: format!("looking for Linux {version}"),
        message: format!("neither {} nor {} is in {}", places[0], places[1], tree.folder.display()),
    })
}

/// Writes the files of some folders into an archive that the kernel unpacks: cpio archives, one after the other.
fn write_archive(folders: &[&Path], archive: &Path) -> Result<(), VmError> {
    let attempt = format!("writing {}", archive.display());
    let mut file = File::create(archive).map_err(VmError::system(&attempt))?;
    for folder in folders {
        let mut names = Vec::new();
        list(folder, Path::new(""), &mut names).map_err(VmError::system(&attempt))?;
        let mut child = Command::new("cpio")
            .args(["--null", "--create", "--format=newc", "--quiet", "--owner=0:0"])
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(file.try_clone().map_err(VmError::system(&attempt))?)
            .spawn()
            .map_err(|error| VmError::Missing { program: "cpio", package: "cpio", error })?;
        let mut input = child.stdin.take();
        let written = input.as_mut().map_or(Ok(()), |input| input.write_all(&names));
        drop(input);
        let status = child.wait().map_err(VmError::system(&attempt))?;
        if !status.success() {
            return Err(VmError::Failed { attempt, message: format!("cpio: {status}") });
        }
        written.map_err(VmError::system(&attempt))?;
    }
    file.flush().map_err(VmError::system(&attempt))
}

/// The names of everything below a folder, each followed by a zero, without what is left out.
fn list(folder: &Path, inside: &Path, names: &mut Vec<u8>) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder.join(inside))?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = inside.join(entry.file_name());
        if LEFT_OUT.iter().any(|left_out| Path::new(left_out) == name) {
            continue;
        }
        names.extend(name.as_os_str().as_encoded_bytes());
        names.push(0);
        if entry.file_type()?.is_dir() {
            list(folder, &name, names)?;
        }
    }
    Ok(())
}

/// The source of the test NIC.
fn nic_sources() -> PathBuf {
    testkit().join("nic")
}

/// The folder of this package: images are built from a checkout.
fn testkit() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn digest_of_folders(paths: &[PathBuf]) -> Result<u64, VmError> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let attempt = format!("reading {}", path.display());
            let entries = fs::read_dir(path).map_err(VmError::system(attempt))?;
            files.extend(entries.flatten().map(|entry| entry.path()));
        } else {
            files.push(path.clone());
        }
    }
    files.sort();
    digest_of_files(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>())
}

/// Tells whether files are still the same. Another version of Rust may compute another digest, and then they are built
/// again.
fn digest_of_files(files: &[&Path]) -> Result<u64, VmError> {
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(file).map_err(VmError::system(format!("reading {}", file.display())))?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn copy(from: &Path, to: &Path) -> Result<(), VmError> {
    let attempt = || format!("copying {} to {}", from.display(), to.display());
    fs::copy(from, to).map(drop).map_err(VmError::system(attempt()))
}
