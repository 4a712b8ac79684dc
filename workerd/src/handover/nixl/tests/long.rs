//! Checks that take minutes or need root: `make test-long`.
