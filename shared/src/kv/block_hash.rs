//! Names of full blocks: each is chained to the block before it, so a name stands for all tokens up to its block's end.
//!
//! A worker finds blocks in its own pool by [`PoolHash`], which is fast, 128 bits wide and seeded with a secret; whoever
//! shares a block compares its tokens as well. Others hear of blocks by the hashes of TensorRT-LLM's events
//! ([`EventHash`]), which are the same in every process.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use twox_hash::XxHash3_128;

/// `cache_salt` of a request, as its SHA-256: only requests with the same salt share blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CacheSalt([u8; 32]);

/// A block's name inside one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolHash(u128);

/// Makes [`PoolHash`]es; a memory for their input.
#[derive(Clone)]
pub struct PoolHasher {
    seed: u64,
    input: Vec<u8>,
}

/// Which hashes events carry: `kv_cache_event_hash_algo`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventHashAlgorithm {
    /// 64 bits, mixed token by token.
    #[default]
    V1BlockKey,
    /// SHA-256, in hexadecimal digits on the wire.
    V2Sha256,
    /// The same, its first 8 bytes on the wire.
    #[serde(rename = "v2_sha256_64")]
    V2Sha256Short,
}

/// A block's name in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventHash {
    /// Of [`EventHashAlgorithm::V1BlockKey`].
    Key(u64),
    /// Of the others.
    Digest([u8; 32]),
}

/// What tells blocks of the same tokens apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockExtra {
    /// LoRA task.
    pub lora: Option<u64>,
    /// [`CacheSalt::id`].
    pub salt: Option<u64>,
}

impl CacheSalt {
    /// The salt of a request's text.
    pub fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    /// The salt as events hash it.
    pub fn id(&self) -> u64 {
        u64::from_le_bytes(first(&self.0))
    }
}

impl std::fmt::Debug for CacheSalt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CacheSalt(..)")
    }
}

impl PoolHash {
    /// The name before the first block.
    pub fn root(salt: Option<&CacheSalt>) -> Self {
        Self(salt.map_or(0, |salt| u128::from_le_bytes(first(&salt.0))))
    }
}

impl PoolHasher {
    /// With a seed nobody outside knows, nobody outside can make two names collide.
    pub fn new(seed: u64) -> Self {
        Self { seed, input: Vec::new() }
    }

    /// The name of the block of `tokens` after `parent`.
    pub fn next(&mut self, parent: PoolHash, tokens: &[u32]) -> PoolHash {
        self.input.clear();
        self.input.extend(parent.0.to_le_bytes());
        tokens.iter().for_each(|token| self.input.extend(token.to_le_bytes()));
        PoolHash(XxHash3_128::oneshot_with_seed(self.seed, &self.input))
    }
}

impl std::fmt::Debug for PoolHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PoolHasher(..)")
    }
}

impl EventHashAlgorithm {
    /// As `/server_info` and events name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1BlockKey => "v1_block_key",
            Self::V2Sha256 => "v2_sha256",
            Self::V2Sha256Short => "v2_sha256_64",
        }
    }

    /// The name of the block of `tokens` after `parent`; `None` = the first block.
    pub fn next(self, parent: Option<EventHash>, tokens: &[u32], extra: BlockExtra) -> EventHash {
        match (self, parent) {
            (Self::V1BlockKey, Some(EventHash::Key(parent))) => {
                EventHash::Key(v1_block_key(parent, tokens, extra))
            }
            (Self::V1BlockKey, _) => EventHash::Key(v1_block_key(0, tokens, extra)),
            (Self::V2Sha256 | Self::V2Sha256Short, Some(EventHash::Digest(parent))) => {
                EventHash::Digest(v2_block(&parent, tokens))
            }
            (Self::V2Sha256 | Self::V2Sha256Short, _) => {
                EventHash::Digest(v2_block(&v2_root(extra), tokens))
            }
        }
    }

    /// A name as it is written in JSON.
    pub fn wire(self, hash: EventHash) -> serde_json::Value {
        match (hash, self) {
            (EventHash::Key(key), _) => key.into(),
            (EventHash::Digest(digest), Self::V2Sha256Short) => {
                u64::from_be_bytes(first(&digest)).into()
            }
            (EventHash::Digest(digest), _) => {
                digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()
            }
        }
    }
}

/// TensorRT-LLM's 64-bit block key; `parent` = 0 for the first block, the only one a salt goes into.
pub fn v1_block_key(parent: u64, tokens: &[u32], extra: BlockExtra) -> u64 {
    let mut seed = tokens.len() as u64 ^ parent.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    if let (0, Some(salt)) = (parent, extra.salt) {
        seed = combined(mixed64(salt), seed);
    }
    for token in tokens {
        seed = combined(u64::from(mixed32(*token)), seed);
    }
    match extra.lora {
        Some(lora) => combined(mixed64(lora), seed),
        None => seed,
    }
}

/// What the first block's digest is chained to: SHA-256 of which fields there are, and the fields.
pub fn v2_root(extra: BlockExtra) -> [u8; 32] {
    let BlockExtra { lora, salt } = extra;
    let mask = u8::from(lora.is_some()) | (u8::from(salt.is_some()) << 1);
    let mut hash = Sha256::new_with_prefix([mask]);
    for field in [lora, salt].into_iter().flatten() {
        hash.update(field.to_le_bytes());
    }
    hash.finalize().into()
}

/// TensorRT-LLM's block digest: SHA-256 of the parent's and each token in 8 bytes.
pub fn v2_block(parent: &[u8; 32], tokens: &[u32]) -> [u8; 32] {
    let mut hash = Sha256::new_with_prefix(parent);
    for token in tokens {
        hash.update(u64::from(*token).to_le_bytes());
    }
    hash.finalize().into()
}

/// A mixed value folded into a seed; the constant was added to 32-bit values before.
fn combined(value: u64, seed: u64) -> u64 {
    seed ^ value.wrapping_add(seed << 6).wrapping_add(seed >> 2)
}

fn mixed32(value: u32) -> u32 {
    let step = |value: u32| ((value >> 16) ^ value).wrapping_mul(0x045D_9F3B);
    let value = step(step(value));
    ((value >> 16) ^ value).wrapping_add(0x9E37_79B9)
}

fn mixed64(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (value ^ (value >> 31)).wrapping_add(0x9E37_79B9)
}

fn first<const N: usize>(digest: &[u8; 32]) -> [u8; N] {
    std::array::from_fn(|at| digest[at])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NONE: BlockExtra = BlockExtra { lora: None, salt: None };
    const TOKENS: [u32; 4] = [1000, 1001, 1002, 1003];

    #[test]
    fn block_keys_are_those_of_tensorrt_llm() {
        let first = v1_block_key(0, &TOKENS, NONE);
        assert_eq!(first, 639_116_666_879_492);
        assert_eq!(v1_block_key(first, &[1004, 1005], NONE), 6_413_663_149_789_818_931);
        assert_eq!(v1_block_key(0, &[1], NONE), 3_478_951_329);
        let salted = BlockExtra { salt: Some(5), ..NONE };
        assert_eq!(v1_block_key(0, &[1], salted), 7_725_721_587_889_702_273);
        let lora = BlockExtra { lora: Some(7), ..NONE };
        assert_eq!(v1_block_key(0, &[1], lora), 1_346_066_497_089_795_028);
    }

    #[test]
    fn block_digests_are_those_of_tensorrt_llm() {
        let long = EventHashAlgorithm::V2Sha256;
        let short = EventHashAlgorithm::V2Sha256Short;
        let hash = long.next(None, &TOKENS, NONE);
        let hex = "329f42cc62686f37d468f960d4ab3f374aab54ef6654f174e706023667f49011";
        assert_eq!(long.wire(hash), json!(hex));
        assert_eq!(short.wire(hash), json!(3_647_707_668_785_164_087_u64));
        let salted = long.next(None, &TOKENS, BlockExtra { salt: Some(5), ..NONE });
        let hex = "894c81393b3614ae8601ff24205773c2b946a28125998a8e1c841ff9c3c17ad2";
        assert_eq!(long.wire(salted), json!(hex));
    }

    #[test]
    fn a_chain_goes_on_from_its_last_block() {
        for algorithm in [EventHashAlgorithm::V1BlockKey, EventHashAlgorithm::V2Sha256] {
            let root = algorithm.next(None, &TOKENS, NONE);
            let next = algorithm.next(Some(root), &TOKENS, NONE);
            assert_ne!(next, root);
            assert_eq!(next, algorithm.next(Some(root), &TOKENS, NONE));
        }
        let EventHash::Key(key) = EventHashAlgorithm::V1BlockKey.next(
            Some(EventHash::Key(639_116_666_879_492)),
            &[1004, 1005],
            NONE,
        ) else {
            panic!("a key")
        };
        assert_eq!(key, 6_413_663_149_789_818_931);
    }

    #[test]
    fn a_salt_is_named_by_the_beginning_of_its_digest() {
        // printf tenant | sha256sum
        assert_eq!(CacheSalt::of("tenant").id(), 0x769a_cf51_d386_dae9);
        assert_eq!(format!("{:?}", CacheSalt::of("tenant")), "CacheSalt(..)");
    }

    #[test]
    fn pool_names_depend_on_all_that_comes_before_and_on_the_salt() {
        let mut hasher = PoolHasher::new(3);
        let roots = [None, Some(CacheSalt::of("a")), Some(CacheSalt::of("b"))];
        let mut names = std::collections::HashSet::new();
        for root in roots.iter().map(|salt| PoolHash::root(salt.as_ref())) {
            for tokens in [[1, 2], [2, 1], [1, 3]] {
                let one = hasher.next(root, &tokens);
                assert_eq!(one, hasher.next(root, &tokens));
                assert!(names.insert(one) && names.insert(hasher.next(one, &[1, 2])));
            }
        }
        let root = PoolHash::root(None);
        assert_ne!(PoolHasher::new(4).next(root, &[1, 2]), hasher.next(root, &[1, 2]));
    }

    #[test]
    fn algorithms_are_written_as_they_are_read() {
        for (name, algorithm) in [
            ("v1_block_key", EventHashAlgorithm::V1BlockKey),
            ("v2_sha256", EventHashAlgorithm::V2Sha256),
            ("v2_sha256_64", EventHashAlgorithm::V2Sha256Short),
        ] {
            assert_eq!(
                serde_json::from_value::<EventHashAlgorithm>(json!(name)).unwrap(),
                algorithm
            );
            assert_eq!(serde_json::to_value(algorithm).unwrap(), json!(name));
            assert_eq!(algorithm.as_str(), name);
        }
    }
}
