//! A nested systemd with Baton installed and configured as the manual says.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::files;
use baton_integration::nested_systemd::{Nested, in_network};
use baton_integration::scrape::Metrics;
use baton_integration::tiny_model::TinyModel;

use crate::support::skipped;

/// Starts of several daemons on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// The router's ports, as shipped.
pub const PUBLIC: u16 = 8000;
pub const ADMIN: u16 = 9000;
/// What clients call the tiny model.
pub const MODEL: &str = "tiny";

/// One host with Baton on it.
pub struct Host {
    pub nested: Nested,
    /// Units of the workers, contexts first.
    pub workers: Vec<String>,
}

impl Host {
    /// With `contexts` and `generations` workers of a tiny model, not started yet. `None` where there can be no such host.
    pub fn boot(test: &str, contexts: usize, generations: usize) -> Option<Self> {
        let write = |path: &Path| TinyModel::default().write(path).unwrap();
        Self::boot_with(test, contexts, generations, ("model", write))
    }

    /// The same with a model of this name, which is put where it is told.
    pub fn boot_with(
        test: &str,
        contexts: usize,
        generations: usize,
        (model, write): (&str, impl FnOnce(&Path)),
    ) -> Option<Self> {
        if let Some(why) = Nested::missing().or_else(no_packages) {
            skipped(test, &why);
            return None;
        }
        packages();
        let nested = Nested::boot().unwrap();
        let mut host = Self { nested, workers: Vec::new() };
        write(&host.nested.shared().join(model));
        host.install();
        let mut servers = String::new();
        for index in 0..contexts + generations {
            let role = if index < contexts { "context" } else { "generation" };
            let number = if index < contexts { index } else { index - contexts };
            let name = format!("{role}-{number}");
            let port = worker_port(index);
            host.write(
                &format!("/etc/baton/workerd/{name}.toml"),
                &format!(
                    "model = \"/mnt/shared/{model}\"\nserved_model_names = [\"{MODEL}\", \"{}\"]\n\
                     role = \"{role}\"\nserver.listen = \"127.0.0.1:{port}\"\n\
                     engine.threads = 1\nkv.pool = \"64MiB\"\n",
                    SEEDS_MODEL
                ),
            );
            servers += &format!("[[{role}.servers]]\nurl = \"localhost:{port}\"\n");
            host.workers.push(format!("baton-workerd@{name}.service"));
        }
        host.configure_router(&servers);
        Some(host)
    }

    /// Installs the packages of this build.
    fn install(&self) {
        for file in fs::read_dir(packages()).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), self.nested.shared().join(file.file_name())).unwrap();
        }
        self.sh("chmod -R a+rX /mnt/shared && dpkg -i /mnt/shared/*.deb");
    }

    /// Installs a package again, as a newer version.
    pub fn upgrade(&self, package: &str) {
        self.sh(&format!(
            "rm -rf /tmp/deb && dpkg-deb -R /mnt/shared/{package}_*.deb /tmp/deb
            sed -i 's/^Version: .*/&+again/' /tmp/deb/DEBIAN/control
            dpkg-deb -Znone -b /tmp/deb /tmp/{package}.deb && dpkg -i /tmp/{package}.deb"
        ));
    }

    /// `router.toml` with these servers, and quick to drain.
    pub fn configure_router(&self, more: &str) {
        let text = format!(
            "[server]\nlisten = \"systemd:http\"\nthreads = 1\ndrain_timeout = \"10s\"\n{more}"
        );
        self.write("/etc/baton/router.toml", &text);
    }

    /// Lays `lines` over the `[Service]` section of a unit or template.
    pub fn drop_in(&self, unit: &str, lines: &str) {
        self.sh(&format!("mkdir -p /etc/systemd/system/{unit}.d"));
        let path = format!("/etc/systemd/system/{unit}.d/test.conf");
        self.write(&path, &format!("[Service]\n{lines}\n"));
        self.sh("systemctl daemon-reload");
    }

    /// Enables everything, starts it as the manual says, and waits until the router would serve.
    pub fn start(&self) {
        let workers = self.workers.join(" ");
        self.sh(&format!("systemctl enable baton.target baton-router.service {workers}"));
        self.sh("systemctl start baton.target");
        self.ready();
    }

    /// Waits until the router finds all of its workers usable.
    pub fn ready(&self) {
        self.inside(|| {
            eventually(PATIENCE, "the router finds all workers usable", || async {
                let answer = client(ADMIN).get("/admin/workers").await.ok()?.json().ok()?;
                let workers = answer["workers"].as_array()?.clone();
                let is_up = |worker: &serde_json::Value| worker["condition"] == "up";
                (workers.len() == self.workers.len() && workers.iter().all(is_up)).then_some(())
            })
        });
    }

    /// Waits until `unit` runs as another process than `before`, and is ready.
    pub fn is_back(&self, unit: &str, before: &str) {
        self.eventually(&format!("{unit} is back"), || {
            let now = self.show(unit, "MainPID");
            let is_new = now != "0" && now != before;
            is_new && self.show(unit, "ActiveState") == "active"
        });
        self.ready();
    }

    /// Waits for something that is asked from outside.
    pub fn eventually(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = std::time::Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs `work` in the host's network.
    pub fn inside<T: Send, F: Future<Output = T>>(&self, work: impl FnOnce() -> F + Send) -> T {
        in_network(self.nested.network(), work)
    }

    /// Since when the public port is open.
    pub fn open_since(&self) -> String {
        self.show("baton-router.socket", "ActiveEnterTimestampMonotonic")
    }

    /// The number of a unit's process.
    pub fn pid(&self, unit: &str) -> String {
        self.show(unit, "MainPID")
    }

    pub fn show(&self, unit: &str, property: &str) -> String {
        self.nested.show(unit, property).unwrap()
    }

    pub fn sh(&self, script: &str) -> String {
        self.nested.sh(script).unwrap()
    }

    /// The script's exit code and everything it wrote.
    pub fn attempt(&self, script: &str) -> (Option<i32>, String) {
        let output = self.nested.run(&["sh", "-c", script]).unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    pub fn journal(&self, pattern: &str) -> Vec<String> {
        self.nested.journal(pattern).unwrap()
    }

    /// Writes a file that everybody inside may read.
    pub fn write(&self, path: &str, text: &str) {
        let shared = self.nested.shared().join("file");
        fs::write(&shared, text).unwrap();
        fs::set_permissions(&shared, PermissionsExt::from_mode(0o644)).unwrap();
        self.sh(&format!("install -D -m 644 /mnt/shared/file {path}"));
    }

    /// What a daemon's metrics say.
    pub fn metric(
        &self,
        port: u16,
        path: &'static str,
        name: &str,
        labels: &[(&str, &str)],
    ) -> f64 {
        self.inside(|| async move {
            let answer = client(port).get(path).await.unwrap();
            Metrics::parse(std::str::from_utf8(&answer.body).unwrap()).sum(name, labels)
        })
    }
}

/// Why no packages can be made here, if so.
fn no_packages() -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools = ["dpkg", "dpkg-deb", "dpkg-shlibdeps", "python3", "strip"];
    let is_absent = |tool: &&str| !std::env::split_paths(&path).any(|at| at.join(tool).exists());
    tools.into_iter().find(is_absent).map(|tool| format!("there is no `{tool}`"))
}

/// Where the packages of this build are, made once a run.
fn packages() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packages");
        let mut build = Command::new(files::top().join("integration/packages/build.sh"));
        build.arg("deb").env("PROFILE", "release").env("QUICK", "1").env("OUT", &folder);
        let output = build.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder
    })
}

/// The model of the replaced documentation's command.
pub const SEEDS_MODEL: &str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0";

/// Where a worker listens.
pub fn worker_port(index: usize) -> u16 {
    8001 + u16::try_from(index).unwrap()
}

/// Talks to a port of the host; to be used in its network.
pub fn client(port: u16) -> Client {
    Client::new(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}
