//! From generated tokens to text, in the request's own task.

pub mod stop;
pub mod stream;
