//! The units and packages in a real systemd: an operator's day, and what goes wrong in it. Each test boots one of its own; where that
//! needs what is not here (root, systemd) it is skipped.

mod changes;
mod failures;
mod host;
mod life;
mod load;
