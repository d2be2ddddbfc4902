//! stub
pub(crate) fn run() -> anyhow::Result<()> {
    anyhow::bail!("")
}
