//! How a token is chosen: parameters, a counter-based random number (seed, output position), the host sampler.

/// Parameters of one sequence; validated by the API, so every value is in range here.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy.
    pub temperature: f32,
    /// Smallest set of most probable tokens with this mass; 1 = off.
    pub top_p: f32,
    /// Most probable tokens kept; 0 = off.
    pub top_k: u32,
    /// Tokens below this share of the best one's probability are dropped; 0 = off.
    pub min_p: f32,
    /// Seeds the random numbers, one an output position.
    pub seed: u64,
    /// Subtracted from a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of each token that was generated.
    pub presence_penalty: f32,
    /// Divides (positive) or multiplies (negative) the logit of each token of prompt and output; 1 = off.
    pub repetition_penalty: f32,
    /// `Some(n)`: report the sampled token's log-probability and the `n` best tokens'.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logprobs: None,
        }
    }
}
