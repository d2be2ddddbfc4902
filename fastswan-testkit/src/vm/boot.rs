//! A guest runs one command, in a folder that it shares with the host.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use super::{Image, VmError, last_lines, remove_file};

/// What a guest may take beside the time that its command may take: emulated machines start slowly.
const BOOT_TIME: Duration = Duration::from_secs(120);
/// What `setpriv` ends with if there is no program of that name.
const NO_SUCH_PROGRAM: i32 = 127;
/// How often it is booted until it starts.
const ATTEMPTS: u32 = 3;

/// Lines of a console that are shown if a guest does not come to its end: from its kernel's first complaint on.
const TRACE: usize = 80;
/// The same, the last ones, if there is no complaint.
const SILENT_TRACE: usize = 30;

/// What a kernel says last that runs into a breakpoint which nobody has set.
const STALE_BREAKPOINT: &str = "Oops: int3";

/// An emulated CPU may not run for seconds on a busy machine, which is no stall of the guest's.
const BOOT_OPTIONS: &str =
    "console=ttyS0 panic=-1 quiet rdinit=/init rcupdate.rcu_cpu_stall_timeout=100 watchdog_thresh=50";

/// What the kernel says when something is wrong with it.
const COMPLAINTS: [&str; 10] = [
    "BUG:",
    "Call Trace",
    "Kernel panic",
    "Oops",
    "WARNING:",
    "lockup",
    "memory leak",
    "refcount_t",
    "unregister_netdevice: waiting",
    "self-detected stall",
];

/// A guest to be.
#[derive(Debug)]
pub struct Guest<'a> {
    image: &'a Image,
    folder: PathBuf,
    /// How often it was booted.
    boots: u32,
}

/// What became of a command in a guest.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its exit code.
    pub status: i32,
    /// What it printed.
    pub output: String,
    /// Lines of the kernel's log that tell of a fault.
    pub complaints: Vec<String>,
    /// The whole time, from power on to power off.
    pub took: Duration,
}

impl<'a> Guest<'a> {
    /// A guest that sees `folder` as `/host`, in which these programs of the host are.
    ///
    /// # Errors
    ///
    /// [`VmError::System`] if a program cannot be copied.
    pub fn new(image: &'a Image, folder: PathBuf, programs: &[&Path]) -> Result<Self, VmError> {
        for program in programs {
            let copy = folder.join(program.file_name().unwrap_or_default());
            fs::copy(program, &copy).map_err(VmError::system(format!("copying {}", program.display())))?;
        }
        Ok(Self { image, folder, boots: 0 })
    }

    /// Boots it, runs a command of the shell in `/host`, and powers it off. Each line that the guest appends to
    /// `results` in the folder is handed to `progress` soon. The command may take `limit`. The console of the first boot
    /// is `console-1`, and so on.
    ///
    /// # Errors
    ///
    /// [`VmError::Guest`] if the guest does not come to its end, [`VmError::Missing`] without QEMU.
    pub fn run(
        &mut self,
        command: &str,
        limit: Duration,
        mut progress: impl FnMut(&str),
    ) -> Result<Run, VmError> {
        let folder = self.folder.clone();
        let path = |name: &str| folder.join(name);
        for left in ["results", "output", "status", "dmesg"] {
            remove_file(&path(left))?;
        }
        let script = path("run");
        fs::write(&script, format!("cd /host\nexec {command}\n"))
            .map_err(VmError::system(format!("writing {}", script.display())))?;
        let mut start = Instant::now();
        let (mut machine, mut console) = self.start()?;
        let mut attempts = 1;
        let mut results = Results { path: path("results"), read: 0, rest: String::new() };
        let ended = loop {
            let ended = machine.try_wait().map_err(VmError::system("waiting for QEMU"))?;
            results.follow(&mut progress);
            // Other CPUs may run what is left of an instruction that the kernel has patched: QEMU 7.2 is not always right
            // about that, and then the kernel hangs or stops before it has run anything of ours.
            let is_stuck =
                ended.map_or(start.elapsed() > BOOT_TIME, |status| status.code() != Some(NO_SUCH_PROGRAM));
            if is_stuck && attempts < ATTEMPTS && !path("output").exists() {
                eprintln!("the guest with Linux {} has not started: once more", self.image.kernel.name());
                end(&mut machine);
                attempts += 1;
                start = Instant::now();
                (machine, console) = self.start()?;
                continue;
            }
            match ended {
                Some(status) => break Some(status),
                None if start.elapsed() > limit + BOOT_TIME => break None,
                None => sleep(Duration::from_millis(50)),
            }
        };
        let failed = |what: String| {
            let console = fs::read(&console).unwrap_or_default();
            let console = String::from_utf8_lossy(&console);
            let stale_breakpoint = console.contains(STALE_BREAKPOINT);
            let console = trace(&console);
            VmError::Guest { kernel: self.image.kernel, what, console, stale_breakpoint }
        };
        let Some(ended) = ended else {
            end(&mut machine);
            return Err(failed(format!("did not end within {} s", (limit + BOOT_TIME).as_secs())));
        };
        if ended.code() == Some(NO_SUCH_PROGRAM) {
            let (program, package) = ("qemu-system-x86_64", "qemu-system-x86");
            return Err(VmError::Missing { program, package, error: std::io::ErrorKind::NotFound.into() });
        }
        let status = fs::read_to_string(path("status")).ok().and_then(|status| status.trim().parse().ok());
        let Some(status) = status else { return Err(failed(format!("ended early ({ended})"))) };
        let log = fs::read(path("dmesg")).unwrap_or_default();
        Ok(Run {
            status,
            output: String::from_utf8_lossy(&fs::read(path("output")).unwrap_or_default()).into_owned(),
            complaints: complaints(&String::from_utf8_lossy(&log)),
            took: start.elapsed(),
        })
    }

    /// Starts the machine, with a console of its own.
    fn start(&mut self) -> Result<(Child, PathBuf), VmError> {
        self.boots += 1;
        let console = self.folder.join(format!("console-{}", self.boots));
        let log = File::create(&console).map_err(VmError::system(format!("making {}", console.display())))?;
        // Should this process die, so does the guest.
        let machine = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1500"])
            .args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.image.vmlinuz)
            .arg("-initrd")
            .arg(&self.image.initrd)
            .args(["-append", BOOT_OPTIONS])
            .arg("-virtfs")
            .arg(format!("local,path={},mount_tag=host,security_model=none", self.folder.display()))
            .stdin(Stdio::null())
            .stderr(log.try_clone().map_err(VmError::system("sharing the console"))?)
            .stdout(log)
            .spawn()
            .map_err(|error| VmError::Missing { program: "setpriv", package: "util-linux", error })?;
        Ok((machine, console))
    }
}

fn end(machine: &mut Child) {
    let _ = machine.kill();
    let _ = machine.wait();
}

/// Lines that the guest appends to a file.
struct Results {
    path: PathBuf,
    read: u64,
    /// The beginning of a line that is not complete.
    rest: String,
}

impl Results {
    fn follow(&mut self, progress: &mut impl FnMut(&str)) {
        let Ok(mut file) = File::open(&self.path) else { return };
        let mut new = Vec::new();
        if file.seek(SeekFrom::Start(self.read)).and_then(|_| file.read_to_end(&mut new)).is_err() {
            return;
        }
        self.read += new.len() as u64;
        self.rest.push_str(&String::from_utf8_lossy(&new));
        while let Some((line, rest)) = self.rest.split_once('\n') {
            progress(line);
            self.rest = rest.to_owned();
        }
    }
}

/// Lines that tell of a fault.
fn complaints(log: &str) -> Vec<String> {
    log.lines().filter(|line| complains(line)).map(str::to_owned).collect()
}

fn complains(line: &str) -> bool {
    COMPLAINTS.iter().any(|complaint| line.contains(complaint))
}

/// What a console says from the first line on that tells of a fault, or the last that it says.
fn trace(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    match lines.iter().position(|line| complains(line)) {
        Some(first) => lines[first..].iter().take(TRACE).copied().collect::<Vec<_>>().join("\n"),
        None => last_lines(console, SILENT_TRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_the_kernel_are_found_in_its_log() {
        let log = "[    1.0] Linux version 6.12\n[    2.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1\n\
                   [    3.0] testnic: loading out-of-tree module taints kernel.";
        assert_eq!(complaints(log), ["[    2.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1"]);
    }

    #[test]
    fn the_trace_of_a_kernel_that_dies_is_shown_from_its_beginning() {
        let before = "GUEST up after 7 s\n".repeat(50);
        let after = " ? do_syscall_64+0x82/0x190\n".repeat(50);
        let shown = trace(&format!("{before}Kernel panic - not syncing: on purpose\n{after}"));
        assert_eq!(shown.lines().count(), 51);
        assert!(shown.starts_with("Kernel panic - not syncing: on purpose"), "{shown}");
        assert_eq!(trace(&before).lines().count(), SILENT_TRACE);
    }

    #[test]
    fn lines_are_told_once_they_are_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results");
        let mut results = Results { path: path.clone(), read: 0, rest: String::new() };
        let mut told = Vec::new();
        for content in ["", "one\ntw", "one\ntwo\nthree\n"] {
            fs::write(&path, content).unwrap();
            results.follow(&mut |line: &str| told.push(line.to_owned()));
        }
        assert_eq!(told, ["one", "two", "three"]);
    }
}
