//! End-to-end tests of the real binaries; a module a topic.

mod golden;
