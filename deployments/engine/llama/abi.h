// What Python passes: the structures that cpu_kernels.py mirrors with ctypes, field for field.
#pragma once

#include <cstdint>

constexpr int kTargets = 7;  // q k v o gate up down
constexpr int kPage = 16;    // tokens in a KV block

extern "C" {

// A 4-bit linear layer [n, k]. `codes` is packed by cpu_kernels.py: per 32 outputs and 2 inputs 32 bytes, in the
// order that the dot-product instruction takes its operand.
struct Linear {
  const uint8_t* codes;
  const uint8_t* absmax;       // [n, k / 64], quantized again (double quantization), or null
  const float* nested_code;    // [256]
  const float* nested_absmax;  // [n * k / 64 / 256]; without double quantization the absmax itself, [n, k / 64]
  float offset;
  int32_t n, k;
};

struct Layer {
  Linear linears[kTargets];
  const float* input_norm;
  const float* post_norm;
  void* keys;    // [num_blocks, kv_heads, head_dim / P, 16, P]; P is 2 where the dot product takes pairs, else 1
  void* values;  // [num_blocks, kv_heads, 16, head_dim]
};

// One adapter on one linear: a [r, k], b [r, n] (transposed); a is null where the adapter does not touch it.
struct Lora {
  const void* a;
  const void* b;
  float scaling;
  int32_t r;
};

struct Model {
  const Layer* layers;
  const Lora* loras;  // [num_slots, num_layers, 7]
  const void* embed_tokens;  // [vocab, hidden]
  const void* lm_head;       // [vocab, hidden]
  const float* norm;
  const float* cos;  // [max_model_len, head_dim / 2]
  const float* sin;
  float eps;
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, max_rank, num_threads;
};

struct Batch {
  int32_t num_tokens, num_out, table_width;
  const int32_t* token_ids;  // [num_tokens]
  const int32_t* positions;  // [num_tokens]
  const int32_t* slots;      // [num_tokens], -1: no adapter
  const int32_t* sequences;  // [num_tokens], row of block_tables; tokens of a sequence are neighbours, in order
  const int32_t* block_tables;  // [num_sequences, table_width]
  const int32_t* out_rows;      // [num_out], tokens whose hidden state is wanted
  void* out;                    // [num_out, hidden]
};

}  // extern "C"
