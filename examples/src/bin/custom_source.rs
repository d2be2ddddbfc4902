//! An embedder's own [`PolicySource`]: tunnels come and go by lines on stdin. It fills a [`MemoryTable`], so it
//! needs no privilege:
//!
//! `printf '+10.2.0.0/16\n+10.3.0.0/16\n-10.2.0.0/16\n' | cargo run --bin custom_source`

use fastswan::{
    Compiler, Database, HostFacts, MemoryTable, OffloadTable as _, PolicyEvent, PolicySource, Selector,
    SourceError, StaticSource,
    policy::{Egress, NextHop},
    source::fixed::StaticPolicy,
    table::{ReadBack as _, TableConfig},
};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines, Stdin};

/// `+PREFIX` opens a tunnel from 10.1.0.0/16 to the prefix, `-PREFIX` closes it.
struct Tunnels {
    lines: Lines<BufReader<Stdin>>,
    open: Vec<StaticPolicy>,
}

#[async_trait::async_trait]
impl PolicySource for Tunnels {
    async fn next_event(&mut self) -> Result<Option<PolicyEvent>, SourceError> {
        let attempt = || "reading stdin".to_owned();
        let line = self.lines.next_line().await;
        let line = line.map_err(|error| SourceError::System { attempt: attempt(), error, remedy: "" })?;
        let Some(line) = line else { return Ok(None) };
        match (line.get(..1), line.get(1..).and_then(tunnel)) {
            (Some("+"), Some(tunnel)) => self.open.push(tunnel),
            (Some("-"), Some(tunnel)) => self.open.retain(|open| *open != tunnel),
            _ => eprintln!("not understood: {line}"),
        }
        // A source may say everything at any time; one with many policies says what has changed.
        StaticSource::new(&self.open).next_event().await
    }

    fn caught_up(&mut self) -> Result<bool, SourceError> {
        // A line counts from when it has come in.
        Ok(!self.lines.get_ref().buffer().contains(&b'\n'))
    }
}

fn tunnel(destination: &str) -> Option<StaticPolicy> {
    let selector = Selector::between("10.1.0.0/16".parse().ok()?, destination.parse().ok()?).ok()?;
    let egress = Egress { next_hop: NextHop::Device, max_length: Some(1400) };
    let ends = ("192.0.2.1".parse().ok()?, "192.0.2.2".parse().ok()?);
    Some(StaticPolicy::new(selector, 7, ends.0, ends.1).egress(egress))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut source = Tunnels { lines: BufReader::new(tokio::io::stdin()).lines(), open: Vec::new() };
    let mut table =
        MemoryTable::new(&TableConfig { cells_v4: 1024, cells_v6: 1024, exceptions: 64, slots: 64 });
    let (mut database, mut compiler) = (Database::default(), Compiler::new(table.capacity()));
    // This embedder answers for its routes itself.
    compiler.set_host(&HostFacts::vouched());
    while let Some(event) = source.next_event().await? {
        database.apply(event);
        table.apply(&compiler.compile(&database))?;
        println!("{} fast policies", compiler.fast_policies(&database));
        println!("  10.1.0.5 to 10.2.0.9: {:?}", table.verdict("10.1.0.5".parse()?, "10.2.0.9".parse()?));
    }
    Ok(())
}
