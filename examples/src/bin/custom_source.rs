//! An embedder's own [`PolicySource`]: here, policies that someone types on standard input.
//!
//! Each line is a source prefix and a destination prefix; a line that was there already takes the policy away.

use std::collections::BTreeSet;

use fastswan::{
    Gateway, HostFacts, MemoryTable, Policy, PolicyEvent, PolicyId, PolicySource, Selector, Snapshot,
    SourceError, policy::Direction, table::TableConfig,
};
use tokio::sync::mpsc::{Receiver, channel};

struct Typed {
    lines: Receiver<String>,
    told: bool,
    known: BTreeSet<String>,
}

#[async_trait::async_trait]
impl PolicySource for Typed {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        // The first event is everything that the source knows.
        if !std::mem::replace(&mut self.told, true) {
            return Ok(Some(PolicyEvent::Snapshot(Snapshot::default())));
        }
        while let Some(line) = self.lines.recv().await {
            let Some(id) = parse(&line) else { continue };
            return Ok(Some(if self.known.remove(&line) {
                PolicyEvent::PolicyRemoved(id)
            } else {
                self.known.insert(line);
                PolicyEvent::Policy(Policy::new(id))
            }));
        }
        Ok(None)
    }
}

fn parse(line: &str) -> Option<PolicyId> {
    let (source, destination) = line.split_once(' ')?;
    let selector = Selector::between(source.parse().ok()?, destination.parse().ok()?).ok()?;
    Some(PolicyId::new(Direction::Out, selector))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let (sender, lines) = channel(16);
    // Standard input has no asynchronous form that can be dropped; a thread reads it.
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    let source = Typed { lines, told: false, known: BTreeSet::new() };
    let table = MemoryTable::new(&TableConfig::default());
    let mut gateway = Gateway::new(source, table, HostFacts::default());
    gateway.run_until(std::future::pending()).await?;
    Ok(())
}
