//! Watches how much of the worker's GPU is used, for its gauges; on a thread of its own, since the library that says so
//! may take its time, or never answer about a device that is broken.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::backend::cuda::sys::nvml::{LIBRARY, Nvml, NvmlError, uuid};
use crate::metrics::Metrics;

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// Watches that GPU of the visible ones for as long as there are `metrics`.
pub fn watch(ordinal: u32, metrics: &Arc<Metrics>) {
    let metrics = Arc::downgrade(metrics);
    let body = move || match uuid(ordinal).map_err(NvmlError::from) {
        Ok(uuid) => look(ordinal, uuid, &metrics),
        Err(error) => tracing::info!(%error, "the GPU has no gauges"),
    };
    let thread = std::thread::Builder::new().name("gpu-usage".to_owned()).spawn(body);
    if let Err(error) = thread {
        tracing::warn!(%error, "the GPU has no gauges: no thread");
    }
}

fn look(ordinal: u32, uuid: [u8; 16], metrics: &Weak<Metrics>) {
    let gpu = match Nvml::open(LIBRARY, uuid) {
        Ok(gpu) => gpu,
        Err(error) => return tracing::info!(%error, "the GPU has no gauges"),
    };
    while let Some(metrics) = metrics.upgrade() {
        match gpu.usage() {
            Ok(usage) => metrics.gpu(ordinal, Some(&usage)),
            Err(error) => {
                metrics.gpu(ordinal, None);
                return tracing::warn!(%error, "the gauges of the GPU are followed no more");
            }
        }
        drop(metrics);
        std::thread::sleep(EVERY);
    }
}
