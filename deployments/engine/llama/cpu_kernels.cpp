// The Llama forward on a CPU, over NF4 weights, a paged KV cache and one LoRA adapter per token.
//
// One call runs all layers for all tokens of a step: between Python and the cores stands no operator dispatch, which
// on a small model costs more than the arithmetic. Compiled at first use by cpu_kernels.py, called through ctypes;
// knows nothing of requests or sampling.
//
// Every sum runs in an order that depends on the token alone, never on what else is in the batch, how a prompt was
// cut into chunks or how many threads there are: a request gets bit-equal logits alone and in a batch.
//
// T is the compute type, bfloat16 (stored as uint16_t) or float. The residual stream and all sums are float.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <sched.h>

#include "abi.h"
#include "nf4.h"
#include "simd.h"

// torch's OpenMP runtime; taking its threads keeps a second pool from fighting over the cores.
extern "C" void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

namespace {

struct Team {
  std::atomic<int>* next;  // one counter per phase
  std::atomic<int> arrived{0}, round{0}, ids{0};
  int size;

  void wait() {
    int now = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
      if (spins > 4000) sched_yield();  // a neighbour has our partner's core
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }
};

struct Worker {
  Team& team;
  int phase = 0;

  // Run f(0) ... f(n - 1) over the team; whoever is free takes the next. All are done when it returns.
  template <class F>
  void each(int n, F f) {
    std::atomic<int>& next = team.next[phase++];
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    team.wait();
  }
};

// out[m * stride_out + n] = x[m] . w[n], R rows of x and N rows of w, each of k numbers.
template <int R, int N, class T>
inline void dots(const T* x, const T* w, int k, float* out, int64_t stride_out) {
#if HAVE_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>) {
    if (k % 32 == 0) {
      __m512 acc[R][N];
      for (int m = 0; m < R; m++)
        for (int n = 0; n < N; n++) acc[m][n] = _mm512_setzero_ps();
      for (int i = 0; i < k; i += 32) {
        __m512bh b[N];
        for (int n = 0; n < N; n++) b[n] = (__m512bh)_mm512_loadu_si512(w + int64_t(n) * k + i);
#pragma GCC unroll 6
        for (int m = 0; m < R; m++) {
          __m512bh a = (__m512bh)_mm512_loadu_si512(x + int64_t(m) * k + i);
          for (int n = 0; n < N; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], b[n], a);
        }
      }
      for (int m = 0; m < R; m++)
        for (int n = 0; n < N; n++) out[m * stride_out + n] = _mm512_reduce_add_ps(acc[m][n]);
      return;
    }
  }
#endif
  fvec acc[R][N] = {};
  for (int i = 0; i < k; i += kLanes) {
    fvec b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) b[n] = load(w + int64_t(n) * k + i);
#pragma GCC unroll 6
    for (int m = 0; m < R; m++) {
      fvec a = load(x + int64_t(m) * k + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[m][n] += b[n] * a;
    }
  }
  for (int m = 0; m < R; m++)
    for (int n = 0; n < N; n++) out[m * stride_out + n] = sum(acc[m][n]);
}

// ---- one step ------------------------------------------------------------------------------------------------------

struct Tile {  // neighbouring tokens of one sequence
  int first, count;
};

template <class T>
struct Step {
  const Model model;  // a copy: an adapter may be loaded meanwhile, into a slot that this batch does not use
  const Batch& batch;
  Team team;
  // Shared by the team.
  float *x, *qkv, *shrunk;  // [tokens, hidden], [tokens, q + k + v], [tokens, 3, max_rank]
  T *h, *q, *attended, *gated;  // inputs of the linears
  Tile* tiles;
  int num_tiles = 0;
  bool any_lora = false;
  static constexpr int kPair = kPairs && std::is_same_v<T, bf16> ? 2 : 1;

  const Lora* lora(int token, int layer, int target) const {
    int slot = batch.slots[token];
    if (slot < 0) return nullptr;
    const Lora* l = &model.loras[(int64_t(slot) * model.num_layers + layer) * kTargets + target];
    return l->a ? l : nullptr;
  }

  // shrunk[token, place] = scaling * A x: the narrow side of the adapter, for targets first ... first + count - 1
  void shrink(int token, int layer, int first, int count, const T* input, int k) {
    for (int i = 0; i < count; i++)
      if (const Lora* l = lora(token, layer, first + i)) {
        float* to = shrunk + (int64_t(token) * 3 + i) * model.max_rank;
        const T* a = static_cast<const T*>(l->a);
        int r = 0;
        for (; r + 4 <= l->r; r += 4) dots<1, 4>(input, a + int64_t(r) * k, k, to + r, 0);
        for (; r < l->r; r++) dots<1, 1>(input, a + int64_t(r) * k, k, to + r, 0);
        for (r = 0; r < l->r; r++) to[r] *= l->scaling;
      }
  }

  // c [32] += B shrunk, for 32 columns
  void expand(int token, int layer, int target, int place, int column, int n, float* c) {
    if (const Lora* l = lora(token, layer, target)) {
      const float* from = shrunk + (int64_t(token) * 3 + place) * model.max_rank;
      const T* b = static_cast<const T*>(l->b) + column;
      fvec acc[kColumns / kLanes] = {};
      for (int r = 0; r < l->r; r++, b += n)
        for (int v = 0; v < kColumns / kLanes; v++) acc[v] += load(b + v * kLanes) * from[r];
      for (int v = 0; v < kColumns / kLanes; v++) store(c + v * kLanes, load(c + v * kLanes) + acc[v]);
    }
  }

  void rms_norm(const float* from, const float* weight, T* to) {
    const int n = model.hidden;
    fvec squares = {};
    for (int i = 0; i < n; i += kLanes) squares += load(from + i) * load(from + i);
    float scale = 1.0f / std::sqrt(sum(squares) / n + model.eps);
    for (int i = 0; i < n; i += kLanes) store(to + i, load(from + i) * scale * load(weight + i));
  }

  // Rotary embedding (arXiv:2104.09864) in the half-split layout of Llama's released weights.
  void rotate(const float* from, int position, float* to) {
    const int half = model.head_dim / 2;
    const float *cos = model.cos + int64_t(position) * half, *sin = model.sin + int64_t(position) * half;
    for (int i = 0; i < half; i++) {
      to[i] = from[i] * cos[i] - from[i + half] * sin[i];
      to[i + half] = from[i + half] * cos[i] + from[i] * sin[i];
    }
  }

  int block_of(int token, int position) const {
    return batch.block_tables[int64_t(batch.sequences[token]) * batch.table_width + position / kPage];
  }

  void write_kv(const Layer& layer, int token, const float* row) {
    const int d = model.head_dim, position = batch.positions[token], place = position % kPage;
    const int64_t block = int64_t(block_of(token, position)) * model.kv_heads;
    float rotated[d];
    T as_t[d];
    for (int head = 0; head < model.heads; head++) {
      rotate(row + head * d, position, rotated);
      for (int i = 0; i < d; i += kLanes) store(q + (int64_t(token) * model.heads + head) * d + i, load(rotated + i));
    }
    for (int head = 0; head < model.kv_heads; head++) {
      rotate(row + (model.heads + head) * d, position, rotated);
      for (int i = 0; i < d; i += kLanes) store(as_t + i, load(rotated + i));
      T* keys = static_cast<T*>(layer.keys) + (block + head) * d * kPage;
      for (int i = 0; i < d; i++) keys[(i / kPair * kPage + place) * kPair + i % kPair] = as_t[i];
      T* values = static_cast<T*>(layer.values) + ((block + head) * kPage + place) * d;
      const float* v = row + (model.heads + model.kv_heads + head) * d;
      for (int i = 0; i < d; i += kLanes) store(values + i, load(v + i));
    }
  }

  // Scores of R query rows against the 16 keys of a block.
  template <int R>
  void score(const T* keys, const T* const* rows, float scale, float* out, int64_t stride) {
    const int d = model.head_dim;
#if HAVE_BF16_DOT
    if constexpr (std::is_same_v<T, bf16>) {
      __m512 acc[R];
      for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
      for (int i = 0; i < d; i += 2) {
        __m512bh k = (__m512bh)_mm512_loadu_si512(keys + i * kPage);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) acc[r] = _mm512_dpbf16_ps(acc[r], k, pair(rows[r] + i));
      }
      for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride, _mm512_mul_ps(acc[r], _mm512_set1_ps(scale)));
      return;
    }
#endif
    constexpr int width = kStrip < kPage ? kStrip : kPage, vectors = width / kLanes;
    for (int first = 0; first < kPage; first += width) {
      fvec acc[R][vectors] = {};
      for (int i = 0; i < d; i++) {
        fvec k[vectors];
        for (int v = 0; v < vectors; v++) k[v] = load(keys + i * kPage + first + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          fvec a = splat(to_float(rows[r][i]));
          for (int v = 0; v < vectors; v++) acc[r][v] += k[v] * a;
        }
      }
      for (int r = 0; r < R; r++)
        for (int v = 0; v < vectors; v++) store(out + r * stride + first + v * kLanes, acc[r][v] * scale);
    }
  }

  // Attention of one key-value head for the query rows of a tile.
  void attend(const Layer& layer, const Tile& tile, int kv_head, float* scores) {
    const int d = model.head_dim, per_kv = model.heads / model.kv_heads, num_rows = tile.count * per_kv;
    const int last = batch.positions[tile.first + tile.count - 1], num_pages = last / kPage + 1;
    const int32_t* table = batch.block_tables + int64_t(batch.sequences[tile.first]) * batch.table_width;
    const int64_t stride = int64_t(num_pages) * kPage;
    const float scale = 1.0f / std::sqrt(float(d));
    for (int from = 0; from < num_rows; from += kRows) {
      const int rows = num_rows - from < kRows ? num_rows - from : kRows;
      const T* queries[kRows];
      int ends[kRows];  // keys that the row may see
      for (int r = 0; r < rows; r++) {
        int token = tile.first + (from + r) / per_kv, head = kv_head * per_kv + (from + r) % per_kv;
        queries[r] = q + (int64_t(token) * model.heads + head) * d;
        ends[r] = batch.positions[token] + 1;
      }
      for (int page = 0; page < num_pages; page++) {
        const T* keys = static_cast<const T*>(layer.keys) + (int64_t(table[page]) * model.kv_heads + kv_head) * d * kPage;
        with_rows(rows, [&](auto r) { this->template score<r.value>(keys, queries, scale, scores + page * kPage, stride); });
      }
      float inverse[kRows];
      for (int r = 0; r < rows; r++) inverse[r] = softmax(scores + r * stride, ends[r], num_pages * kPage);
      for (int column = 0; column < d; column += kLanes) {
        fvec acc[kRows] = {};
        for (int page = 0; page < num_pages; page++) {
          const T* values =
              static_cast<const T*>(layer.values) + (int64_t(table[page]) * model.kv_heads + kv_head) * d * kPage + column;
          const int in_page = last + 1 - page * kPage < kPage ? last + 1 - page * kPage : kPage;
          const float* p = scores + page * kPage;
          with_rows(rows, [&](auto r) {
            for (int i = 0; i < in_page; i++) {
              fvec v = load(values + i * d);
#pragma GCC unroll 12
              for (int m = 0; m < r.value; m++) acc[m] += v * p[m * stride + i];
            }
          });
        }
        for (int r = 0; r < rows; r++) {
          int token = tile.first + (from + r) / per_kv, head = kv_head * per_kv + (from + r) % per_kv;
          store(attended + (int64_t(token) * model.heads + head) * d + column, acc[r] * inverse[r]);
        }
      }
    }
  }

  // Exponentials of the first `end` of `size` scores, zeros after them; returns 1 / their sum.
  float softmax(float* s, int end, int size) {
    float highest = s[0];
    for (int i = 1; i < end; i++) highest = s[i] > highest || s[i] != s[i] ? s[i] : highest;
    const int padded = (end + kPage - 1) / kPage * kPage;
    fvec total = {};
    for (int i = end; i < padded; i++) s[i] = -INFINITY;
    for (int i = 0; i < padded; i += kLanes) {
      fvec e = vexp(load(s + i) - highest);
      if (i + kLanes > end)
        for (int lane = end - i; lane < kLanes; lane++) e[lane] = 0;
      store(s + i, e);
      total += e;
    }
    for (int i = padded; i < size; i++) s[i] = 0;
    return 1.0f / sum(total);
  }

  // Each work item is 32 outputs of one linear, for all tokens.
  void project_qkv(Worker& worker, int l, float* c, void* tile) {
    const Layer& layer = model.layers[l];
    const int widths[3] = {layer.linears[0].n / kColumns, layer.linears[1].n / kColumns, layer.linears[2].n / kColumns};
    const int total = (widths[0] + widths[1] + widths[2]) * kColumns;
    worker.each(widths[0] + widths[1] + widths[2], [&](int item) {
      int target = item < widths[0] ? 0 : item < widths[0] + widths[1] ? 1 : 2;
      int start = target == 0 ? 0 : target == 1 ? widths[0] : widths[0] + widths[1];
      int column = (item - start) * kColumns;
      const Linear& w = layer.linears[target];
      matmul(w, column, h, batch.num_tokens, c, tile);
      for (int m = 0; m < batch.num_tokens; m++) {
        if (any_lora) expand(m, l, target, target, column, w.n, c + m * kColumns);
        std::memcpy(qkv + int64_t(m) * total + item * kColumns, c + m * kColumns, kColumns * sizeof(float));
      }
    });
  }

  void project_to_residual(Worker& worker, int l, int target, const T* input, float* c, void* tile) {
    const Linear& w = model.layers[l].linears[target];
    worker.each(w.n / kColumns, [&](int item) {
      matmul(w, item * kColumns, input, batch.num_tokens, c, tile);
      for (int m = 0; m < batch.num_tokens; m++) {
        if (any_lora) expand(m, l, target, 0, item * kColumns, w.n, c + m * kColumns);
        float* to = x + int64_t(m) * model.hidden + item * kColumns;
        for (int v = 0; v < kColumns; v += kLanes) store(to + v, load(to + v) + load(c + m * kColumns + v));
      }
    });
  }

  void project_gate_up(Worker& worker, int l, float* c, void* tile) {
    const Linear &gate = model.layers[l].linears[4], &up = model.layers[l].linears[5];
    float* c_up = c + int64_t(batch.num_tokens) * kColumns;
    worker.each(gate.n / kColumns, [&](int item) {
      const int column = item * kColumns;
      matmul(gate, column, h, batch.num_tokens, c, tile);
      matmul(up, column, h, batch.num_tokens, c_up, tile);
      for (int m = 0; m < batch.num_tokens; m++) {
        float *g = c + m * kColumns, *u = c_up + m * kColumns;
        if (any_lora) {
          expand(m, l, 4, 0, column, gate.n, g);
          expand(m, l, 5, 1, column, up.n, u);
        }
        for (int v = 0; v < kColumns; v += kLanes) {
          fvec value = load(g + v);
          store(gated + int64_t(m) * model.intermediate + column + v, value / (1.0f + vexp(-value)) * load(u + v));
        }
      }
    });
  }

  void run(Worker& worker, float* c, void* tile, float* scores) {
    const int tokens = batch.num_tokens, width = (model.heads + 2 * model.kv_heads) * model.head_dim;
    const int attended_width = model.heads * model.head_dim;
    for (int l = 0; l < model.num_layers; l++) {
      const Layer& layer = model.layers[l];
      worker.each(tokens, [&](int m) {
        float* row = x + int64_t(m) * model.hidden;
        if (l == 0) {
          const T* embedding = static_cast<const T*>(model.embed_tokens) + int64_t(batch.token_ids[m]) * model.hidden;
          for (int i = 0; i < model.hidden; i += kLanes) store(row + i, load(embedding + i));
        }
        rms_norm(row, layer.input_norm, h + int64_t(m) * model.hidden);
        if (any_lora) shrink(m, l, 0, 3, h + int64_t(m) * model.hidden, model.hidden);
      });
      project_qkv(worker, l, c, tile);
      worker.each(tokens, [&](int m) { write_kv(layer, m, qkv + int64_t(m) * width); });
      worker.each(num_tiles * model.kv_heads,
                  [&](int item) { attend(layer, tiles[item / model.kv_heads], item % model.kv_heads, scores); });
      if (any_lora)
        worker.each(tokens, [&](int m) { shrink(m, l, 3, 1, attended + int64_t(m) * attended_width, attended_width); });
      project_to_residual(worker, l, 3, attended, c, tile);
      worker.each(tokens, [&](int m) {
        rms_norm(x + int64_t(m) * model.hidden, layer.post_norm, h + int64_t(m) * model.hidden);
        if (any_lora) shrink(m, l, 4, 2, h + int64_t(m) * model.hidden, model.hidden);
      });
      project_gate_up(worker, l, c, tile);
      if (any_lora)
        worker.each(tokens,
                    [&](int m) { shrink(m, l, 6, 1, gated + int64_t(m) * model.intermediate, model.intermediate); });
      project_to_residual(worker, l, 6, gated, c, tile);
    }
    worker.each(batch.num_out, [&](int i) {
      rms_norm(x + int64_t(batch.out_rows[i]) * model.hidden, model.norm,
               static_cast<T*>(batch.out) + int64_t(i) * model.hidden);
    });
  }
};
template <class T>
int forward(const Model& model, const Batch& batch) {
  const int tokens = batch.num_tokens, per_kv = model.heads / model.kv_heads;
  Step<T> step{model, batch, {}};
  const int phases = model.num_layers * 10 + 1;  // calls of Worker::each in Step::run
  step.team.next = static_cast<std::atomic<int>*>(std::calloc(phases, sizeof(std::atomic<int>)));
  step.team.size = model.num_threads;
  auto floats = [&](int64_t n) { return static_cast<float*>(allocate(n * tokens * sizeof(float))); };
  auto values = [&](int64_t n) { return static_cast<T*>(allocate(n * tokens * sizeof(T))); };
  step.x = floats(model.hidden);
  step.qkv = floats(int64_t(model.heads + 2 * model.kv_heads) * model.head_dim);
  step.shrunk = floats(int64_t(3) * model.max_rank + 1);
  step.h = values(model.hidden);
  step.q = values(int64_t(model.heads) * model.head_dim);
  step.attended = values(int64_t(model.heads) * model.head_dim);
  step.gated = values(model.intermediate);
  step.tiles = static_cast<Tile*>(std::malloc(sizeof(Tile) * tokens));
  const int longest_tile = per_kv >= kRows ? 1 : kRows / per_kv;
  int last_position = 0;
  for (int m = 0; m < tokens; m++) {
    step.any_lora |= batch.slots[m] >= 0;
    if (batch.positions[m] > last_position) last_position = batch.positions[m];
    Tile* before = step.num_tiles ? &step.tiles[step.num_tiles - 1] : nullptr;
    if (before && before->count < longest_tile && batch.sequences[m] == batch.sequences[before->first])
      before->count++;
    else
      step.tiles[step.num_tiles++] = {m, 1};
  }

  struct Start {
    Step<T>* step;
    int64_t scores;
  } start{&step, int64_t(kRows) * (last_position / kPage + 1) * kPage};
  GOMP_parallel(
      [](void* data) {
        Start& start = *static_cast<Start*>(data);
        Step<T>& step = *start.step;
        float* c = static_cast<float*>(allocate(sizeof(float) * 2 * step.batch.num_tokens * kColumns));
        void* tile = allocate(sizeof(float) * kTile * kColumns);
        float* scores = static_cast<float*>(allocate(sizeof(float) * start.scores));
        Worker worker{step.team};
        step.run(worker, c, tile, scores);
        std::free(c);
        std::free(tile);
        std::free(scores);
      },
      &start, model.num_threads, 0);
  for (void* memory : {static_cast<void*>(step.team.next), static_cast<void*>(step.x), static_cast<void*>(step.qkv),
                       static_cast<void*>(step.shrunk), static_cast<void*>(step.h), static_cast<void*>(step.q),
                       static_cast<void*>(step.attended), static_cast<void*>(step.gated),
                       static_cast<void*>(step.tiles)})
    std::free(memory);
  return 0;
}

// out [rows, vocab] = hidden [rows, hidden] . lm_head: 4 outputs x kRows / 2 rows at a time, summed along `hidden`.
template <class T>
struct Head {
  const Model& model;
  const T* hidden;
  float* out;
  int rows;
  Team team;

  void run(Worker& worker) {
    constexpr int columns = 256;
    worker.each((model.vocab + columns - 1) / columns, [&](int item) {
      const T* w = static_cast<const T*>(model.lm_head);
      for (int n = item * columns; n < (item + 1) * columns && n < model.vocab; n += 4)
        for (int m = 0; m < rows; m += kRows / 2)
          with_rows(rows - m < kRows / 2 ? rows - m : kRows / 2, [&](auto r) {
            if constexpr (r.value <= kRows / 2)
              dots<r.value, 4>(hidden + int64_t(m) * model.hidden, w + int64_t(n) * model.hidden, model.hidden,
                               out + int64_t(m) * model.vocab + n, model.vocab);
          });
    });
  }
};

template <class T>
int logits(const Model& model, const T* hidden, int rows, float* out) {
  std::atomic<int> next{0};
  Head<T> head{model, hidden, out, rows, {}};
  head.team.next = &next;
  head.team.size = model.num_threads;
  GOMP_parallel(
      [](void* data) {
        Head<T>& head = *static_cast<Head<T>*>(data);
        Worker worker{head.team};
        head.run(worker);
      },
      &head, model.num_threads, 0);
  return 0;
}


}  // namespace

extern "C" {
int has_bf16_dot() { return HAVE_BF16_DOT; }
int forward_bf16(const Model* model, const Batch* batch) { return forward<bf16>(*model, *batch); }
int forward_f32(const Model* model, const Batch* batch) { return forward<float>(*model, *batch); }
int logits_bf16(const Model* model, const void* hidden, int rows, float* out) {
  return logits<bf16>(*model, static_cast<const bf16*>(hidden), rows, out);
}
int logits_f32(const Model* model, const void* hidden, int rows, float* out) {
  return logits<float>(*model, static_cast<const float*>(hidden), rows, out);
}
void dequantize_bf16(const Linear* w, float* out) { dequantize<bf16>(*w, out); }
void dequantize_f32(const Linear* w, float* out) { dequantize<float>(*w, out); }
}
