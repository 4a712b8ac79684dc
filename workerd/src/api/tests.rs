//! The API over a real connection, with the engine on a fake back end.
