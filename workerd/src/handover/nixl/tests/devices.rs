//! Pools in a GPU's memory, in one process and between two: ignored unless asked for, as most machines have none.

use super::pulls::hand_over;
use super::workers::{IN_DEVICE_MEMORY, device_memory};
use super::*;
use crate::backend::cuda::sys::driver;
use crate::handover::conformance::{Bench, suite};

fn look_for_a_gpu() {
    assert_ne!(driver::count().unwrap(), 0, "no GPU is visible");
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_nixl_conforms_over_device_memory() {
    look_for_a_gpu();
    for variables in [&[][..], &[OVER_TCP]] {
        for places in ["device device", "device host", "host device"] {
            let folder = tempfile::tempdir().unwrap();
            Running::start("devices::child_conforms", places, folder.path(), variables).succeed();
        }
    }
}

/// Of the places its name says. In one process UCX has no direct copies between devices' memory.
#[test]
#[ignore = "needs a process of its own"]
fn child_conforms() {
    let (library, settings) = (library(), NixlSettings::default());
    let open = &mut |name: &str| -> Box<dyn Transport> {
        Box::new(NixlTransport::open(&library, &settings, name.to_owned()).unwrap())
    };
    let host = |bytes| Region::host(bytes).unwrap();
    let memory = |place: &str| -> &dyn Fn(usize) -> Region {
        match place {
            "host" => &host,
            "device" => &device_memory,
            other => panic!("{other}"),
        }
    };
    let (_, name) = given();
    let (near, far) = name.split_once(' ').unwrap();
    suite(&mut Bench { open, near: memory(near), far: memory(far) });
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_blocks_move_between_processes_from_and_to_device_memory() {
    look_for_a_gpu();
    let device = &[IN_DEVICE_MEMORY][..];
    let through_sockets = &[IN_DEVICE_MEMORY, OVER_TCP][..];
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
