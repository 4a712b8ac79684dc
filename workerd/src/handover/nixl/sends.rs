//! Keeps a worker alive whose peer breaks a connection while it sends over it.
//!
//! UCX 1.23 does not survive that over TCP: where a *send* fails, a request that answers a read ends the process by
//! `ucs_fatal("unexpected error: Endpoint timeout")` (`ucp_request.inl`) or by an assertion when the connection is
//! cleaned up (`tcp_ep.c`). Where a *receive* finds the same connection broken, it fails every request in order.
//! A broken connection always shows on both sides, as the receiving one sees its end or its error in the same
//! poll. So sends tell nothing: two functions of this executable stand before those of `libucs`, and a send that fails
//! says "not now", as a full socket does. The dynamic loader looks into the executable first; `build.rs` exports them.
#![expect(unsafe_code, reason = "called by UCX in place of its own functions")]

use std::ffi::{CStr, c_int, c_void};

/// `ucs_status_t` is one byte.
type Status = i8;
const OK: Status = 0;
const NO_PROGRESS: Status = -10;

/// Sends `*length` bytes without waiting; `*length` becomes how many were taken.
///
/// # Safety
/// UCX calls it: `data` is readable for `*length` bytes, and nobody else has `length`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ucs_socket_send_nb(
    socket: c_int,
    data: *const c_void,
    length: *mut usize,
) -> Status {
    // SAFETY: as above. The kernel checks the socket.
    let sent = unsafe { libc::send(socket, data, *length, libc::MSG_NOSIGNAL) };
    // SAFETY: as above.
    tell(sent, unsafe { &mut *length })
}

/// The same of `count` pieces; `*length` is only written.
///
/// # Safety
/// UCX calls it: `pieces` are readable and nobody else has `length`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ucs_socket_sendv_nb(
    socket: c_int,
    pieces: *mut libc::iovec,
    count: usize,
    length: *mut usize,
) -> Status {
    // SAFETY: all zero is a message without address, pieces, control data and flags.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces;
    message.msg_iovlen = count;
    // SAFETY: as above; the message lives through the call.
    let sent = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
    // SAFETY: as above.
    tell(sent, unsafe { &mut *length })
}

/// What UCX's own say of a socket that took `sent` bytes, and of a full one for every failure.
fn tell(sent: isize, length: &mut usize) -> Status {
    let asked = std::mem::replace(length, usize::try_from(sent).unwrap_or(0));
    if sent > 0 || (sent == 0 && asked == 0) { OK } else { NO_PROGRESS }
}

/// Whether libraries that are loaded from now on call ours.
pub fn stand_before_ucx() -> bool {
    let ours: [(&CStr, *const c_void); 2] = [
        (c"ucs_socket_send_nb", ucs_socket_send_nb as *const c_void),
        (c"ucs_socket_sendv_nb", ucs_socket_sendv_nb as *const c_void),
    ];
    ours.iter().all(|(name, function)| {
        // SAFETY: the name ends with a zero byte; the default handle is always valid.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        found.cast_const() == *function
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    fn send(socket: &TcpStream, data: &[u8]) -> (Status, usize) {
        let mut length = data.len();
        // SAFETY: the data is that long, and the length is ours.
        let status =
            unsafe { ucs_socket_send_nb(socket.as_raw_fd(), data.as_ptr().cast(), &mut length) };
        (status, length)
    }

    fn send_pieces(socket: &TcpStream, data: &[u8]) -> (Status, usize) {
        let (first, second) = data.split_at(data.len() / 2);
        let piece = |data: &[u8]| libc::iovec {
            iov_base: data.as_ptr().cast_mut().cast(),
            iov_len: data.len(),
        };
        let (mut pieces, mut length) = ([piece(first), piece(second)], usize::MAX);
        // SAFETY: both pieces live, and the length is ours.
        let status =
            unsafe { ucs_socket_sendv_nb(socket.as_raw_fd(), pieces.as_mut_ptr(), 2, &mut length) };
        (status, length)
    }

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_nonblocking(true).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_send_hands_over_its_bytes_and_says_how_many() {
        let (near, mut far) = connection();
        assert_eq!(send(&near, b"four"), (OK, 4));
        assert_eq!(send_pieces(&near, b"pieces"), (OK, 6));
        assert_eq!(send(&near, b""), (OK, 0));
        let mut got = [0; 10];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"fourpieces");
    }

    #[test]
    fn a_full_socket_and_a_broken_connection_both_say_not_now() {
        let much = vec![7; 1 << 20];
        let (near, far) = connection();
        while send(&near, &much).0 == OK {}
        assert_eq!(send(&near, &much), (NO_PROGRESS, 0));
        drop(far);
        let (broken, far) = connection();
        drop(far);
        // The first send after the end is still taken; the answer to it breaks the connection.
        while send(&broken, &much).0 == OK {}
        broken.set_nonblocking(false).unwrap();
        assert!(
            (&broken).read(&mut [0]).is_ok_and(|bytes| bytes == 0) || send(&broken, b"x").1 == 0
        );
        assert_eq!(send(&broken, b"x"), (NO_PROGRESS, 0));
        assert_eq!(send_pieces(&broken, b"xy"), (NO_PROGRESS, 0));
    }

    #[test]
    fn libraries_loaded_later_call_these_functions() {
        assert!(stand_before_ucx());
    }
}
