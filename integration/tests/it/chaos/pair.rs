//! A context worker and a generation worker killed at once under a steady load.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use toml::Table;

use super::judge::{self, Verdict};
use crate::fire::scene::{CONTEXTS, GENERATIONS, PATIENCE, Scene, Way};
use crate::support::{all_free, note};

const REQUESTS: usize = 300;
/// 100 requests a second.
const INTERVAL: Duration = Duration::from_millis(10);
/// Which request sees them die.
const DEATH: usize = 100;
/// Most that such workers can have been streaming.
const MOST_BROKEN: usize = 20;

#[tokio::test]
async fn a_pair_that_is_killed_under_load_costs_only_what_it_was_streaming() {
    let mut scene = Scene::start(Way::Cma, Table::new()).await;
    let mut random = StdRng::seed_from_u64(7);
    let reference = scene.worker(CONTEXTS[0]).client();
    let questions = judge::questions(&mut random, 42, &scene.model, reference).await;
    scene.warm_up().await;
    let (client, mut ticks) = (scene.client(), tokio::time::interval(INTERVAL));
    let mut asked = Vec::new();
    for index in 0..REQUESTS {
        ticks.tick().await;
        if index == DEATH {
            for worker in [CONTEXTS[1], GENERATIONS[1]] {
                scene.running.cluster.workers[worker].process.signal("KILL").unwrap();
            }
        }
        let question = questions[index % questions.len()].clone();
        asked.push(tokio::spawn(async move {
            judge::ask(client, &question, index % 3 != 0).await.map_err(|wrong| (index, wrong))
        }));
    }
    let mut broken = 0;
    for task in asked {
        if task.await.unwrap().unwrap() == Verdict::BrokenOff {
            broken += 1;
        }
    }
    note(format_args!("{broken} of {REQUESTS} answers broke off"));
    assert!(broken <= MOST_BROKEN, "{broken} answers broke off");
    let retries = scene.retries("context").await + scene.retries("generation").await;
    assert!(retries >= 1.0, "nobody met the dead");
    for worker in [GENERATIONS[1], CONTEXTS[1]] {
        scene.restart(worker).await;
    }
    all_free(&scene.running.cluster, PATIENCE).await;
    scene.running.stop();
}
