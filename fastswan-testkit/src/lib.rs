//! Placeholder.
pub mod table_suite;
