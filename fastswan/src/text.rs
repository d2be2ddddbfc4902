//! Values that are serialized as they are displayed.

use std::fmt::Display;

use serde::Serializer;

pub(crate) fn text<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
