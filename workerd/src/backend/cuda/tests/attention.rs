//! What goes into and out of the pool against formulas, as in [`super::kernels`].

use baton_shared::kv::layout::{KvDtype, KvLayout};
use half::bf16;

use super::super::sys::buffer::Buffer;
use super::super::sys::launch::{Dims, PoolLayer};
use super::kernels::{Bench, Held, NOBODY, ROUNDING, assert_close, bf16s_of, both_orders, dims};

/// A pool of two layers, and where its elements are.
struct TestPool {
    layout: KvLayout,
    buffer: Buffer,
}

impl TestPool {
    fn new(bench: &Bench, dims: &Dims, block_tokens: u32, blocks: u32) -> Self {
        let (size, heads) = (dims.head_dim, 0..dims.kv_heads);
        let layout = KvLayout::block_major(KvDtype::Bf16, block_tokens, size, blocks, 0..2, heads);
        Self { buffer: bench.empty(layout.bytes() as usize), layout }
    }

    fn layer(&self) -> PoolLayer<'_> {
        PoolLayer { memory: self.buffer.view(), layout: &self.layout, layer: 1 }
    }

    /// Element (in the second layer) of a key (0) or value (1).
    fn at(&self, block: u32, head: u32, kv: u64, token: u32) -> usize {
        let layout = &self.layout;
        let within = u64::from(token % layout.block_tokens) * u64::from(layout.head_dim);
        let bytes = u64::from(block) * layout.stride_block
            + layout.stride_layer
            + u64::from(head) * layout.stride_head
            + kv * layout.stride_kv;
        (bytes / 2 + within) as usize
    }
}

#[test]
fn queries_keys_and_values_are_turned_and_stored_where_their_position_is() {
    both_orders(|mut bench| {
        for (heads, block_tokens, has_bias, has_norms) in [
            ((4, 2, 32), 8, false, false),
            ((9, 3, 64), 16, true, false),
            ((5, 5, 128), 64, false, true),
            ((3, 1, 64), 8, true, true),
        ] {
            let dims = dims(64, 32, heads, 2);
            let (all, size) = ((dims.heads + 2 * dims.kv_heads) as usize, dims.head_dim as usize);
            let half = size / 2;
            let positions = [0, 2 * block_tokens + 3, NOBODY, block_tokens - 1];
            let (starts, tables) = ([0, 1, 0, 4], [5, 0, 3, 2, 1]);
            let held = Held::new(&bench, &[0; 4], &positions, &starts, &tables);
            let pool = TestPool::new(&bench, &dims, block_tokens, 6);
            let (qkv, bias) = (bench.numbers(4 * all * size), bench.numbers(all * size));
            let norms = [bench.numbers(size), bench.numbers(size)];
            let angles: Vec<f32> = (0..4 * half)
                .flat_map(|at| [(at as f32 * 0.7).cos(), (at as f32 * 0.7).sin()])
                .collect();
            let (qkv_there, bias_there) = (bench.bf16s(&qkv), bench.floats(&bias));
            let norms_there = norms.each_ref().map(|norm| bench.floats(norm));
            let [query_norm, key_norm] = norms_there.each_ref().map(Buffer::view);
            let angles_there = bench.floats(&angles);
            let queries = bench.empty(4 * dims.heads as usize * size * 2);
            bench
                .kernels
                .turn_and_store(
                    &dims,
                    qkv_there.view(),
                    has_bias.then(|| bias_there.view()),
                    has_norms.then_some((query_norm, key_norm)),
                    angles_there.view(),
                    &held.rows(),
                    &pool.layer(),
                    queries.view(),
                )
                .unwrap();
            let mut written = bench.written_at_all(&queries, 2);
            let mut in_pool = bench.written_at_all(&pool.buffer, 2);
            let read = |buffer: &Buffer| {
                let mut bytes = vec![0; buffer.bytes()];
                buffer.read(0, &mut bytes).unwrap();
                bf16s_of(&bytes)
            };
            let (queries, pool_now) = (read(&queries), read(&pool.buffer));
            for row in [0, 1, 3] {
                for head in 0..all {
                    let from = (row * all + head) * size;
                    let mut values: Vec<f64> =
                        qkv[from..][..size].iter().map(|value| f64::from(*value)).collect();
                    if has_bias {
                        let bias = &bias[head * size..][..size];
                        values.iter_mut().zip(bias).for_each(|(v, bias)| *v += f64::from(*bias));
                    }
                    let is_query = head < dims.heads as usize;
                    let is_value = head >= (dims.heads + dims.kv_heads) as usize;
                    if has_norms && !is_value {
                        let squares: f64 = values.iter().map(|value| value * value).sum();
                        let scale = 1.0 / (squares / size as f64 + 1e-5).sqrt();
                        let norm = &norms[usize::from(!is_query)];
                        values.iter_mut().zip(norm).for_each(|(v, n)| *v *= scale * f64::from(*n));
                    }
                    if !is_value {
                        for pair in 0..half {
                            let at = 2 * (row * half + pair);
                            let [cosine, sine] = [angles[at], angles[at + 1]].map(f64::from);
                            let (a, b) = (values[pair], values[half + pair]);
                            values[pair] = a * cosine - b * sine;
                            values[half + pair] = b * cosine + a * sine;
                        }
                    }
                    let (got, at, seen) = if is_query {
                        (&queries, (row * dims.heads as usize + head) * size, &mut written)
                    } else {
                        let (kv, first) = if is_value {
                            (1, dims.heads + dims.kv_heads)
                        } else {
                            (0, dims.heads)
                        };
                        let position = positions[row];
                        let block = tables[(starts[row] + position / block_tokens) as usize];
                        let at = pool.at(block, head as u32 - first, kv, position);
                        (&pool_now, at, &mut in_pool)
                    };
                    assert_close(&got[at..][..size], &values, ROUNDING, 1e-2, "turned");
                    let before = seen.len();
                    seen.retain(|written| !(at..at + size).contains(written));
                    assert_eq!(before - seen.len(), size, "row {row}, head {head}");
                }
            }
            assert!(written.is_empty() && in_pool.is_empty(), "nothing else is written");
        }
    });
}

/// Sequences of given lengths in a pool, with their keys and values.
struct Attended {
    dims: Dims,
    pool: TestPool,
    tables: Vec<u32>,
    starts: Vec<u32>,
    lengths: Vec<u32>,
    /// By sequence, KV head, token.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Attended {
    fn new(bench: &mut Bench, heads: (u32, u32, u32), block_tokens: u32, lengths: &[u32]) -> Self {
        let dims = dims(64, 32, heads, 2);
        let counts: Vec<u32> = lengths.iter().map(|len| len.div_ceil(block_tokens)).collect();
        let all: u32 = counts.iter().sum();
        let mut blocks: Vec<u32> = (0..all).collect();
        (1..blocks.len()).for_each(|at| blocks.swap(at, bench.random.below(at + 1)));
        let pool = TestPool::new(bench, &dims, block_tokens, all);
        let mut one = Self {
            dims,
            pool,
            tables: blocks,
            starts: Vec::new(),
            lengths: lengths.to_vec(),
            keys: Vec::new(),
            values: Vec::new(),
        };
        let size = dims.head_dim as usize;
        let mut start = 0;
        for (len, count) in lengths.iter().zip(counts) {
            one.starts.push(start);
            let elements = (dims.kv_heads * len) as usize * size;
            let (keys, values) = (bench.numbers(elements), bench.numbers(elements));
            for head in 0..dims.kv_heads {
                for token in 0..*len {
                    let block = one.tables[(start + token / block_tokens) as usize];
                    for (kv, from) in [(0, &keys), (1, &values)] {
                        let from = &from[(head * len + token) as usize * size..][..size];
                        let bits = from.iter().map(|value| bf16::from_f32(*value).to_bits());
                        let bytes: Vec<u8> = bits.flat_map(u16::to_le_bytes).collect();
                        let at = one.pool.at(block, head, kv, token);
                        one.pool.buffer.write(2 * at, &bytes).unwrap();
                    }
                }
            }
            one.keys.push(keys);
            one.values.push(values);
            start += count;
        }
        one
    }

    /// Attention of a query of one head to the first `seen` tokens of a sequence.
    fn formula(&self, sequence: usize, head: usize, query: &[f32], seen: usize) -> Vec<f64> {
        let (size, len) = (self.dims.head_dim as usize, self.lengths[sequence] as usize);
        let kv_head = head / (self.dims.heads / self.dims.kv_heads) as usize;
        let row = |of: &[f32], token: usize| -> Vec<f64> {
            let row = &of[(kv_head * len + token) * size..][..size];
            row.iter().map(|value| f64::from(*value)).collect()
        };
        let score = |token| -> f64 {
            let key = row(&self.keys[sequence], token);
            key.iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum::<f64>()
                / (size as f64).sqrt()
        };
        let scores: Vec<f64> = (0..seen).map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shares: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let whole: f64 = shares.iter().sum();
        let mut out = vec![0.0; size];
        for (token, share) in shares.iter().enumerate() {
            let value = row(&self.values[sequence], token);
            out.iter_mut().zip(value).for_each(|(out, value)| *out += share / whole * value);
        }
        out
    }
}

/// Shares are bf16: each value's part is off by 1/256 at most, and so is the sum of values of size 1 to 4.
const ATTENTION: f64 = 0.015;

#[test]
fn attention_of_one_token_each_is_the_softmax_over_its_own_blocks() {
    both_orders(|mut bench| {
        for (heads, block_tokens, lengths, splits) in [
            ((4, 2, 32), 8, vec![1, 70, 32], 1),
            ((9, 3, 64), 16, vec![5, 33, 129], 3),
            ((8, 2, 128), 32, vec![100, 7], 2),
            ((40, 2, 64), 64, vec![65, 130], 2),
            ((2, 2, 32), 4, vec![257], 8),
        ] {
            let there = Attended::new(&mut bench, heads, block_tokens, &lengths);
            let (dims, count) = (there.dims, lengths.len());
            let (heads, size) = (dims.heads as usize, dims.head_dim as usize);
            // A row of nobody's at the end.
            let rows = count + 1;
            let positions: Vec<u32> = lengths.iter().map(|len| len - 1).chain([NOBODY]).collect();
            let starts: Vec<u32> = there.starts.iter().copied().chain([0]).collect();
            let held = Held::new(&bench, &vec![0; rows], &positions, &starts, &there.tables);
            let queries = bench.numbers(rows * heads * size);
            let queries_there = bench.bf16s(&queries);
            let out = bench.empty(rows * heads * size * 2);
            let parts = rows * heads * splits;
            let (sums, states) = (bench.empty(parts * size * 4), bench.empty(parts * 8));
            let ended = bench.words(&vec![0; rows * heads]);
            bench
                .kernels
                .decode_attention(
                    &dims,
                    queries_there.view(),
                    &held.rows(),
                    rows as u32,
                    splits as u32,
                    &there.pool.layer(),
                    [sums.view(), states.view(), ended.view()],
                    out.view(),
                )
                .unwrap();
            let got = bench.written_bf16s(&out, count * heads * size);
            let rest = (heads * size * 2) as u64;
            let writes = bench.emulator.writes(out.address() + count as u64 * rest, rest as usize);
            assert_eq!(writes, (0, 0), "nobody's row");
            let mut left = vec![1; rows * heads * 4];
            ended.read(0, &mut left).unwrap();
            assert!(left.iter().all(|byte| *byte == 0), "no part is left counted");
            for (at, got) in got.chunks(size).enumerate() {
                let (row, head) = (at / heads, at % heads);
                let query = &queries[at * size..][..size];
                let wanted = there.formula(row, head, query, lengths[row] as usize);
                assert_close(got, &wanted, ATTENTION, 1.0, &format!("row {row}, head {head}"));
            }
        }
    });
}

#[test]
fn attention_of_many_tokens_is_the_softmax_over_all_before_each() {
    both_orders(|mut bench| {
        // The last so many tokens of each sequence are new.
        for (heads, block_tokens, lengths, new) in [
            ((2, 1, 32), 8, vec![70, 3], vec![70, 1]),
            ((3, 1, 64), 16, vec![40, 150], vec![7, 140]),
            ((2, 2, 128), 32, vec![64, 33], vec![64, 33]),
            ((4, 2, 64), 64, vec![129, 65], vec![2, 65]),
        ] {
            let there = Attended::new(&mut bench, heads, block_tokens, &lengths);
            let dims = there.dims;
            let (heads, size) = (dims.heads as usize, dims.head_dim as usize);
            let rows: u32 = new.iter().sum();
            let (mut tiles, mut of_row) = (Vec::new(), Vec::new());
            for (sequence, (len, new)) in lengths.iter().zip(&new).enumerate() {
                for first in (0..*new).step_by(128) {
                    let row = of_row.len() as u32 + first;
                    tiles.extend([
                        row,
                        (new - first).min(128),
                        len - new + first,
                        there.starts[sequence],
                    ]);
                }
                of_row.extend((0..*new).map(|at| (sequence, (len - new + at) as usize)));
            }
            let zeros = vec![0; rows as usize];
            let held = Held::new(&bench, &zeros, &zeros, &zeros, &there.tables);
            let queries = bench.numbers(rows as usize * heads * size);
            let queries_there = bench.bf16s(&queries);
            let tiles_there = bench.words(&tiles);
            let out = bench.empty(rows as usize * heads * size * 2);
            bench
                .kernels
                .prefill_attention(
                    &dims,
                    queries_there.view(),
                    &held.rows(),
                    tiles_there.view(),
                    tiles.len() as u32 / 4,
                    &there.pool.layer(),
                    out.view(),
                )
                .unwrap();
            let got = bench.written_bf16s(&out, rows as usize * heads * size);
            for (at, got) in got.chunks(size).enumerate() {
                let ((sequence, position), head) = (of_row[at / heads], at % heads);
                let query = &queries[at * size..][..size];
                let wanted = there.formula(sequence, head, query, position + 1);
                assert_close(got, &wanted, ATTENTION, 1.0, &format!("position {position}"));
            }
        }
    });
}
