//! Puts functions of ours before UCX's of the same name: `src/handover/nixl/sends.rs` says why.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for symbol in ["ucs_socket_send_nb", "ucs_socket_sendv_nb"] {
        println!("cargo:rustc-link-arg=-Wl,--export-dynamic-symbol={symbol}");
    }
}
