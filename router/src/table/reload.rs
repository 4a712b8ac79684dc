//! A new configuration in a running router: read, judge as a whole, compare, publish. One writer at a time; a mistake
//! changes nothing and is told with its place, in the log and to whoever asked.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use baton_shared::config::{ConfigError, Document};
use baton_shared::telemetry::{LogError, LogHandle};
use baton_shared::wire::auth::Keys;

use super::Table;
pub use super::diff::Change;
use super::diff::changes;
use super::keys::LiveKeys;
use crate::config::{Loaded, RouterConfig};
use crate::metrics::{Metrics, ReloadOutcome};

/// Tables that a rollback can reach.
const REMEMBERED: usize = 16;

/// Who wanted another table: the `source` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The file changed. At version 1: the file as it was at the start.
    File,
    /// SIGHUP.
    Signal,
    /// `PUT /admin/table`.
    Admin,
    /// `POST /admin/table/rollback`.
    Rollback,
}

impl Source {
    /// All, in the order of declaration.
    pub const ALL: [Self; 4] = [Self::File, Self::Signal, Self::Admin, Self::Rollback];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Signal => "sighup",
            Self::Admin => "admin",
            Self::Rollback => "rollback",
        }
    }
}

/// Why the table is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// A mistake, or a key that needs a restart.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This router was not made from a file.
    #[error("there is no file to read again")]
    NoFile,
    /// Nothing to go back to.
    #[error("there is no earlier table")]
    NoEarlier,
}

/// What a reload did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reloaded {
    /// Of the table in use.
    pub version: u64,
    /// What differs from the table before; empty = that one stayed.
    pub changes: Vec<Change>,
}

/// Where the table in use comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Who wanted it.
    pub source: Source,
    /// Since when it is used.
    pub since: SystemTime,
}

/// The one writer of a [`Table`].
pub struct Reloader {
    table: Arc<Table>,
    keys: LiveKeys,
    metrics: Arc<Metrics>,
    file: OnceLock<File>,
    log: OnceLock<LogHandle>,
    state: Mutex<State>,
}

/// A configuration file, and how it is read: flags may lie over it.
struct File {
    path: PathBuf,
    read: Box<dyn Fn() -> Result<Loaded, ConfigError> + Send + Sync>,
}

/// A configuration and the keys that belong to it.
#[derive(Clone)]
struct Version {
    config: Arc<RouterConfig>,
    keys: Arc<Keys>,
    origin: Origin,
}

struct State {
    current: Version,
    /// What rollbacks go back to, the latest last.
    earlier: Vec<Version>,
    /// As last read from the file: a file that says the same again leaves what an operator put in its place.
    in_file: (Arc<RouterConfig>, Arc<Keys>),
    level: String,
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloader").field("file", &self.file()).finish_non_exhaustive()
    }
}

impl Reloader {
    /// The writer of `table`, which is at its first version, and of `keys`.
    pub fn new(table: Arc<Table>, keys: LiveKeys, metrics: Arc<Metrics>) -> Self {
        let config = Arc::clone(&table.snapshot().config);
        let origin = Origin { source: Source::File, since: SystemTime::now() };
        let current = Version { config: Arc::clone(&config), keys: keys.get(), origin };
        let state = State {
            level: config.log.level.clone(),
            in_file: (config, keys.get()),
            current,
            earlier: Vec::new(),
        };
        let (file, log) = (OnceLock::new(), OnceLock::new());
        Self { table, keys, metrics, file, log, state: Mutex::new(state) }
    }

    /// Lets reloads read `path` by `read`. The first call counts.
    pub fn set_file(
        &self,
        path: PathBuf,
        read: impl Fn() -> Result<Loaded, ConfigError> + Send + Sync + 'static,
    ) {
        self.file.get_or_init(|| File { path, read: Box::new(read) });
    }

    /// Lets reloads and operators change the level of this process's logs. The first call counts.
    pub fn set_log(&self, log: LogHandle) {
        self.log.get_or_init(|| log);
    }

    /// The file that reloads read.
    pub fn file(&self) -> Option<&Path> {
        self.file.get().map(|file| file.path.as_path())
    }

    /// Where the table in use comes from.
    pub fn origin(&self) -> Origin {
        self.state().current.origin
    }

    /// Tables a rollback can reach.
    pub fn earlier(&self) -> usize {
        self.state().earlier.len()
    }

    /// Reads the file again. On [`Source::File`] a file that says what it said before changes nothing, whatever an
    /// operator has put in its place.
    ///
    /// # Errors
    /// The first mistake, or the first key that needs a restart, with its line.
    pub fn reload(&self, source: Source) -> Result<Reloaded, ReloadError> {
        let mut state = self.state();
        let done = self.read_file(&mut state, source);
        self.tell(&state, source, done)
    }

    /// Puts `text`, TOML as in `router.toml`, in the place of the table. Sections it leaves out stay as they are.
    ///
    /// # Errors
    /// The first mistake, or the first key that needs a restart, with its line.
    pub fn put(&self, text: String) -> Result<Reloaded, ReloadError> {
        let mut state = self.state();
        let read = || {
            let document = Document::from_toml(None, text)?;
            let running = &state.current;
            let config = RouterConfig::from_sections(&document, &running.config)?;
            let keys = match document.has("auth") {
                true => Arc::new(config.load_keys(&document)?),
                false => Arc::clone(&running.keys),
            };
            Ok::<_, ConfigError>((document, config, keys))
        };
        let done = read().map_err(ReloadError::from).and_then(|(document, config, keys)| {
            self.replace(&mut state, Arc::new(config), keys, Source::Admin, Some(&document))
        });
        self.tell(&state, Source::Admin, done)
    }

    /// Goes back to the table before this one; again, to the one before that.
    ///
    /// # Errors
    /// If there is none.
    pub fn rollback(&self) -> Result<Reloaded, ReloadError> {
        let mut state = self.state();
        let done = match state.earlier.pop() {
            None => Err(ReloadError::NoEarlier),
            Some(Version { config, keys, .. }) => {
                let done = self.replace(&mut state, config, keys, Source::Rollback, None);
                if done.as_ref().is_ok_and(|done| !done.changes.is_empty()) {
                    // The table that was left: to go back to it would be a circle of two.
                    state.earlier.pop();
                }
                done
            }
        };
        self.tell(&state, Source::Rollback, done)
    }

    /// The level logs have now; `None` where logs are not the router's.
    pub fn log_level(&self) -> Option<String> {
        self.log.get().map(|_| self.state().level.clone())
    }

    /// Logs at `level` until it is set otherwise or a reload changes `log.level`. `None` where logs are not the router's.
    ///
    /// # Errors
    /// If it is no level.
    pub fn set_log_level(&self, level: &str) -> Option<Result<(), LogError>> {
        let log = self.log.get()?;
        let mut state = self.state();
        let set = log.set_level(level);
        if set.is_ok() {
            tracing::info!(level, "log level set by an operator");
            level.clone_into(&mut state.level);
        }
        Some(set)
    }

    fn read_file(&self, state: &mut State, source: Source) -> Result<Reloaded, ReloadError> {
        let file = self.file.get().ok_or(ReloadError::NoFile)?;
        let Loaded { config, keys, document, .. } = (file.read)()?;
        let read = (Arc::new(config), Arc::new(keys));
        if source == Source::File && read == state.in_file {
            return Ok(Reloaded { version: self.version(), changes: Vec::new() });
        }
        let (config, keys) = read.clone();
        let done = self.replace(state, config, keys, source, document.as_ref())?;
        state.in_file = read;
        Ok(done)
    }

    /// Compares and publishes; `document` is where mistakes stand.
    fn replace(
        &self,
        state: &mut State,
        config: Arc<RouterConfig>,
        keys: Arc<Keys>,
        source: Source,
        document: Option<&Document>,
    ) -> Result<Reloaded, ReloadError> {
        let mut changes = changes(&state.current.config, &config);
        if let Some(change) = changes.iter().find(|change| change.needs_restart()) {
            let now = change.from.as_deref().unwrap_or("not set");
            let rule = format!("is read at the start only: restart the router, which has {now}");
            return Err(ReloadError::Config(match document {
                Some(document) => document.error(&change.key, rule),
                None => ConfigError::new(&change.key, rule),
            }));
        }
        if keys != state.current.keys {
            changes.push(Change {
                key: "keys shared with workers".to_owned(),
                from: None,
                to: None,
            });
        }
        if changes.is_empty() {
            return Ok(Reloaded { version: self.version(), changes });
        }
        // Keys first: a worker of the new table is never sent what an old key signed.
        self.keys.set(Arc::clone(&keys));
        let version = match self.table.publish(Arc::clone(&config)) {
            Ok(version) => version,
            Err(error) => {
                self.keys.set(Arc::clone(&state.current.keys));
                return Err(ConfigError::new("servers", error.to_string()).into());
            }
        };
        if config.log.level != state.current.config.log.level
            && let Some(log) = self.log.get()
        {
            match log.set_level(&config.log.level) {
                Ok(()) => state.level.clone_from(&config.log.level),
                Err(error) => tracing::error!(%error, "log level stays"),
            }
        }
        let origin = Origin { source, since: SystemTime::now() };
        let before = std::mem::replace(&mut state.current, Version { config, keys, origin });
        if state.earlier.len() == REMEMBERED {
            state.earlier.remove(0);
        }
        state.earlier.push(before);
        Ok(Reloaded { version, changes })
    }

    /// Logs and counts how it went.
    fn tell(
        &self,
        _writer: &MutexGuard<'_, State>,
        source: Source,
        done: Result<Reloaded, ReloadError>,
    ) -> Result<Reloaded, ReloadError> {
        let name = source.as_str();
        let outcome = match &done {
            Ok(Reloaded { version, changes }) if changes.is_empty() => {
                tracing::info!(source = name, version, "table stays: nothing differs");
                ReloadOutcome::Unchanged
            }
            Ok(Reloaded { version, changes }) => {
                let shown: Vec<_> = changes.iter().map(Change::to_string).collect();
                tracing::info!(source = name, version, changes = shown.join("; "), "new table");
                ReloadOutcome::Applied
            }
            Err(error) => {
                let version = self.version();
                tracing::error!(source = name, version, %error, "table refused, the old one stays");
                ReloadOutcome::Refused
            }
        };
        self.metrics.reload(source, outcome);
        done
    }

    fn version(&self) -> u64 {
        self.table.snapshot().version
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changed only after everything that can fail, so a poisoned state is a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const FILE: &str =
        "[[context.servers]]\nurl = \"a:1\"\n[[generation.servers]]\nurl = \"b:1\"\n";

    fn reloader() -> Reloader {
        let table = Arc::new(Table::new(config(&["a:1"], &["b:1"])).unwrap());
        Reloader::new(table, Keys::none().into(), Arc::new(Metrics::new()))
    }

    /// With a file that holds [`FILE`].
    fn from_file(folder: &Path) -> (Reloader, PathBuf) {
        let path = folder.join("router.toml");
        std::fs::write(&path, FILE).unwrap();
        let reloader = reloader();
        let file = path.clone();
        reloader.set_file(path.clone(), move || Loaded::read(&file));
        (reloader, path)
    }

    fn versions(reloader: &Reloader) -> (u64, Vec<String>) {
        let table = reloader.table.snapshot_full();
        (table.version, table.workers().map(|worker| worker.id.to_string()).collect())
    }

    #[test]
    fn a_changed_file_is_taken_over_and_an_unchanged_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (reloader, path) = from_file(folder.path());
        for source in [Source::File, Source::Signal] {
            let same = Reloaded { version: 1, changes: Vec::new() };
            assert_eq!(reloader.reload(source).unwrap(), same);
        }
        std::fs::write(&path, format!("{FILE}[[generation.servers]]\nurl = \"c:1\"\n")).unwrap();
        let done = reloader.reload(Source::File).unwrap();
        assert_eq!((done.version, done.changes.is_empty()), (2, false));
        assert_eq!(versions(&reloader).1, ["a:1", "b:1", "c:1"]);
        assert_eq!(reloader.origin().source, Source::File);
    }

    #[test]
    fn a_broken_file_changes_nothing_and_names_file_line_key_and_rule() {
        let folder = tempfile::tempdir().unwrap();
        let (reloader, path) = from_file(folder.path());
        let place = path.display();
        for (text, expected) in [
            (
                format!("[routing]\nattempts = 0\n{FILE}"),
                format!("{place}:2: `routing.attempts` = `0`: must be at least 1"),
            ),
            (
                format!("[server]\nthreads = 7\n{FILE}"),
                format!(
                    "{place}:2: `server.threads` = `7`: is read at the start only: restart the router, which has 0"
                ),
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(reloader.reload(Source::Signal).unwrap_err().to_string(), expected);
        }
        std::fs::write(&path, "[context\n").unwrap();
        let error = reloader.reload(Source::File).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{place}:1: ")), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = reloader.reload(Source::File).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
        assert_eq!(versions(&reloader).0, 1);
    }

    #[test]
    fn what_is_put_leaves_other_sections_alone_and_lasts_until_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (reloader, path) = from_file(folder.path());
        reloader.put("[routing]\nattempts = 7\n".to_owned()).unwrap();
        assert_eq!(versions(&reloader), (2, vec!["a:1".to_owned(), "b:1".to_owned()]));
        assert_eq!(reloader.table.snapshot().config.routing.attempts, 7);
        assert!(reloader.reload(Source::File).unwrap().changes.is_empty());
        assert_eq!(reloader.table.snapshot().config.routing.attempts, 7);
        std::fs::write(&path, format!("[routing]\nattempts = 5\n{FILE}")).unwrap();
        reloader.reload(Source::File).unwrap();
        assert_eq!(reloader.table.snapshot().config.routing.attempts, 5);
        let again = reloader.put("[routing]\nattempts = 5\n".to_owned()).unwrap();
        assert_eq!((again.version, again.changes.len()), (3, 0));
    }

    #[test]
    fn what_is_put_is_judged_as_a_whole() {
        let reloader = reloader();
        let put = |text: &str| reloader.put(text.to_owned()).unwrap_err().to_string();
        assert_eq!(
            put("\n[routing]\nattempts = 0\n"),
            "line 3: `routing.attempts` = `0`: must be at least 1"
        );
        assert!(put("[[context.servers]]\nurl = \"b:1\"\nweight = 2\n").contains("both lists"));
        assert!(put("[server]\nlisten = \"127.0.0.1:1\"\n").contains("restart the router"));
        assert!(put("[auth]\ninternal_request_auth_key_file = \"/none\"\n").contains("line 2"));
        assert!(put("routes = 1\n").contains("routes"));
        assert_eq!(versions(&reloader).0, 1);
    }

    #[test]
    fn a_section_that_is_put_leaves_alone_what_it_does_not_name_and_only_the_start_reads() {
        let mut started = config(&["a:1"], &["b:1"]);
        started.server.listen = "127.0.0.1:1".parse().unwrap();
        started.server.threads = 3;
        started.server.admin_listen = "127.0.0.1:2".parse().unwrap();
        started.server.admin_token_file = Some("/x".into());
        started.server.drain_timeout = "7s".parse().unwrap();
        started.routing.node_id = Some(5);
        started.routing.attempts = 9;
        started.log.format = baton_shared::telemetry::LogFormat::Text;
        let table = Arc::new(Table::new(started.clone()).unwrap());
        let reloader = Reloader::new(table, Keys::none().into(), Arc::new(Metrics::new()));
        reloader.put("[server]\n[routing]\n[log]\naccess = true\n".to_owned()).unwrap();
        started.log.access = true;
        started.routing.attempts = 3;
        assert_eq!(
            *reloader.table.snapshot().config,
            started,
            "the rest of a section is as if new"
        );
        for (text, key) in [
            ("[server]\nthreads = 3\nlisten = \"127.0.0.1:8000\"\n", "line 3: `server.listen`"),
            ("[routing]\nnode_id = 6\n", "line 2: `routing.node_id`"),
            ("[log]\nformat = \"json\"\n", "line 2: `log.format`"),
        ] {
            let error = reloader.put(text.to_owned()).unwrap_err().to_string();
            assert!(error.starts_with(key) && error.contains("restart the router"), "{error}");
        }
        assert_eq!(*reloader.table.snapshot().config, started);
    }

    #[test]
    fn rollbacks_go_back_one_table_at_a_time() {
        let reloader = reloader();
        for attempts in [5, 6] {
            reloader.put(format!("[routing]\nattempts = {attempts}\n")).unwrap();
        }
        for (version, attempts) in [(4, 5), (5, 3)] {
            assert_eq!(reloader.rollback().unwrap().version, version);
            assert_eq!(reloader.table.snapshot().config.routing.attempts, attempts);
        }
        let error = reloader.rollback().unwrap_err();
        assert_eq!(error.to_string(), "there is no earlier table");
        assert_eq!(versions(&reloader).0, 5);
    }

    #[test]
    fn keys_follow_the_file_they_are_in() {
        let folder = tempfile::tempdir().unwrap();
        let (reloader, path) = from_file(folder.path());
        let key = folder.path().join("internal.key");
        std::fs::write(&key, "0123456789abcdef\n").unwrap();
        let auth = format!("[auth]\ninternal_request_auth_key_file = {key:?}\n");
        std::fs::write(&path, format!("{auth}{FILE}")).unwrap();
        assert!(!reloader.keys.authenticate());
        reloader.reload(Source::File).unwrap();
        let before = reloader.keys.sign_release(b"x");
        assert!(reloader.keys.authenticate());
        std::fs::write(&key, "fedcba9876543210\n").unwrap();
        let done = reloader.reload(Source::File).unwrap();
        assert_eq!(done.changes.len(), 1);
        assert_ne!(reloader.keys.sign_release(b"x"), before);
        assert!(!format!("{:?}", done.changes).contains("fedcba"), "keys are never shown");
        reloader.rollback().unwrap();
        assert_eq!(reloader.keys.sign_release(b"x"), before);
    }

    #[test]
    fn readers_never_see_half_a_table_while_it_is_replaced() {
        let reloader = reloader();
        let (tables, done) = (&reloader.table, &AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..500 {
                    let name = format!("a{round}:1");
                    let text = format!("[[context.servers]]\nurl = \"{name}\"\n");
                    reloader.put(format!("{text}[routing]\nattempts = {}\n", round + 1)).unwrap();
                }
                done.store(1, Ordering::Release);
            });
            while done.load(Ordering::Acquire) == 0 {
                let table = tables.snapshot_full();
                let expected = match table.version {
                    1 => ("a:1".to_owned(), 3),
                    version => (format!("a{}:1", version - 2), version as u32 - 1),
                };
                let seen = (table.context[0].id.to_string(), table.config.routing.attempts);
                assert_eq!(seen, expected);
            }
        });
    }
}
