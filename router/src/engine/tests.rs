//! The engine between a real client connection and scripted workers.
