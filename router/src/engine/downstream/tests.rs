//! Request bodies over real connections.
