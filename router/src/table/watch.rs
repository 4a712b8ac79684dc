//! Sees that the configuration's file has changed: by looking, a few times a second, at what its name leads to.
//!
//! So a write in place, an editor's rename, a symlink turned to another folder (Kubernetes), a bind mount and a network
//! file system are all alike. A file is read when it looked the same twice, so that half a write is not taken for all.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Table;
use super::reload::{Reloader, Source};

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What tells one state of a file from another; `None` = there is no such file.
type Stamp = Option<[i128; 7]>;

/// Reloads for as long as the future is polled; ends at once where there is no file.
pub async fn run(reloader: Arc<Reloader>, table: Arc<Table>) {
    if reloader.file().is_none() {
        return;
    }
    let mut watch = Watch::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let (reloader, table) = (Arc::clone(&reloader), Arc::clone(&table));
        // Off the probes' thread: a file system may be slow.
        let look = tokio::task::spawn_blocking(move || {
            let stamps = stamps(&reloader, &table);
            if watch.is_new(stamps) {
                // Told in the log; there is nobody else here.
                let _told = reloader.reload(Source::File);
            }
            watch
        });
        watch = look.await.unwrap_or_default();
    }
}

/// Of the configuration and of the key file it names.
fn stamps(reloader: &Reloader, table: &Table) -> [Stamp; 2] {
    let config = Arc::clone(&table.snapshot().config);
    let keys = config.auth.internal_request_auth_key_file.as_deref();
    [reloader.file(), keys].map(|path| path.and_then(stamp))
}

fn stamp(path: &Path) -> Stamp {
    let about = fs::metadata(path).ok()?;
    let times = [about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec()];
    let [m, mn, c, cn] = times.map(i128::from);
    Some([about.dev().into(), about.ino().into(), about.size().into(), m, mn, c, cn])
}

/// Decides when to read.
#[derive(Debug, Default)]
struct Watch {
    seen: Option<[Stamp; 2]>,
    read: Option<[Stamp; 2]>,
}

impl Watch {
    /// Whether what is there stood still since the last look and was not read yet. The first look reads too: nobody
    /// knows what happened since the start.
    fn is_new(&mut self, stamps: [Stamp; 2]) -> bool {
        let is_still = self.seen.replace(stamps) == Some(stamps);
        is_still && self.read.replace(stamps) != Some(stamps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(watch: &mut Watch, path: &Path) -> bool {
        watch.is_new([stamp(path), None])
    }

    #[test]
    fn a_file_is_read_once_it_stands_still_and_again_only_when_it_changed() {
        let mut watch = Watch::default();
        let looks = [1, 1, 1, 2, 3, 3, 3, 1, 1].map(|state| watch.is_new([Some([state; 7]), None]));
        assert_eq!(looks, [false, true, false, false, false, true, false, false, true]);
    }

    #[test]
    fn a_write_a_rename_a_turned_symlink_and_a_removal_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let path = at("router.toml");
        for name in ["one", "two", "other"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("router.toml"), name).unwrap();
        }
        std::os::unix::fs::symlink("one", at("data")).unwrap();
        std::os::unix::fs::symlink("data/router.toml", &path).unwrap();
        let mut watch = Watch::default();
        let mut new = || (look(&mut watch, &path), look(&mut watch, &path));
        assert_eq!(new(), (false, true));
        assert_eq!(new(), (false, false));
        std::os::unix::fs::symlink("two", at("next")).unwrap();
        fs::rename(at("next"), at("data")).unwrap();
        assert_eq!(new(), (false, true), "a symlink was turned");
        fs::rename(at("other/router.toml"), &path).unwrap();
        assert_eq!(new(), (false, true), "another file took its place");
        fs::write(&path, "longer than before").unwrap();
        assert_eq!(new(), (false, true), "it was written to");
        fs::remove_file(&path).unwrap();
        assert_eq!(new(), (false, true), "it was removed");
    }
}
