//! How many bytes came in IP packets: what comes through a socket is counted by the kernel, loopback included, and
//! what is copied out of another process's memory is not.

use std::fs;

/// Bytes received so far in this process's network namespace; `None` where the kernel does not tell.
pub(super) fn received() -> Option<u64> {
    let version_4 = of_version_4(&fs::read_to_string("/proc/self/net/netstat").ok()?)?;
    // Not there where IPv6 is switched off.
    let version_6 = fs::read_to_string("/proc/self/net/snmp6").unwrap_or_default();
    version_4.checked_add(of_version_6(&version_6).unwrap_or(0))
}

/// From `netstat`: a line of names and a line of values for each group.
fn of_version_4(netstat: &str) -> Option<u64> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("IpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|name| name == "InOctets")?;
    values.split_whitespace().nth(at)?.parse().ok()
}

/// From `snmp6`: a name and a value on each line.
fn of_version_6(snmp6: &str) -> Option<u64> {
    let mut values = snmp6.lines().filter_map(|line| line.strip_prefix("Ip6InOctets"));
    values.next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETSTAT: &str = "TcpExt: SyncookiesSent InOctets\n\
        TcpExt: 1 2\n\
        IpExt: InNoRoutes InTruncatedPkts InOctets OutOctets\n\
        IpExt: 0 3 417288734 724848\n\
        MPTcpExt: InOctets\n\
        MPTcpExt: 9\n";

    #[test]
    fn the_count_stands_below_its_name_in_its_group() {
        assert_eq!(of_version_4(NETSTAT), Some(417_288_734));
        let snmp6 =
            "Ip6InReceives   \t7\nIp6InOctets                     \t1234\nIp6OutOctets \t9\n";
        assert_eq!(of_version_6(snmp6), Some(1234));
    }

    #[test]
    fn what_is_not_there_or_no_number_is_no_count() {
        let broken = [
            "",
            "IpExt: InNoRoutes InOctets\n",
            "IpExt: InNoRoutes\nIpExt: 1\n",
            "IpExt: InNoRoutes InOctets\nIpExt: 1\n",
            "IpExt: InOctets\nIpExt: many\n",
        ];
        assert!(broken.iter().all(|text| of_version_4(text).is_none()));
        assert_eq!(of_version_6("Ip6InReceives 7\n"), None);
        assert_eq!(of_version_6("Ip6InOctets -\n"), None);
    }

    #[test]
    fn what_comes_over_loopback_is_counted() {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let Some(before) = received() else { return };
        let mut bytes = vec![7; 64 << 10];
        near.write_all(&bytes).unwrap();
        far.read_exact(&mut bytes).unwrap();
        assert!(received().unwrap() - before >= bytes.len() as u64);
    }
}
