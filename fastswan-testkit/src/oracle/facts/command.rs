//! What changes the host: commands, written as one would type them.

use std::{
    fmt, fs,
    io::Write as _,
    process::{Command as Process, Stdio},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use super::world::{Device, Wires, World};

/// Stands for the name of the namespace that the far ends of the wires are in.
pub(super) const FAR: &str = "FAR";

/// One change of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Arguments of `ip`; the word [`FAR`] is the namespace of the far ends.
    Ip(String),
    /// Arguments of `ip -6`, for commands that name no address.
    Ip6(String),
    /// Arguments of `tc`.
    Tc(String),
    /// A line of `nft`.
    Nft(String),
    /// Another program and its arguments.
    Other(String),
    /// A sysctl below `net`, with slashes, and its value.
    Sysctl(String, String),
    /// Arguments of `ip` at the far ends of the wires.
    Far(String),
    /// A frame that arrives at a device, and what it is.
    Frame(Device, Vec<u8>, String),
    /// Nothing for so long.
    Wait(Duration),
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(text) => write!(f, "ip {text}"),
            Self::Ip6(text) => write!(f, "ip -6 {text}"),
            Self::Tc(text) => write!(f, "tc {text}"),
            Self::Nft(text) => write!(f, "nft '{text}'"),
            Self::Other(text) => f.write_str(text),
            Self::Sysctl(key, value) => write!(f, "sysctl -w net/{key}={value}"),
            Self::Far(text) => write!(f, "(far end) ip {text}"),
            Self::Frame(device, _, what) => write!(f, "({what} arrives at {})", device.name()),
            Self::Wait(time) => write!(f, "sleep {}", time.as_secs_f64()),
        }
    }
}

/// `ip`, with an address or a family in the arguments.
pub(super) fn ip(text: impl Into<String>) -> Command {
    Command::Ip(text.into())
}

/// `ip` or `ip -6`.
pub(super) fn ip_of(v6: bool, text: impl Into<String>) -> Command {
    if v6 { Command::Ip6(text.into()) } else { Command::Ip(text.into()) }
}

/// Another program.
pub(super) fn other(text: impl Into<String>) -> Command {
    Command::Other(text.into())
}

/// `sysctl`, below `net`.
pub(super) fn sysctl(key: impl Into<String>, value: impl Into<String>) -> Command {
    Command::Sysctl(key.into(), value.into())
}

/// The end of a wire goes up or down. Of ordinary devices the kernel takes note of that once a second
/// (`linkwatch_schedule_work`), and what is sent until then is lost at the device, whoever sends it.
pub(super) fn carrier(device: Device, is_up: bool) -> [Command; 2] {
    let state = if is_up { "up" } else { "down" };
    let far = Command::Far(format!("link set {} {state}", device.far_end()));
    [far, Command::Wait(Duration::from_millis(1100))]
}

/// Runs commands, on a thread that is on the gateway. Without `is_strict`, what fails is left out.
pub(super) fn run(
    world: &World,
    wires: &mut Wires,
    commands: &[Command],
    is_strict: bool,
) -> anyhow::Result<()> {
    let mut rest = commands;
    while let Some(first) = rest.first() {
        // Neighbours in the list of one kind are one process.
        let kind = std::mem::discriminant(first);
        let length = rest.iter().take_while(|command| std::mem::discriminant(*command) == kind).count();
        let (batch, others) = rest.split_at(length);
        rest = others;
        let lines = |batch: &[Command]| {
            let line = |command: &Command| match command {
                Command::Ip(text)
                | Command::Ip6(text)
                | Command::Tc(text)
                | Command::Nft(text)
                | Command::Far(text) => format!("{text}\n"),
                _ => String::new(),
            };
            batch.iter().map(line).collect::<String>()
        };
        let (gateway, far) = (world.gateway.name(), world.far.name());
        let result = match first {
            Command::Ip(_) => feed("ip", &["-n", gateway], &lines(batch).replace(FAR, far), is_strict),
            Command::Ip6(_) => feed("ip", &["-6", "-n", gateway], &lines(batch), is_strict),
            Command::Tc(_) => feed("tc", &["-n", gateway], &lines(batch), is_strict),
            Command::Far(_) => feed("ip", &["-n", far], &lines(batch), is_strict),
            Command::Nft(_) => pipe("nft", &["-f", "-"], &lines(batch)),
            _ => batch.iter().try_for_each(|command| run_one(wires, command)),
        };
        if is_strict {
            result?;
        }
    }
    Ok(())
}

fn run_one(wires: &mut Wires, command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Sysctl(key, value) => {
            fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| command.to_string())?;
        }
        Command::Other(text) => {
            let mut words = text.split_whitespace();
            let program = words.next().context("a program")?;
            pipe(program, &words.collect::<Vec<_>>(), "")?;
        }
        Command::Frame(device, frame, _) => drop(wires.send(*device, frame)?),
        Command::Wait(time) => sleep(*time),
        _ => {}
    }
    Ok(())
}

/// Gives lines to `ip` or `tc`.
fn feed(program: &str, options: &[&str], lines: &str, is_strict: bool) -> anyhow::Result<()> {
    let mut arguments = options.to_vec();
    if !is_strict {
        arguments.push("-force");
    }
    arguments.extend(["-batch", "-"]);
    pipe(program, &arguments, lines)
}

fn pipe(program: &str, arguments: &[&str], lines: &str) -> anyhow::Result<()> {
    let mut child = Process::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    // Dropped at once, which ends the input. A program that does not want it says why.
    let _ = child.stdin.take().context("a pipe")?.write_all(lines.as_bytes());
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{}: {}",
        lines.trim().replace('\n', "; "),
        String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ")
    );
    Ok(())
}
