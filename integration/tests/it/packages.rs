//! The Debian packages and the archive, made from this build: what is in them, and that it runs from where it was unpacked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use baton_integration::cluster::Plan;
use baton_integration::files;
use tokio::sync::OnceCell;
use toml::{Table, Value};

use crate::support::{finished, skipped};
use crate::tiny;

const PACKAGES: [&str; 4] = ["baton-common", "baton-router", "baton-workerd", "baton-tools"];

/// What of `tools` is not installed.
fn missing(tools: &[&str]) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there =
        |tool: &&&str| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    let absent: Vec<_> = tools.iter().filter(|tool| !is_there(tool)).copied().collect();
    (!absent.is_empty()).then(|| format!("not installed: {}", absent.join(", ")))
}

/// What a tool says that must succeed, for as long as it takes: packing and looking at 80 MB is work, and these are
/// not ours.
async fn run(command: &mut Command) -> String {
    let mut owned = std::mem::replace(command, Command::new("true"));
    let described = format!("{owned:?}");
    let output = tokio::task::spawn_blocking(move || owned.output().unwrap()).await.unwrap();
    let Output { status, stdout, stderr } = output;
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{described}: {status}\n{out}{err}");
    out.into_owned()
}

/// `build.sh WHAT` with the binaries of this build, into `folder`.
async fn build(what: &str, folder: &Path) {
    let script = files::top().join("integration/packages/build.sh");
    let mut command = Command::new(script);
    command.arg(what).env("PROFILE", "release").env("QUICK", "1").env("OUT", folder);
    run(&mut command).await;
    run(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(folder))
        .await;
}

/// The folder of the packages, made once a test run.
async fn packages() -> &'static Path {
    static BUILT: OnceCell<PathBuf> = OnceCell::const_new();
    let built = BUILT.get_or_init(async || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packages-read");
        build("deb", &folder).await;
        folder
    });
    built.await
}

/// The file of `package`.
fn deb(folder: &Path, package: &str) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let start = format!("{package}_");
    let is_it = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(&start);
    files.into_iter().find(is_it).unwrap()
}

#[tokio::test]
async fn the_packages_hold_what_an_operator_expects_and_run_from_where_they_are_unpacked() {
    let test = "the_packages_hold_what_an_operator_expects_and_run_from_where_they_are_unpacked";
    if let Some(missing) = missing(&["dpkg-deb", "dpkg-shlibdeps", "strip"]) {
        return skipped(test, &missing);
    }
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    for package in PACKAGES {
        let file = deb(packages().await, package);
        let (control, tree) =
            (folder.path().join(package), folder.path().join(format!("{package}.tree")));
        run(Command::new("dpkg-deb").arg("-e").arg(&file).arg(&control)).await;
        run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&tree)).await;
        run(Command::new("cp").arg("-r").arg(tree.join(".")).arg(&root)).await;
        check_control(package, &control, &tree).await;
    }
    for file in [
        "usr/lib/systemd/system/baton.target",
        "usr/lib/systemd/system/baton-router.service",
        "usr/lib/systemd/system/baton-router.socket",
        "usr/lib/systemd/system/baton-workerd@.service",
        "usr/share/doc/baton-tools/examples/cluster.toml",
        "usr/share/doc/baton-tools/examples/grafana/overview.json",
        "usr/share/doc/baton-tools/examples/prometheus/rules/alerts.yml",
        "usr/share/doc/baton-workerd/third-party-licences.gz",
    ] {
        assert!(root.join(file).is_file(), "{file}");
    }
    for command in ["baton-router", "baton-workerd", "baton-up", "baton-client"] {
        for file in [
            format!("usr/share/man/man1/{command}.1.gz"),
            format!("usr/share/bash-completion/completions/{command}"),
            format!("usr/share/zsh/vendor-completions/_{command}"),
            format!("usr/share/fish/vendor_completions.d/{command}.fish"),
        ] {
            assert!(root.join(&file).is_file(), "{file}");
        }
        let completion = root.join(format!("usr/share/bash-completion/completions/{command}"));
        run(Command::new("bash").arg("-n").arg(completion)).await;
    }
    may_be_passed_on(&root.join("usr/lib/baton/nixl"));
    let licences =
        std::fs::read_to_string(root.join("usr/share/doc/baton-workerd/copyright")).unwrap();
    each_library_has_a_licence(&root, &licences);
    let router = root.join("etc/baton/router.toml");
    run(Command::new(root.join("usr/bin/baton-router")).arg("--check").arg("-c").arg(router)).await;
    let worker = root.join("etc/baton/workerd/example.toml");
    run(Command::new(root.join("usr/bin/baton-workerd")).arg("--check").arg("-c").arg(worker))
        .await;
    a_cluster_runs_from(&root.join("usr/bin"), folder.path()).await;
}

/// Its control file, configuration files and scripts.
async fn check_control(package: &str, control: &Path, tree: &Path) {
    let text = |name: &str| std::fs::read_to_string(control.join(name)).unwrap_or_default();
    let fields = text("control");
    let depends = fields.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap();
    let names: BTreeSet<_> =
        depends.split(", ").map(|one| one.split(' ').next().unwrap()).collect();
    let expected: &[&str] = match package {
        "baton-common" => &["adduser"],
        "baton-router" => &["baton-common", "libc6", "libgcc-s1"],
        "baton-workerd" => {
            &["baton-common", "libc6", "libgcc-s1", "libssl3", "libstdc++6", "zlib1g"]
        }
        _ => &["libc6", "libgcc-s1"],
    };
    // Newer Debians have other names for some, as `libssl3t64`.
    let plain: BTreeSet<_> = names.iter().map(|name| name.trim_end_matches("t64")).collect();
    assert_eq!(plain, expected.iter().copied().collect(), "{package}");
    let conffiles: BTreeSet<_> = text("conffiles").lines().map(str::to_owned).collect();
    let expected: BTreeSet<_> = match package {
        "baton-router" => ["/etc/baton/router.toml"].map(str::to_owned).into(),
        "baton-workerd" => ["/etc/baton/workerd/example.toml"].map(str::to_owned).into(),
        _ => BTreeSet::new(),
    };
    assert_eq!(conffiles, expected, "{package}");
    for script in ["postinst", "prerm", "postrm"] {
        let file = control.join(script);
        if file.exists() {
            run(Command::new("sh").arg("-n").arg(&file)).await;
        }
    }
    run(Command::new("sh")
        .arg("-c")
        .arg("cd \"$0\" && md5sum --quiet --check \"$1\"/md5sums")
        .arg(tree)
        .arg(control))
    .await;
}

/// NVIDIA's proprietary modules for InfiniBand come in the same wheel as what is free.
fn may_be_passed_on(nixl: &Path) {
    assert!(nixl.join(".nixl_cu12.mesonpy.libs/libnixl_capi.so").is_file());
    for file in libraries(nixl) {
        assert!(!file.contains("libuct_ib"), "{file} may not be passed on");
    }
}

/// Names of the files below `folder`.
fn libraries(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(libraries(&path));
        } else {
            found.push(path.to_str().unwrap().to_owned());
        }
    }
    found
}

/// Each file of NIXL's is in a paragraph of the copyright file.
fn each_library_has_a_licence(root: &Path, licences: &str) {
    let patterns: Vec<_> = licences
        .lines()
        .map(|line| line.strip_prefix("Files:").unwrap_or(line).trim())
        .filter(|line| line.starts_with("usr/lib/baton/nixl/"))
        .collect();
    for file in libraries(&root.join("usr/lib/baton/nixl")) {
        let file = Path::new(&file).strip_prefix(root).unwrap().to_str().unwrap();
        let is_in = |pattern: &&str| match pattern.strip_suffix('*') {
            Some(start) => file.starts_with(start),
            None => file == *pattern,
        };
        assert!(patterns.iter().any(is_in), "{file} has no licence in the copyright file");
    }
}

#[tokio::test]
async fn lintian_finds_no_error() {
    if let Some(missing) = missing(&["dpkg-deb", "dpkg-shlibdeps", "strip", "lintian"]) {
        return skipped("lintian_finds_no_error", &missing);
    }
    let folder = packages().await;
    let mut command = Command::new("lintian");
    command.args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"]);
    run(command.args(PACKAGES.map(|package| deb(folder, package)))).await;
}

#[tokio::test]
async fn the_archive_runs_wherever_it_is_unpacked() {
    if let Some(missing) = missing(&["zstd", "tar", "strip"]) {
        return skipped("the_archive_runs_wherever_it_is_unpacked", &missing);
    }
    let folder = tempfile::tempdir().unwrap();
    build("tarball", folder.path()).await;
    let name = format!("baton-{}-x86_64-linux", env!("CARGO_PKG_VERSION"));
    let file = folder.path().join(format!("{name}.tar.zst"));
    run(Command::new("tar").arg("-C").arg(folder.path()).args(["--zstd", "-xf"]).arg(file)).await;
    let top = folder.path().join(name);
    for file in [
        "etc/baton/router.toml",
        "etc/baton/examples/disagg_config.yaml",
        "etc/baton/systemd/baton-router.service",
        "share/man/man1/baton-router.1",
        "share/doc/baton/LICENSE",
        "share/doc/baton/nixl.copyright",
        "share/doc/baton/third-party-licences",
    ] {
        assert!(top.join(file).is_file(), "{file}");
    }
    may_be_passed_on(&top.join("lib/baton/nixl"));
    a_cluster_runs_from(&top.join("bin"), folder.path()).await;
}

/// Prefill in one worker, answer in another: so both have found NIXL, of which there is none but beside them.
async fn a_cluster_runs_from(bin: &Path, folder: &Path) {
    for program in ["baton-router", "baton-workerd", "baton-up", "baton-client"] {
        let said = run(Command::new(bin.join(program)).arg("--version")).await;
        assert_eq!(said.trim(), format!("{program} {}", env!("CARGO_PKG_VERSION")));
    }
    let model = tiny::model(4);
    let mut tries = 0;
    let said = loop {
        let Plan { workers, router, .. } = Plan::local(&model.path, 1, 1, &Table::new()).unwrap();
        let workers = workers.into_iter().map(|(name, mut table)| {
            table.insert("name".into(), name.into());
            Value::Table(table)
        });
        let mut file = Table::new();
        file.insert("router".into(), router.unwrap().into());
        file.insert("worker".into(), workers.collect::<Vec<_>>().into());
        let path = folder.join("cluster.toml");
        std::fs::write(&path, toml::to_string(&file).unwrap()).unwrap();
        let mut command = Command::new(bin.join("baton-up"));
        command.arg(path).args(["--try", "--once"]).current_dir(folder).env_remove("NIXL_PREFIX");
        let output = finished(command).await;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        match output.status.success() {
            true => break said,
            // Somebody took a port meanwhile.
            false if said.contains("in use") && tries < 3 => tries += 1,
            false => panic!("{said}"),
        }
    };
    assert!(said.contains("KiB of KV cache over NIXL"), "{said}");
}
