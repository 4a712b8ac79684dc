//! Pools in a GPU's memory, in one process and between two: ignored unless asked for, as most machines have none.

use super::pulls::hand_over;
use super::workers::{IN_DEVICE_MEMORY, device_memory};
use super::*;
use crate::backend::cuda::sys::driver;
use crate::handover::conformance::{Bench, suite};

/// UCX's choice without its copies between devices: all bytes go through sockets.
const THROUGH_SOCKETS: (&str, &str) = ("UCX_TLS", "tcp,self,cuda_copy");

fn look_for_a_gpu() {
    assert_ne!(driver::count().unwrap(), 0, "no GPU is visible");
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_nixl_conforms_over_device_memory() {
    look_for_a_gpu();
    for variables in [&[][..], &[THROUGH_SOCKETS]] {
        alone("devices::child_conforms", variables);
    }
}

/// Agents of one process: UCX has no direct copies between its devices' memory there.
#[test]
#[ignore = "needs a process of its own"]
fn child_conforms() {
    let (library, settings) = (library(), NixlSettings::default());
    let host = |bytes| Region::host(bytes).unwrap();
    let kinds: [(&str, &dyn Fn(usize) -> Region); 2] =
        [("host", &host), ("device", &device_memory)];
    for (near, far) in [(1, 1), (1, 0), (0, 1)] {
        let ((near_name, near), (far_name, far)) = (kinds[near], kinds[far]);
        let open = &mut |name: &str| -> Box<dyn Transport> {
            let name = format!("{near_name}/{far_name}/{name}");
            Box::new(NixlTransport::open(&library, &settings, name).unwrap())
        };
        suite(&mut Bench { open, near, far });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_blocks_move_between_processes_from_and_to_device_memory() {
    look_for_a_gpu();
    let device = &[IN_DEVICE_MEMORY][..];
    let through_sockets = &[IN_DEVICE_MEMORY, THROUGH_SOCKETS][..];
    for (what, owners, reader) in [
        ("device to device", device, device),
        ("device to host", device, &[][..]),
        ("host to device", &[], device),
        ("device to device through sockets", through_sockets, through_sockets),
    ] {
        println!("{what}:");
        let seen = hand_over(owners, reader);
        println!("{what}: {seen}");
    }
}
