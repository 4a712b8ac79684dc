//! What runs beside a request, and how it is cut into steps, does not change its tokens.

use super::*;

fn asks() -> Vec<Ask> {
    let lengths = [1, 3, 4, 5, 8, 17, 30, 45];
    (0..).zip(lengths).map(|(seed, len)| Ask::varied(seed, len, 9 + seed as u32)).collect()
}

/// What each ask gives on an engine of its own.
fn alone() -> Vec<Answer> {
    asks().into_iter().map(|ask| Rig::with_lag(0).answer(ask)).collect()
}

fn together(rig: &Rig) -> Vec<Answer> {
    let receivers: Vec<_> = asks().into_iter().map(|ask| rig.submit(ask)).collect();
    let answers = receivers.into_iter().map(Answer::of).collect();
    rig.until_free();
    answers
}

#[test]
fn an_answer_has_a_start_its_tokens_and_a_reason() {
    for (ask, answer) in asks().iter().zip(alone()) {
        assert_eq!((answer.starts, answer.failure, &answer.leased), (1, None, &None));
        assert_eq!(answer.tokens.len(), ask.max_tokens as usize);
        assert_eq!(answer.finish, Some(FinishReason::Length));
        let wants = ask.sampling.logprobs;
        assert!(answer.tokens.iter().all(|token| (token.rank > 0) == wants.is_some()));
        assert!(answer.tokens.iter().all(|token| token.top.len() == wants.unwrap_or(0) as usize));
    }
}

#[test]
fn eight_concurrent_requests_are_answered_as_each_alone() {
    for lag in [0, 1] {
        assert_eq!(together(&Rig::with_lag(lag)), alone(), "lag {lag}");
    }
}

#[test]
fn prompts_in_chunks_are_answered_as_whole_ones() {
    for (lag, max_batch_tokens) in [(0, 1), (0, 3), (1, 5), (1, 16)] {
        let config = EngineConfig { max_batch_tokens, ..EngineConfig::default() };
        let rig = Rig::new(config, fake_with(lag));
        assert_eq!(together(&rig), alone(), "lag {lag}, {max_batch_tokens} tokens a step");
        let prompts: usize = asks().iter().map(|ask| ask.prompt.len()).sum();
        assert_eq!(rig.handle.status().totals.prompt_computed, prompts as u64);
    }
}

#[test]
fn preempted_requests_are_answered_as_undisturbed_ones() {
    for lag in [0, 1] {
        let rig = Rig::new(EngineConfig::default(), small_pool(18, lag));
        assert_eq!(together(&rig), alone(), "lag {lag}");
        let totals = rig.handle.status().totals;
        assert!(totals.preemptions > 0, "the pool was meant to be too small");
        let prompts: usize = asks().iter().map(|ask| ask.prompt.len()).sum();
        assert!(totals.prompt_computed > prompts as u64);
        let tokens: u32 = asks().iter().map(|ask| ask.max_tokens).sum();
        assert_eq!(totals.generated, u64::from(tokens));
    }
}

#[test]
fn more_requests_than_slots_take_turns() {
    let config = EngineConfig { max_sequences: 2, ..EngineConfig::default() };
    assert_eq!(together(&Rig::new(config, fake_with(1))), alone());
}

#[test]
fn a_stop_id_ends_the_text_with_itself() {
    for lag in [0, 1] {
        let ask = Ask::varied(2, 6, 12);
        let all = Rig::with_lag(lag).answer(ask.clone()).ids();
        let stop = all[7];
        let first = all.iter().position(|token| *token == stop).unwrap();
        let rig = Rig::with_lag(lag);
        let answer = rig.answer(Ask { stop_ids: vec![stop], ..ask });
        assert_eq!(answer.ids(), all[..=first]);
        assert_eq!(answer.finish, Some(FinishReason::Stop));
        rig.until_free();
    }
}

#[test]
fn a_sequence_ends_at_the_longest_length() {
    for lag in [0, 1] {
        let config = EngineConfig { max_len: 10, ..EngineConfig::default() };
        let answer = Rig::new(config, fake_with(lag)).answer(Ask::varied(2, 6, 50));
        assert_eq!((answer.tokens.len(), answer.finish), (4, Some(FinishReason::Length)));
        let answer = Rig::new(EngineConfig::default(), small_pool(3, lag));
        let answer = answer.answer(Ask::varied(2, 6, 50));
        assert_eq!((answer.tokens.len(), answer.finish), (6, Some(FinishReason::Length)));
    }
}

#[test]
fn one_token_is_enough_for_one_token() {
    let answer = Rig::with_lag(1).answer(Ask::varied(4, 1, 1));
    assert_eq!((answer.tokens.len(), answer.finish), (1, Some(FinishReason::Length)));
}

#[test]
fn requests_the_engine_cannot_serve_are_refused_with_the_reason() {
    let config = EngineConfig { max_len: 20, ..EngineConfig::default() };
    let rig = Rig::new(config, fake_with(0));
    for (ask, code) in [
        (Ask::greedy(vec![], 4), ErrorCode::InvalidRequest),
        (Ask::greedy(vec![1, 97], 4), ErrorCode::InvalidRequest),
        (Ask::greedy(vec![1], 0), ErrorCode::InvalidRequest),
        (Ask::greedy(vec![1; 20], 4), ErrorCode::ContextLengthExceeded),
    ] {
        let answer = rig.answer(ask);
        assert_eq!((answer.failure, answer.starts), (Some(code), 0));
    }
    assert_eq!(rig.answer(Ask::greedy(vec![1; 19], 4)).tokens.len(), 1);
}
