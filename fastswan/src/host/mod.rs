//! What the host does with addresses: links, routes, neighbours, sysctls.

/// Host facts.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {}
