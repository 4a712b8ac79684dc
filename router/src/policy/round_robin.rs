//! In turn: the `turn`-th pick takes the `turn`-th place of a circle in which each worker has `weight` places.

use std::sync::Arc;

use crate::table::worker::Worker;

/// With equal weights this is upstream's `list[i mod n]` over the workers that fit.
pub(super) fn pick(
    candidates: &[Arc<Worker>],
    fits: &dyn Fn(&Worker) -> bool,
    turn: u64,
) -> Option<usize> {
    let fitting = || candidates.iter().enumerate().filter(|(_, worker)| fits(worker));
    let places: u64 = fitting().map(|(_, worker)| u64::from(worker.weight)).sum();
    let mut place = turn.checked_rem(places)?;
    // Health may change between the two passes; then the last one that still fits is as good.
    let mut last = None;
    for (index, worker) in fitting() {
        last = Some(index);
        match place.checked_sub(u64::from(worker.weight)) {
            Some(rest) => place = rest,
            None => break,
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::worker::WorkerSpec;
    use baton_shared::role::Role;

    #[test]
    fn equal_weights_are_taken_in_configured_order() {
        let pool: Vec<_> = (0..3)
            .map(|slot| {
                let endpoint: baton_shared::config::net::Endpoint =
                    format!("w:{}", slot + 1).parse().unwrap();
                let id = endpoint.to_string().parse().unwrap();
                let spec =
                    WorkerSpec { id, endpoint, role: Role::Generation, weight: 1, dialect: None };
                Arc::new(Worker::new(spec, slot))
            })
            .collect();
        let order: Vec<_> = (0..7).map(|turn| pick(&pool, &|_| true, turn).unwrap()).collect();
        assert_eq!(order, [0, 1, 2, 0, 1, 2, 0]);
    }
}
