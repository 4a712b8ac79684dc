//! Hand-over record v1: what a context worker tells the generation worker that takes over, inside
//! `encoded_opaque_state`. Binary, little-endian, length-prefixed, at most 1 MiB, closed by a tag.
//!
//! `magic "BTKV" · version u16 · key id [4] · content · tag [32]`. The tag covers everything before it and is
//! checked, in constant time, before anything behind the header is parsed: metadata that was altered on its way
//! would abort the process that hands it to NIXL. Whether a record fits a request is not decided here.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::bytes::{Reader, Writer};
use super::layout::{KvDtype, KvLayout};
use crate::id::{BlockIndex, DisaggRequestId, Incarnation, LeaseId, WorkerId};
use crate::wire::auth::{Keys, Purpose};

/// Largest record, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
const MAGIC: [u8; 4] = *b"BTKV";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 10;
const TAG_BYTES: usize = 32;
const MAX_TEXT: usize = 512;
const MAX_METADATA: usize = 64 << 10;
const MAX_RANKS: usize = 256;

/// A record's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who computed.
    pub worker: WorkerId,
    /// Its HTTP address, `host:port`.
    pub address: String,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// The request both phases share.
    pub request: DisaggRequestId,
    /// SHA-256 of the prompt's token ids and cache salt ([`prompt_hash`]).
    pub prompt_hash: [u8; 32],
    /// What makes two caches the same (`kv::fingerprint`).
    pub fingerprint: [u8; 32],
    /// Prompt tokens whose keys and values are in the blocks.
    pub prompt_tokens: u32,
    /// The blocks; `None` = *complete*: the answer is known from `first_gen_tokens`, nothing to pull.
    pub lease: Option<LeasedBlocks>,
}

/// Blocks pinned for one reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeasedBlocks {
    /// Names the lease.
    pub lease: LeaseId,
    /// Unix milliseconds after which the blocks may be gone; advisory.
    pub expires_unix_ms: u64,
    /// One entry a rank.
    pub ranks: Vec<RankBlocks>,
}

/// One rank's part.
#[derive(Clone, PartialEq, Eq)]
pub struct RankBlocks {
    /// NIXL agent that serves reads.
    pub agent: String,
    /// Its metadata: whoever holds it can read the pool, so it is never logged.
    pub metadata: Vec<u8>,
    /// Address of the pool in that process.
    pub pool_base: u64,
    /// Device of the pool: `None` = host memory.
    pub device: Option<u32>,
    /// How the pool lies.
    pub layout: KvLayout,
    /// Address of the lease's epoch word.
    pub epoch_address: u64,
    /// What the word must still be after the blocks were read.
    pub epoch: u64,
    /// Blocks in prompt order, as runs of neighbours.
    pub blocks: Vec<Range<u32>>,
}

impl std::fmt::Debug for RankBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RankBlocks")
            .field("agent", &self.agent)
            .field("blocks", &self.blocks)
            .finish_non_exhaustive()
    }
}

/// Why bytes are no record; each is `kv_state_invalid` on the wire. Nothing of the content is in the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not a record at all, or (with a right tag) one that its writer got wrong.
    #[error("hand-over record is garbage: {0}")]
    Garbage(&'static str),
    /// Shorter than any record.
    #[error("hand-over record is truncated")]
    Truncated,
    /// Altered, cut, or signed with a key we do not have.
    #[error("hand-over record was altered, or signed with a key that is not ours")]
    BadTag,
    /// Of another Baton.
    #[error("hand-over record has version {0}, this worker reads version 1")]
    UnknownVersion(u16),
    /// More than [`MAX_BYTES`].
    #[error("hand-over record is longer than 1 MiB")]
    TooLarge,
}

impl Record {
    /// The signed bytes.
    ///
    /// # Errors
    /// [`RecordError::TooLarge`]: hundreds of thousands of scattered blocks.
    pub fn encode(&self, keys: &Keys) -> Result<Vec<u8>, RecordError> {
        let mut out = Writer::default();
        out.raw(&MAGIC);
        out.u16(VERSION);
        out.raw(&keys.signing_id());
        self.write(&mut out);
        if out.as_slice().len() + TAG_BYTES > MAX_BYTES {
            return Err(RecordError::TooLarge);
        }
        let (_, tag) = keys.sign(Purpose::Record, out.as_slice());
        out.raw(&tag);
        Ok(out.into_vec())
    }

    /// Checks the tag, then reads.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(bytes: &[u8], keys: &Keys) -> Result<Self, RecordError> {
        let mut content = Reader::new(verified(bytes, keys)?);
        let record = read_record(&mut content).map_err(RecordError::Garbage)?;
        if content.is_empty() { Ok(record) } else { Err(RecordError::Garbage("it goes on")) }
    }

    /// [`Self::encode`] as `encoded_opaque_state` carries it: standard base64.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_text(&self, keys: &Keys) -> Result<String, RecordError> {
        self.encode(keys).map(|bytes| STANDARD.encode(bytes))
    }

    /// [`Self::decode`] of standard base64, padded, without white space.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode_text(text: &str, keys: &Keys) -> Result<Self, RecordError> {
        if text.len() > MAX_BYTES.div_ceil(3) * 4 {
            return Err(RecordError::TooLarge);
        }
        let bytes = STANDARD.decode(text).map_err(|_| RecordError::Garbage("it is not base64"))?;
        Self::decode(&bytes, keys)
    }

    fn write(&self, out: &mut Writer) {
        out.piece(self.worker.as_str().as_bytes());
        out.piece(self.address.as_bytes());
        out.raw(&self.incarnation.0);
        out.u64(self.request.0);
        out.raw(&self.prompt_hash);
        out.raw(&self.fingerprint);
        out.u32(self.prompt_tokens);
        let Some(leased) = &self.lease else {
            out.u8(0);
            return;
        };
        out.u8(1);
        out.raw(&leased.lease.0);
        out.u64(leased.expires_unix_ms);
        out.count(leased.ranks.len());
        for rank in &leased.ranks {
            write_rank(out, rank);
        }
    }
}

/// The content of a record whose tag is right.
fn verified<'a>(bytes: &'a [u8], keys: &Keys) -> Result<&'a [u8], RecordError> {
    if bytes.len() > MAX_BYTES {
        return Err(RecordError::TooLarge);
    }
    let (signed, tag) = bytes.split_last_chunk::<TAG_BYTES>().ok_or(RecordError::Truncated)?;
    let (header, content) = signed.split_at_checked(HEADER_BYTES).ok_or(RecordError::Truncated)?;
    let mut header = Reader::new(header);
    let magic: [u8; 4] = header.array("magic").map_err(RecordError::Garbage)?;
    if magic != MAGIC {
        return Err(RecordError::Garbage("it does not begin as a record"));
    }
    let version = header.u16("version").map_err(RecordError::Garbage)?;
    if version != VERSION {
        return Err(RecordError::UnknownVersion(version));
    }
    let key = header.array("key id").map_err(RecordError::Garbage)?;
    if keys.verify(Purpose::Record, key, signed, tag) {
        Ok(content)
    } else {
        Err(RecordError::BadTag)
    }
}

fn write_rank(out: &mut Writer, rank: &RankBlocks) {
    out.piece(rank.agent.as_bytes());
    out.piece(&rank.metadata);
    out.u64(rank.pool_base);
    out.u8(u8::from(rank.device.is_some()));
    out.u32(rank.device.unwrap_or(0));
    write_layout(out, &rank.layout);
    out.u64(rank.epoch_address);
    out.u64(rank.epoch);
    out.count(rank.blocks.len());
    for run in &rank.blocks {
        out.u32(run.start);
        out.u32(run.end);
    }
}

fn write_layout(out: &mut Writer, layout: &KvLayout) {
    out.u8(match layout.dtype {
        KvDtype::Bf16 => 1,
    });
    for number in [
        layout.block_tokens,
        layout.head_dim,
        layout.blocks,
        layout.layers.start,
        layout.layers.end,
        layout.heads.start,
        layout.heads.end,
    ] {
        out.u32(number);
    }
    for stride in [layout.stride_block, layout.stride_layer, layout.stride_head, layout.stride_kv] {
        out.u64(stride);
    }
}

fn read_record(content: &mut Reader<'_>) -> Result<Record, &'static str> {
    let worker = content.text(MAX_TEXT, "worker")?;
    let mut record = Record {
        worker: worker.parse().map_err(|_| "worker")?,
        address: content.text(MAX_TEXT, "address")?.to_owned(),
        incarnation: Incarnation(content.array("incarnation")?),
        request: DisaggRequestId(content.u64("request id")?),
        prompt_hash: content.array("prompt hash")?,
        fingerprint: content.array("fingerprint")?,
        prompt_tokens: content.u32("prompt tokens")?,
        lease: None,
    };
    match content.u8("lease")? {
        0 => {}
        1 => record.lease = Some(read_lease(content, record.prompt_tokens)?),
        _ => return Err("lease"),
    }
    Ok(record)
}

fn read_lease(content: &mut Reader<'_>, tokens: u32) -> Result<LeasedBlocks, &'static str> {
    let lease = LeaseId(content.array("lease id")?);
    let expires_unix_ms = content.u64("expiry")?;
    let count = content.count(1, MAX_RANKS, "rank count")?;
    let ranks: Vec<_> = (0..count).map(|_| read_rank(content, tokens)).collect::<Result<_, _>>()?;
    if ranks.is_empty() {
        Err("rank count")
    } else {
        Ok(LeasedBlocks { lease, expires_unix_ms, ranks })
    }
}

fn read_rank(content: &mut Reader<'_>, tokens: u32) -> Result<RankBlocks, &'static str> {
    let agent = content.text(MAX_TEXT, "agent")?.to_owned();
    let metadata = content.piece(MAX_METADATA, "agent metadata")?.to_vec();
    let pool_base = content.u64("pool address")?;
    let device = match (content.u8("device")?, content.u32("device")?) {
        (0, 0) => None,
        (1, device) => Some(device),
        _ => return Err("device"),
    };
    let layout = read_layout(content)?;
    pool_base.checked_add(layout.bytes()).ok_or("pool address")?;
    let epoch_address = content.u64("epoch address")?;
    if epoch_address == 0 || epoch_address % 8 != 0 {
        return Err("epoch address");
    }
    let epoch = content.u64("epoch")?;
    let runs = content.count(8, MAX_BYTES / 8, "block count")?;
    let mut blocks = Vec::with_capacity(runs);
    let mut held = 0;
    for _ in 0..runs {
        let run = content.u32("block")?..content.u32("block")?;
        if run.is_empty() || run.end > layout.blocks {
            return Err("block");
        }
        held += u64::from(run.end - run.start);
        blocks.push(run);
    }
    if held != u64::from(tokens.div_ceil(layout.block_tokens)) {
        return Err("block count");
    }
    Ok(RankBlocks { agent, metadata, pool_base, device, layout, epoch_address, epoch, blocks })
}

fn read_layout(content: &mut Reader<'_>) -> Result<KvLayout, &'static str> {
    let dtype = match content.u8("dtype")? {
        1 => KvDtype::Bf16,
        _ => return Err("dtype"),
    };
    let mut number = || content.u32("layout");
    let (block_tokens, head_dim, blocks) = (number()?, number()?, number()?);
    let (layers, heads) = (number()?..number()?, number()?..number()?);
    let mut stride = || content.u64("layout");
    let (stride_block, stride_layer) = (stride()?, stride()?);
    let (stride_head, stride_kv) = (stride()?, stride()?);
    let layout = KvLayout {
        dtype,
        block_tokens,
        head_dim,
        blocks,
        layers,
        heads,
        stride_block,
        stride_layer,
        stride_head,
        stride_kv,
    };
    layout.validate().map_err(|_| "layout")?;
    Ok(layout)
}

/// SHA-256 over a prompt's token ids and its cache salt: binds a record to its prompt.
pub fn prompt_hash(ids: &[u32], salt: Option<&str>) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"baton/prompt/1");
    hash.update([u8::from(salt.is_some())]);
    let salt = salt.unwrap_or_default().as_bytes();
    hash.update((salt.len() as u64).to_le_bytes());
    hash.update(salt);
    for id in ids {
        hash.update(id.to_le_bytes());
    }
    hash.finalize().into()
}

/// Neighbouring block ids joined to runs, order kept.
pub fn runs_of(blocks: &[BlockIndex]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for &BlockIndex(block) in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
    use std::path::Path;

    fn keys() -> Keys {
        Keys::parse(b"a-key-of-this-test-1\n", Path::new("keys")).unwrap()
    }

    fn sample(rng: &mut StdRng) -> Record {
        let blocks = 4096;
        let layout = KvLayout::block_major(KvDtype::Bf16, 32, 64, blocks, 0..30, 0..3);
        let runs: Vec<_> = (0..rng.random_range(1..9))
            .map(|_| {
                let start = rng.random_range(0..blocks - 8);
                start..start + rng.random_range(1..8)
            })
            .collect();
        let held: u32 = runs.iter().map(|run| run.end - run.start).sum();
        let mut metadata = vec![0; rng.random_range(0..600)];
        rng.fill_bytes(&mut metadata);
        Record {
            worker: "ctx-a".parse().unwrap(),
            address: "127.0.0.1:8001".to_owned(),
            incarnation: Incarnation(rng.random()),
            request: DisaggRequestId(rng.random()),
            prompt_hash: rng.random(),
            fingerprint: rng.random(),
            prompt_tokens: held * 32 - rng.random_range(0..32),
            lease: Some(LeasedBlocks {
                lease: LeaseId(rng.random()),
                expires_unix_ms: rng.random(),
                ranks: vec![RankBlocks {
                    agent: "ctx-a/0/serve/0123".to_owned(),
                    metadata,
                    pool_base: 0x7f00_0000_0000,
                    device: rng.random_bool(0.5).then_some(3),
                    layout,
                    epoch_address: 0x7f00_1000_0008,
                    epoch: rng.random(),
                    blocks: runs,
                }],
            }),
        }
    }

    /// Signs whatever content, as a broken writer would.
    fn signed(content: &[u8]) -> Vec<u8> {
        let mut out = Writer::default();
        out.raw(&MAGIC);
        out.u16(VERSION);
        out.raw(&keys().signing_id());
        out.raw(content);
        let (_, tag) = keys().sign(Purpose::Record, out.as_slice());
        out.raw(&tag);
        out.into_vec()
    }

    #[test]
    fn what_was_written_is_read_again() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..200 {
            let record = sample(&mut rng);
            let text = record.encode_text(&keys()).unwrap();
            assert_eq!(Record::decode_text(&text, &keys()).as_ref(), Ok(&record));
            let complete = Record { lease: None, ..record };
            let bytes = complete.encode(&Keys::none()).unwrap();
            assert_eq!(Record::decode(&bytes, &Keys::none()), Ok(complete));
        }
    }

    #[test]
    fn every_changed_byte_and_every_truncation_is_refused() {
        for keys in [keys(), Keys::none()] {
            let bytes = sample(&mut StdRng::seed_from_u64(2)).encode(&keys).unwrap();
            for at in 0..bytes.len() {
                for flip in [1, 0x20, 0x80, 0xff, 1 + (at as u8 & 0x3f)] {
                    let mut altered = bytes.clone();
                    altered[at] ^= flip;
                    assert!(Record::decode(&altered, &keys).is_err(), "byte {at} ^ {flip}");
                }
                assert!(Record::decode(&bytes[..at], &keys).is_err(), "cut at {at}");
            }
            let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
            assert_eq!(Record::decode(&longer, &keys), Err(RecordError::BadTag));
        }
    }

    #[test]
    fn every_changed_character_and_every_truncation_of_the_text_is_refused() {
        let text = sample(&mut StdRng::seed_from_u64(3)).encode_text(&keys()).unwrap();
        for at in 0..text.len() {
            for other in "AZaz09+/= \n-_\u{7f}".chars().filter(|&c| !text[at..].starts_with(c)) {
                let mut altered = text.clone();
                altered.replace_range(at..=at, &other.to_string());
                assert!(Record::decode_text(&altered, &keys()).is_err(), "{other:?} at {at}");
            }
            assert!(Record::decode_text(&text[..at], &keys()).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn each_way_to_be_wrong_has_its_name() {
        let bytes = sample(&mut StdRng::seed_from_u64(4)).encode(&keys()).unwrap();
        let decode = |bytes: &[u8]| Record::decode(bytes, &keys()).unwrap_err();
        assert_eq!(decode(&bytes[..41]), RecordError::Truncated);
        assert_eq!(decode(&bytes[..bytes.len() - 1]), RecordError::BadTag);
        assert!(matches!(decode(&[0; 64]), RecordError::Garbage(_)));
        let mut newer = bytes.clone();
        newer[4] = 2;
        assert_eq!(decode(&newer), RecordError::UnknownVersion(2));
        assert_eq!(decode(&vec![0; MAX_BYTES + 1]), RecordError::TooLarge);
        assert_eq!(Record::decode(&bytes, &Keys::none()), Err(RecordError::BadTag));
        assert!(matches!(
            Record::decode_text("%%%", &keys()),
            Err(RecordError::Garbage("it is not base64"))
        ));
    }

    #[test]
    fn content_with_a_right_tag_is_still_bounded() {
        let mut rng = StdRng::seed_from_u64(5);
        let bytes = sample(&mut rng).encode(&keys()).unwrap();
        let content = &bytes[HEADER_BYTES..bytes.len() - TAG_BYTES];
        assert!(Record::decode(&signed(content), &keys()).is_ok());
        for at in 0..content.len() {
            assert!(Record::decode(&signed(&content[..at]), &keys()).is_err(), "cut at {at}");
            let mut altered = content.to_vec();
            altered[at] = rng.random();
            // Most altered content is refused; what is not must still name blocks of its own pool only.
            let Ok(record) = Record::decode(&signed(&altered), &keys()) else { continue };
            for rank in record.lease.iter().flat_map(|lease| &lease.ranks) {
                assert!(rank.blocks.iter().all(|run| run.end <= rank.layout.blocks));
                assert_eq!(rank.layout.validate(), Ok(()));
            }
        }
    }

    #[test]
    fn blocks_of_an_element_type_that_is_not_known_are_refused_by_that_name() {
        let bytes = sample(&mut StdRng::seed_from_u64(8)).encode(&keys()).unwrap();
        let mut content = bytes[HEADER_BYTES..bytes.len() - TAG_BYTES].to_vec();
        let layout = [1, 32, 0, 0, 0, 64, 0, 0, 0];
        let at = content.windows(layout.len()).position(|window| window == layout).unwrap();
        content[at] = 2;
        let refused = Record::decode(&signed(&content), &keys());
        assert_eq!(refused, Err(RecordError::Garbage("dtype")));
    }

    #[test]
    fn a_record_beyond_one_mebibyte_is_not_written() {
        let mut record = sample(&mut StdRng::seed_from_u64(6));
        let runs: Vec<_> = (0..140_000).map(|block| 2 * block..2 * block + 1).collect();
        record.lease.as_mut().unwrap().ranks[0].blocks = runs;
        assert_eq!(record.encode(&keys()), Err(RecordError::TooLarge));
    }

    #[test]
    fn the_prompt_hash_tells_ids_and_salt_apart() {
        let hashes = [
            prompt_hash(&[1, 2], None),
            prompt_hash(&[1, 2], Some("")),
            prompt_hash(&[1, 2], Some("s")),
            prompt_hash(&[1], Some("s")),
            prompt_hash(&[2, 1], None),
            prompt_hash(&[], None),
        ];
        let different: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(different.len(), hashes.len());
        assert_eq!(prompt_hash(&[1, 2], None), hashes[0]);
    }

    #[test]
    fn neighbouring_blocks_are_one_run() {
        let ids = [4, 5, 6, 2, 3, 9].map(BlockIndex);
        assert_eq!(runs_of(&ids), [4..7, 2..4, 9..10]);
        assert!(runs_of(&[]).is_empty());
    }

    #[test]
    fn metadata_and_lease_are_never_printed() {
        let mut record = sample(&mut StdRng::seed_from_u64(7));
        let lease = record.lease.as_mut().unwrap();
        lease.lease = LeaseId([0xab; 16]);
        lease.ranks[0].metadata = vec![0xcd; 64];
        let text = format!("{record:?}");
        assert!(
            !["171, 171", "205, 205", "abab"].iter().any(|secret| text.contains(secret)),
            "{text}"
        );
    }
}
