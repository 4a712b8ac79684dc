//! A TCP hop that can hold, slow or cut what passes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// They pass.
    Open,
    /// They wait.
    Held,
    /// One byte each this long.
    Slow(Duration),
    /// Connections are closed, new ones at once.
    Cut,
}

/// A running hop; ends when dropped.
#[derive(Debug)]
pub struct Relay {
    /// Where it listens.
    pub address: SocketAddr,
    passage: Arc<watch::Sender<Passage>>,
    accepting: JoinHandle<()>,
}

impl Relay {
    /// Listens on a free loopback port and passes everything on to `target`.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let passage = Arc::new(watch::Sender::new(Passage::Open));
        let changes = passage.subscribe();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connection(client, target, changes.clone()));
            }
        });
        Ok(Self { address, passage, accepting })
    }

    /// From now on.
    pub fn set(&self, passage: Passage) {
        self.passage.send_replace(passage);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.passage.send_replace(Passage::Cut);
        self.accepting.abort();
    }
}

async fn connection(client: TcpStream, target: SocketAddr, mut changes: watch::Receiver<Passage>) {
    if *changes.borrow() == Passage::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let both = async {
        tokio::select! {
            () = copy(client_read, server_write, changes.clone()) => {}
            () = copy(server_read, client_write, changes.clone()) => {}
        }
    };
    let mut watching = changes.clone();
    let cut = async { drop(watching.wait_for(|passage| *passage == Passage::Cut).await) };
    tokio::select! {
        () = both => {}
        () = cut => {}
    }
    let _ = changes.borrow_and_update();
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut changes: watch::Receiver<Passage>,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        if changes.wait_for(|passage| *passage != Passage::Held).await.is_err() {
            return;
        }
        let passage = *changes.borrow();
        let most = if matches!(passage, Passage::Slow(_)) { 1 } else { buffer.len() };
        let Ok(count @ 1..) = from.read(&mut buffer[..most]).await else { return };
        if changes.wait_for(|passage| *passage != Passage::Held).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        if let Passage::Slow(pause) = passage {
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn held_bytes_arrive_after_the_relay_opens_and_a_cut_ends_the_connection() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let relay = Relay::start(server.local_addr().unwrap()).await.unwrap();
        relay.set(Passage::Held);
        let mut client = TcpStream::connect(relay.address).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        let (mut inner, _) = server.accept().await.unwrap();
        let mut five = [0; 5];
        let early = tokio::time::timeout(Duration::from_millis(50), inner.read(&mut five)).await;
        assert!(early.is_err(), "held bytes must not arrive");
        relay.set(Passage::Open);
        inner.read_exact(&mut five).await.unwrap();
        assert_eq!(&five, b"hello");
        relay.set(Passage::Cut);
        assert_eq!(client.read(&mut five).await.unwrap_or(0), 0);
    }
}
