//! Telling the service manager, over a socket that is connected before the
//! sandbox is closed.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use sd_notify::NotifyState;

/// The service manager, if there is one.
#[derive(Debug)]
pub(super) struct Manager(Option<UnixDatagram>);

impl Manager {
    /// The one that `$NOTIFY_SOCKET` names.
    pub(super) fn connect() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
            return Self(None);
        };
        let socket = connect(&name);
        Self(
            socket
                .inspect_err(|e| tracing::warn!("cannot reach the service manager: {e}"))
                .ok(),
        )
    }

    /// Tells it.
    pub(super) fn tell(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.0 else { return };
        let text: String = states.iter().map(|state| format!("{state}\n")).collect();
        if let Err(error) = socket.send(text.as_bytes()) {
            tracing::warn!("cannot tell the service manager: {error}");
        }
    }
}

/// A path, or `@` and a name without a place in the file system.
fn connect(name: &OsString) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_go_to_sockets_of_both_kinds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let id = std::process::id();
        let by_name = SocketAddr::from_abstract_name(format!("qcow2-ublk-{id}")).unwrap();
        let servers = [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&by_name).unwrap(),
                format!("@qcow2-ublk-{id}").into(),
            ),
        ];
        for (server, name) in servers {
            let manager = Manager(Some(connect(&name).unwrap()));
            manager.tell(&[NotifyState::Ready, NotifyState::Status("well")]);
            let mut text = [0; 100];
            let len = server.recv(&mut text).unwrap();
            assert_eq!(&text[..len], b"READY=1\nSTATUS=well\n");
        }
    }
}
