//! Unpacked Debian packages: for each kernel with the compiler that it was built with, and for the guests' root.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Kernel, VmError, create_folder, remove_folder, run};

const SUITE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// In a tree that is complete: what it was made of.
const STAMP: &str = ".complete";

/// What building a module takes besides kernel and headers: make and the compiler, and the programs that kbuild calls.
const BUILD_TOOLS: [&str; 10] =
    ["coreutils", "dash", "diffutils", "findutils", "gcc-14", "grep", "kmod", "make", "mawk", "sed"];

/// What runs in a guest.
const ROOT_PACKAGES: [&str; 12] = [
    "busybox-static",
    "dash",
    "iproute2",
    "iputils-ping",
    "ipvsadm",
    "kmod",
    "libc-bin",
    "libgcc-s1",
    "netbase",
    "nftables",
    "strongswan-charon",
    "strongswan-swanctl",
];

/// Unpacked packages, with the programs of the shell where they are looked for.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) folder: PathBuf,
    /// What it was made of.
    pub(super) stamp: String,
}

impl Tree {
    /// A kernel with its modules, headers and compiler.
    pub(super) fn of_kernel(folder: &Path, kernel: Kernel) -> Result<Self, VmError> {
        let (suites, from): (&[&str], _) = match kernel {
            Kernel::V6_12 => (&[SUITE], ""),
            Kernel::V7 => (&[SUITE, BACKPORTS], "/trixie-backports"),
        };
        let kernel_packages =
            ["linux-image-amd64", "linux-headers-amd64"].map(|name| format!("{name}{from}"));
        let packages = kernel_packages.into_iter().chain(BUILD_TOOLS.map(str::to_owned)).collect::<Vec<_>>();
        let links = [("dash", "usr/bin/sh"), ("mawk", "usr/bin/awk"), ("gcc-14", "usr/bin/gcc")];
        Self::unpack(&folder.join("trees").join(kernel.name()), suites, &packages, &links)
    }

    /// The guests' root file system, but for what belongs to a kernel.
    pub(super) fn of_root(folder: &Path) -> Result<Self, VmError> {
        let packages = ROOT_PACKAGES.map(str::to_owned);
        Self::unpack(&folder.join("trees/root"), &[SUITE], &packages, &[("dash", "usr/bin/sh")])
    }

    fn unpack(
        folder: &Path,
        suites: &[&str],
        packages: &[String],
        links: &[(&str, &str)],
    ) -> Result<Self, VmError> {
        let stamp = format!("{} of {}", packages.join(","), suites.join(","));
        let tree = Self { folder: folder.to_owned(), stamp };
        if fs::read_to_string(folder.join(STAMP)).is_ok_and(|stamp| stamp == tree.stamp) {
            return Ok(tree);
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(VmError::NotRoot);
        }
        eprintln!("unpacking packages into {}", folder.display());
        remove_folder(folder)?;
        let parent = folder.parent().unwrap_or(folder);
        create_folder(parent)?;
        let repository = repository()?;
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--quiet", "--variant=extract", "--keyring", KEYRING, "--include", &packages.join(",")])
            .arg(SUITE)
            .arg(folder)
            .args(suites.iter().map(|suite| format!("deb {repository} {suite} main")));
        run("unpacking Debian packages, which takes a network,", "mmdebstrap", "mmdebstrap", &mut command)?;
        // What the packages' scripts would have done.
        for name in ["bin", "sbin", "lib", "lib64"] {
            if !folder.join(name).exists() {
                link(&format!("usr/{name}"), &folder.join(name))?;
            }
        }
        for (target, name) in links {
            let path = folder.join(name);
            let _ = fs::remove_file(&path);
            link(target, &path)?;
        }
        let path = folder.join(STAMP);
        fs::write(&path, &tree.stamp).map_err(VmError::system(format!("writing {}", path.display())))?;
        Ok(tree)
    }

    /// The version of the kernel in it.
    pub(super) fn kernel_version(&self) -> Result<String, VmError> {
        let folder = self.folder.join("usr/lib/modules");
        let attempt = || format!("looking for a kernel in {}", folder.display());
        let mut entries = fs::read_dir(&folder).map_err(VmError::system(attempt()))?.flatten();
        let version = entries.next().and_then(|entry| entry.file_name().into_string().ok());
        version.ok_or_else(|| VmError::Failed { attempt: attempt(), message: "there is none".to_owned() })
    }
}

pub(super) fn link(target: &str, path: &Path) -> Result<(), VmError> {
    std::os::unix::fs::symlink(target, path).map_err(VmError::system(format!("linking {}", path.display())))
}

/// Where this machine gets Debian's packages from.
fn repository() -> Result<String, VmError> {
    let format = "$(REPO_URI)|$(LABEL)|$(COMPONENT)";
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", format, "Created-By: Packages"]);
    let targets = run("asking apt for its repositories", "apt", "apt-get", &mut command)?;
    debian_repository(&targets).map(str::to_owned).ok_or(VmError::NoRepository)
}

/// The first Debian repository of lines as `apt-get indextargets` prints them.
fn debian_repository(targets: &str) -> Option<&str> {
    targets.lines().find_map(|target| target.strip_suffix("|Debian|main"))
}

#[cfg(test)]
mod tests {
    use super::debian_repository;

    #[test]
    fn debians_own_repository_is_chosen_among_others() {
        let security = "http://one.example/debian-security|Debian-Security|main";
        let contrib = "http://two.example/debian|Debian|contrib";
        let other = "http://three.example/tools|Tools|main";
        let debian = "http://two.example/debian|Debian|main";
        let all = [security, contrib, other, debian].join("\n");
        assert_eq!(debian_repository(&all), Some("http://two.example/debian"));
        assert_eq!(debian_repository(&[security, contrib, other].join("\n")), None);
    }
}
