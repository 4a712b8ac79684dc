//! Models by hub id: against a hub on loopback.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::fake_hub::{Behaviour, COMMIT, FORMER_NAME, FakeHub};
use baton_integration::process::{Program, free_port};
use baton_integration::tiny_model::TinyModel;
use baton_workerd::model::hub::{Deadlines, HubError, HubSettings, ModelId, fetch};
use baton_workerd::model::{self, Model};
use serde_json::json;
use tempfile::TempDir;

use crate::support::{READY, STOP};

const ID: &str = "baton-tests/tiny";

/// A hub with a tiny model and an empty cache.
struct Scene {
    hub: FakeHub,
    settings: HubSettings,
    model: TempDir,
    _cache: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self::with(|folder| TinyModel::default().write(folder).unwrap())
    }

    fn with(write: impl Fn(&Path)) -> Self {
        let [model, cache] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        write(model.path());
        let hub = FakeHub::start(ID, model.path()).unwrap();
        let settings = HubSettings {
            cache: cache.path().join("hub"),
            endpoint: hub.endpoint(),
            token: None,
            offline: false,
            deadlines: Deadlines {
                answer: Duration::from_secs(20),
                stall: Duration::from_secs(20),
                tries: 3,
                pause: Duration::from_millis(1),
            },
        };
        Self { hub, settings, model, _cache: cache }
    }

    fn fetch(&self) -> Result<PathBuf, HubError> {
        fetch(&ModelId::parse(ID).unwrap(), &self.settings)
    }

    fn refused(&self) -> String {
        self.fetch().unwrap_err().to_string()
    }

    /// All names below the cache.
    fn names(&self) -> Vec<String> {
        fn walk(folder: &Path, into: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                into.push(path.file_name().unwrap().to_string_lossy().into_owned());
                if path.is_dir() && !path.is_symlink() {
                    walk(&path, into);
                }
            }
        }
        let mut names = Vec::new();
        walk(&self.settings.cache, &mut names);
        names
    }
}

fn same(one: &Model, two: &Model) -> bool {
    one.spec == two.spec && one.content_hash == two.content_hash
}

#[test]
fn a_model_is_downloaded_once_into_the_layout_of_the_hubs_own_tools() {
    let scene = Scene::new();
    let path = scene.fetch().unwrap();
    let repository = scene.settings.cache.join("models--baton-tests--tiny");
    assert_eq!(path, repository.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    let link = std::fs::read_link(path.join("model.safetensors")).unwrap();
    assert!(link.starts_with("../../blobs"), "{link:?}");
    assert_eq!(link.file_name().unwrap().len(), 64, "named by its SHA-256");
    let [fetched, original] = [&*path, scene.model.path()].map(|path| model::load(path).unwrap());
    assert!(same(&fetched, &original));
    let asked = scene.hub.requests();
    assert!(asked.last().unwrap().contains("model.safetensors"), "weights come last: {asked:?}");
    assert_eq!(scene.fetch().unwrap(), path);
    assert_eq!(scene.hub.requests(), [""; 0], "what is cached is not asked for");
    assert!(!scene.names().iter().any(|name| name.ends_with(".incomplete")));
}

#[test]
fn what_was_cut_is_resumed_where_it_broke_off_and_comes_out_whole() {
    let scene = Scene::new();
    let size = std::fs::metadata(scene.model.path().join("model.safetensors")).unwrap().len();
    let part = size as usize / 3 + 1;
    scene.hub.behave(Behaviour { cut_after: Some(part), ..Behaviour::default() });
    let path = scene.fetch().unwrap();
    assert!(same(&model::load(&path).unwrap(), &model::load(scene.model.path()).unwrap()));
    let asked = scene.hub.requests();
    let ranges: Vec<_> = asked.iter().filter_map(|line| line.split_once("bytes=")).collect();
    let from = |(_, range): &(&str, &str)| range.trim_end_matches('-').parse::<usize>().unwrap();
    // Once at the hub and once at the host it redirects to.
    let mut starts: Vec<usize> = ranges.iter().map(from).collect();
    starts.dedup();
    assert!(starts.len() >= 2 && starts.is_sorted() && starts[0] <= part, "{asked:?}");
}

#[test]
fn a_download_goes_on_where_an_earlier_process_left_it() {
    let scene = Scene::new();
    // Nothing comes of an attempt: the first one brings a part, the following give up.
    scene.hub.behave(Behaviour { cut_after: Some(0), ..Behaviour::default() });
    let e = scene.refused();
    assert!(e.contains("model.safetensors") && e.contains("cannot be reached"), "{e}");
    let blobs = scene.settings.cache.join("models--baton-tests--tiny/blobs");
    let partial = std::fs::read_dir(&blobs).unwrap().map(|entry| entry.unwrap().path());
    let partial = partial.filter(|path| path.extension().is_some()).collect::<Vec<_>>();
    let [partial] = partial.as_slice() else { panic!("{partial:?}") };
    let original = std::fs::read(scene.model.path().join("model.safetensors")).unwrap();
    std::fs::write(partial, &original[..20_000]).unwrap();
    scene.hub.requests();
    for behaviour in [
        Behaviour::default(),
        // A host that cannot resume sends all of it again.
        Behaviour { ignores_ranges: true, ..Behaviour::default() },
    ] {
        scene.hub.behave(behaviour);
        let path = scene.fetch().unwrap();
        assert!(same(&model::load(&path).unwrap(), &model::load(scene.model.path()).unwrap()));
        let asked = scene.hub.requests();
        assert!(asked.iter().any(|line| line.ends_with("bytes=20000-")), "{asked:?}");
        std::fs::remove_file(path.join("model.safetensors")).unwrap();
        std::fs::remove_file(partial.with_extension("")).unwrap();
        std::fs::write(partial, &original[..20_000]).unwrap();
    }
}

#[test]
fn damaged_bytes_are_refused_with_both_hashes_and_not_kept() {
    let scene = Scene::new();
    scene.hub.behave(Behaviour { damages: true, ..Behaviour::default() });
    match scene.fetch().unwrap_err() {
        HubError::WrongHash { file, found, expected } => {
            assert_ne!(found, expected);
            assert_eq!(file, "model.safetensors");
        }
        other => panic!("{other}"),
    }
    assert!(!scene.names().iter().any(|name| name.ends_with(".incomplete")));
    assert!(!scene.names().contains(&"model.safetensors".to_owned()));
    scene.hub.behave(Behaviour::default());
    scene.fetch().unwrap();
}

#[test]
fn a_model_that_is_not_everybodys_says_what_it_takes() {
    let mut scene = Scene::new();
    let secret = Behaviour { token: Some("hf_x".into()), ..Behaviour::default() };
    scene.hub.behave(secret.clone());
    let e = scene.refused();
    assert!(e.contains(ID) && e.contains("set `HF_TOKEN`") && e.contains("401"), "{e}");
    scene.settings.token = Some("hf_wrong".into());
    let e = scene.refused();
    assert!(e.contains("the token of `HF_TOKEN` does not allow it; it says: not for you"), "{e}");
    assert!(!e.contains("hf_wrong"), "{e}");
    scene.settings.token = Some("hf_x".into());
    scene.hub.behave(Behaviour { is_gated: true, ..secret.clone() });
    let e = scene.refused();
    assert!(e.contains("it is gated: accept its conditions at `http://127.0.0.1"), "{e}");
    assert!(e.contains("with the account of `HF_TOKEN`"), "{e}");
    // The host that has the bytes refuses whoever shows the token there.
    scene.hub.behave(secret);
    scene.fetch().unwrap();
}

#[test]
fn a_renamed_model_is_found_by_its_former_name_with_the_token_too() {
    let mut scene = Scene::new();
    scene.settings.token = Some("hf_x".into());
    scene.hub.behave(Behaviour { token: Some("hf_x".into()), ..Behaviour::default() });
    let id = ModelId::parse(&format!("baton-tests/{FORMER_NAME}")).unwrap();
    let path = fetch(&id, &scene.settings).unwrap();
    assert!(path.to_str().unwrap().contains(FORMER_NAME), "{path:?}");
    model::load(&path).unwrap();
}

#[test]
fn what_the_hub_does_not_have_is_named() {
    let scene = Scene::new();
    let fetch = |id: &str| fetch(&ModelId::parse(id).unwrap(), &scene.settings).unwrap_err();
    let e = fetch("baton-tests/other").to_string();
    assert!(e.contains("the hub has no `baton-tests/other`") && e.contains("404"), "{e}");
    let e = fetch("baton-tests/tiny@v2").to_string();
    assert!(e.contains("no `baton-tests/tiny@v2`"), "{e}");
    let e = fetch("baton-tests/tiny/x.gguf").to_string();
    assert!(e.contains("`baton-tests/tiny` has no `x.gguf`; it has none"), "{e}");
}

#[test]
fn offline_uses_the_cache_and_never_the_hub() {
    let mut scene = Scene::new();
    scene.settings.offline = true;
    let e = scene.refused();
    assert!(e.contains("is not in the cache") && e.contains("`HF_HUB_OFFLINE`"), "{e}");
    assert_eq!(scene.hub.requests(), [""; 0]);
    scene.settings.offline = false;
    let path = scene.fetch().unwrap();
    scene.hub.requests();
    scene.settings.offline = true;
    assert_eq!(scene.fetch().unwrap(), path);
    assert_eq!(scene.hub.requests(), [""; 0]);
}

#[test]
fn a_hub_that_is_not_there_or_stumbles_is_told_or_waited_for() {
    let mut scene = Scene::new();
    scene.hub.behave(Behaviour { failures: 2, ..Behaviour::default() });
    scene.fetch().unwrap();
    let other = Scene::new();
    other.hub.behave(Behaviour { failures: 100, ..Behaviour::default() });
    assert!(other.refused().contains("status 503"));
    scene.settings.cache = scene.settings.cache.join("empty");
    scene.settings.endpoint = format!("http://127.0.0.1:{}", free_port().unwrap());
    let e = scene.refused();
    assert!(e.contains("cannot be reached") && e.contains("HF_ENDPOINT"), "{e}");
}

#[test]
fn a_gguf_repository_gives_its_one_file_or_the_one_that_is_named() {
    let one = Scene::with(|folder| {
        TinyModel::default().write_gguf(&folder.join("tiny-F32.gguf")).unwrap();
    });
    let path = one.fetch().unwrap();
    assert!(path.ends_with(format!("{COMMIT}/tiny-F32.gguf")), "{path:?}");
    let two = Scene::with(|folder| {
        for seed in [1, 2] {
            let tiny = TinyModel { seed, ..TinyModel::default() };
            tiny.write_gguf(&folder.join(format!("tiny-{seed}.gguf"))).unwrap();
        }
    });
    let e = two.refused();
    assert!(e.contains("`baton-tests/tiny/FILE`: tiny-1.gguf, tiny-2.gguf"), "{e}");
    let id = ModelId::parse("baton-tests/tiny/tiny-2.gguf").unwrap();
    let path = fetch(&id, &two.settings).unwrap();
    assert!(path.ends_with("tiny-2.gguf"));
    assert!(!two.names().contains(&"tiny-1.gguf".to_owned()), "only what is needed is fetched");
}

#[test]
fn shards_are_fetched_as_the_index_names_them_and_only_plain_names() {
    let index = |folder: &Path, map: serde_json::Value| {
        let text = json!({ "weight_map": map }).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
    };
    let split = |folder: &Path| {
        TinyModel::default().write(folder).unwrap();
        std::fs::rename(folder.join("model.safetensors"), folder.join("part.safetensors")).unwrap();
        std::fs::write(folder.join("other.safetensors"), "unused").unwrap();
    };
    let scene = Scene::with(|folder| {
        split(folder);
        index(folder, json!({ "model.norm.weight": "part.safetensors" }));
    });
    let path = scene.fetch().unwrap();
    assert!(path.join("part.safetensors").exists() && !path.join("other.safetensors").exists());
    for (name, rule) in [
        ("../../x.safetensors", "is no plain name"),
        ("gone.safetensors", "has no `gone.safetensors`"),
    ] {
        let scene = Scene::with(|folder| {
            split(folder);
            index(folder, json!({ "model.norm.weight": name }));
        });
        let e = format!("{:#}", anyhow::Error::from(scene.fetch().unwrap_err()));
        assert!(e.contains(rule), "{e}");
    }
}

#[tokio::test]
async fn a_worker_serves_a_hub_id_under_that_name() {
    let scene = tokio::task::spawn_blocking(Scene::new).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let port = free_port().unwrap();
    let listen = format!("127.0.0.1:{port}");
    let mut program = Program::new(
        "baton-workerd",
        "worker",
        [ID, "--listen", &listen, "--threads", "1", "--kv-pool", "16MiB"],
    );
    let home = folder.path().join("home").to_str().unwrap().to_owned();
    program.env = vec![
        ("HF_HOME".into(), home),
        ("HF_ENDPOINT".into(), scene.hub.endpoint()),
        ("HF_HUB_OFFLINE".into(), "0".into()),
    ];
    let mut process = program.spawn(folder.path()).unwrap();
    let client = Client::new(([127, 0, 0, 1], port).into());
    let begun = std::time::Instant::now();
    while !matches!(client.get("/health").await, Ok(answer) if answer.status == 200) {
        assert!(process.ended().unwrap().is_none(), "{}", process.log());
        assert!(begun.elapsed() < READY, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let request = json!({"model": ID, "prompt": "hello", "max_tokens": 2, "temperature": 0});
    client.post("/v1/completions", &request).await.unwrap().ok().unwrap();
    let models = client.get("/v1/models").await.unwrap().json().unwrap();
    assert_eq!(models["data"][0]["id"], ID);
    assert!(process.terminate(STOP).unwrap().success());
    // The runtime of the hub may not end inside another one.
    tokio::task::spawn_blocking(move || drop(scene)).await.unwrap();
}
