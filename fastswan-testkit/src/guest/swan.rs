//! strongSwan in one gateway, driven with `swanctl`.

use std::{
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child as Process, Command},
};

use anyhow::{Context as _, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::wait_for;
use crate::lab::Namespace;

const CHARON: &str = "/usr/lib/ipsec/charon";

/// What is negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// This gateway's address, and the other's.
    pub outer: (&'a str, &'a str),
    /// Its tunnels.
    pub children: &'a [Child<'a>],
}

/// A tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Child<'a> {
    /// What it is called.
    pub name: &'a str,
    /// The networks at this end and at the other.
    pub inner: (&'a str, &'a str),
    /// `tunnel` or `transport`.
    pub mode: &'a str,
    /// ESP proposal.
    pub proposal: &'a str,
}

impl<'a> Child<'a> {
    /// A tunnel between two networks, called `net`.
    #[must_use]
    pub fn between(here: &'a str, there: &'a str) -> Self {
        Self { name: "net", inner: (here, there), mode: "tunnel", proposal: "aes128gcm16" }
    }

    /// The same at the other end.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { inner: (self.inner.1, self.inner.0), ..self }
    }
}

/// A charon.
#[derive(Debug)]
pub struct Swan {
    namespace: String,
    folder: PathBuf,
    socket: PathBuf,
    process: Process,
}

impl Swan {
    /// Starts charon in a gateway and gives it a connection. `offload` lets it offload packets to the NIC. Logs go into
    /// a folder of this name in `logs`.
    ///
    /// # Errors
    ///
    /// If it does not start, or does not take the connection.
    pub fn start(
        gateway: &Namespace,
        name: &str,
        connection: Connection<'_>,
        offload: bool,
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let folder = logs.join(name);
        fs::create_dir_all(&folder)?;
        let socket = std::env::temp_dir().join(format!("{}-{name}.vici", std::process::id()));
        fs::write(folder.join("strongswan.conf"), settings(&folder, &socket))?;
        fs::write(folder.join("swanctl.conf"), connections(connection, offload))?;
        let process = start(gateway, &folder)?;
        let swan = Self { namespace: gateway.name().to_owned(), folder, socket, process };
        swan.load()?;
        Ok(swan)
    }

    /// Starts charon again after [`Self::kill`].
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn restart(&mut self, gateway: &Namespace) -> anyhow::Result<()> {
        let _ = fs::remove_file(&self.socket);
        self.process = start(gateway, &self.folder)?;
        self.load()
    }

    /// Kills charon, which has no time to clean up.
    ///
    /// # Errors
    ///
    /// If it is gone already.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Runs swanctl.
    ///
    /// # Errors
    ///
    /// With what it said, if it failed.
    pub fn swanctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new("swanctl")
            .args(arguments)
            .args(["--uri", &format!("unix://{}", self.socket.display())])
            .env("STRONGSWAN_CONF", self.folder.join("strongswan.conf"))
            .env("SWANCTL_DIR", &self.folder)
            .output()
            .context("running swanctl")?;
        let said = [output.stdout, output.stderr].concat();
        // It always names the plugins that it does not find, and charon has built in.
        let said: Vec<String> = String::from_utf8_lossy(&said)
            .lines()
            .filter(|line| !line.starts_with("plugin '"))
            .map(str::to_owned)
            .collect();
        let said = said[said.len().saturating_sub(8)..].join("; ");
        ensure!(output.status.success(), "swanctl {} in {}: {said}", arguments.join(" "), self.namespace);
        Ok(said)
    }

    /// Brings a tunnel up.
    ///
    /// # Errors
    ///
    /// As for [`Self::swanctl`].
    pub fn initiate(&self, child: &str) -> anyhow::Result<()> {
        self.swanctl(&["--initiate", "--child", child]).map(drop)
    }

    fn load(&self) -> anyhow::Result<()> {
        let file = self.folder.join("swanctl.conf");
        let mut result = Err(anyhow::anyhow!("there is no {}", self.socket.display()));
        // There is a socket before anybody listens to it.
        let _ = wait_for("charon to listen", || {
            if self.socket.exists() {
                result = self.swanctl(&["--load-all", "--file", &file.to_string_lossy()]);
            }
            result.is_ok()
        });
        result.map(drop)
    }
}

impl Drop for Swan {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id().cast_signed()), Signal::SIGTERM);
        let process = &mut self.process;
        let _ = wait_for("charon's end", || process.try_wait().is_ok_and(|ended| ended.is_some()));
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// Each charon has a /run of its own, in which it keeps its number.
fn start(gateway: &Namespace, folder: &Path) -> anyhow::Result<Process> {
    let log = File::options().create(true).append(true).open(folder.join("output"))?;
    gateway.enter(|| {
        unshare(CloneFlags::CLONE_NEWNS).context("leaving the mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
        Command::new(CHARON)
            .env("STRONGSWAN_CONF", folder.join("strongswan.conf"))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {CHARON}"))
    })
}

fn settings(folder: &Path, socket: &Path) -> String {
    format!(
        "charon {{
  load_modular = yes
  plugins {{
    include /etc/strongswan.d/charon/*.conf
    vici {{
      socket = unix://{socket}
    }}
    bypass-lan {{
      load = no
    }}
  }}
  filelog {{
    log {{
      path = {log}
      default = 1
      knl = 2
      cfg = 1
      time_format = %H:%M:%S
      time_add_ms = yes
      flush_line = yes
      append = yes
    }}
  }}
}}
",
        socket = socket.display(),
        log = folder.join("log").display()
    )
}

fn connections(connection: Connection<'_>, offload: bool) -> String {
    let Connection { outer: (here, there), children } = connection;
    let hw_offload = if offload { "packet" } else { "no" };
    let mut text = format!(
        "connections {{
  gateway {{
    version = 2
    local_addrs = {here}
    remote_addrs = {there}
    proposals = aes128gcm16-prfsha256-x25519
    mobike = no
    local {{
      auth = psk
      id = \"{here}\"
    }}
    remote {{
      auth = psk
      id = \"{there}\"
    }}
    children {{
"
    );
    for Child { name, inner: (here, there), mode, proposal } in children {
        let _ = write!(
            text,
            "      {name} {{
        local_ts = {here}
        remote_ts = {there}
        esp_proposals = {proposal}
        mode = {mode}
        hw_offload = {hw_offload}
        rekey_time = 0
      }}
"
        );
    }
    text + "    }\n  }\n}\nsecrets {\n  ike {\n    secret = \"known to everybody\"\n  }\n}\n"
}
