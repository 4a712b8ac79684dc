//! What operators look at: metrics against their reference.

mod families;
mod reference;
mod series;
