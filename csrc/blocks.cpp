// The blocks of a GPT, for the newest token of each sequence:
//
//     stream + branch ─┬─ norm ─ qkv ─ attention ─ projection ─(+)─┬─ norm ─ expand ─ GELU ─ contract ── branch
//                      └───────────────────────────────────────────┘─────────────────────────────────── stream
//
// Traffic: the weights, once; a block has 12 · C² of them. GPT-2's 124 million, with its decoder's, are 494, 247 and
// 124 MB in float32, bfloat16 and int8, which one thread here reads at 13.3 GB/s by eight streams: no token takes less
// than 37, 18.6 and 9.3 ms. Measured: 41, 22 and 11.9, of which the products are 41, 20.5 and 10.1, attention to 50
// keys 0.45, and the norms and GELU 0.1.
//
// What one call saves is what lies between the kernels: each, called from Python, finds the interpreter's code and
// objects pushed out of the caches by the weights, and takes 20 to 40 µs to begin; a block called as an operator of its
// own, with 22 arguments, 130.
#include "blocks.h"

#include <cmath>
#include <cstring>

#include "isa.h"

namespace trilby {

namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Rows of elements between two kernels.
struct Workspace {
  char *streams[2], *branch, *normalized, *heads, *attended, *expanded;
  float *statistics, *norm;
  size_t bytes;

  Workspace(const DecodeBlocks& problem, void* memory) : bytes(0) {
    const int64_t row = problem.rows * problem.width * bytes_of(problem.dtype);
    int64_t hidden = 0;
    for (const Block& block : problem.blocks) {
      if (block.expand.outputs > hidden) hidden = block.expand.outputs;
    }
    const auto take = [&](int64_t count) {
      char* const at = static_cast<char*>(memory) + bytes;
      bytes += static_cast<size_t>(count + 63) / 64 * 64;
      return at;
    };
    streams[0] = take(row);
    streams[1] = take(row);
    branch = take(row);
    normalized = take(row);
    heads = take(3 * row);
    attended = take(row);
    expanded = take(problem.rows * hidden * bytes_of(problem.dtype));
    statistics = reinterpret_cast<float*>(take(problem.rows * (problem.heads + 2) * 4));  // logsumexp; mean and rstd
    norm = reinterpret_cast<float*>(take(2 * problem.width * 4));
  }
};

class Steps {
 public:
  Steps(const DecodeBlocks& problem, void* memory, const Threads& threads)
      : problem(problem), at(problem, memory), threads(threads), stream(problem.stream), branch(nullptr) {}

  void compute() {
    for (const Block& block : problem.blocks) {
      add_and_norm(block.norm_1, at.normalized);
      linear(block.attention_in, at.normalized, at.heads);
      attend(block);
      linear(block.attention_out, at.attended, at.branch);
      branch = at.branch;
      add_and_norm(block.norm_2, at.normalized);
      linear(block.expand, at.normalized, at.expanded);
      kernels().gelu({problem.rows * block.expand.outputs, problem.dtype, at.expanded, nullptr, at.expanded}, threads);
      linear(block.contract, at.expanded, at.branch);
    }
    add_and_norm(problem.last_norm, problem.output);
  }

 private:
  // Adds the branch, where there is one, to the stream, and normalizes that.
  void add_and_norm(const NormWeights& weights, void* normalized) {
    const auto rows = [&](const void* data) {
      return Rows{const_cast<void*>(data), 1, {problem.rows}, {problem.width}};
    };
    char* const summed = stream == at.streams[0] ? at.streams[1] : at.streams[0];
    kernels().norm_forward({{problem.rows, problem.width, problem.dtype, problem.dtype, true, problem.eps},
                            {},
                            rows(stream),
                            rows(branch),
                            weights.weight,
                            weights.bias,
                            normalized,
                            branch ? summed : nullptr,
                            at.statistics,
                            at.statistics + problem.rows,
                            at.norm},
                           threads);
    if (branch) stream = summed;
  }

  void linear(const LinearWeights& of, const void* input, void* output) {
    kernels().linear({problem.rows, of.inputs, of.outputs, problem.dtype, input, of.inputs, 1, of.weight, of.row,
                      of.scales, of.bias, output},
                     threads);
  }

  // Of the heads, [B, 3, H, D], keys and values go to their places, and the queries look at all that are there.
  void attend(const Block& block) {
    const int64_t H = problem.heads, D = problem.width / H, size = bytes_of(problem.dtype);
    for (int64_t b = 0; b < problem.rows; b++) {
      const int64_t place = (problem.key_lengths ? problem.key_lengths[b] : problem.length) - 1;
      for (int64_t h = 0; h < H; h++) {
        const char* const key = at.heads + ((3 * b + 1) * problem.width + h * D) * size;
        put(block.keys, b, h, place, key, D * size);
        put(block.values, b, h, place, key + problem.width * size, D * size);
      }
    }
    AttentionForward attention = {};
    attention.shape = {problem.rows, H, H, 1, problem.length, D, D, problem.dtype};
    attention.sequences.count = problem.rows;
    attention.sequences.key_lengths = problem.key_lengths;
    attention.rule.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)));
    attention.query = {at.heads, 3 * problem.width, D, problem.width, 1};
    attention.key = block.keys;
    attention.value = block.values;
    attention.output = {at.attended, problem.width, D, problem.width, 1};
    attention.logsumexp = at.statistics;
    kernels().attention_decode(attention, threads);
  }

  void put(const View& to, int64_t b, int64_t h, int64_t place, const char* from, int64_t bytes) {
    const int64_t element = b * to.batch + h * to.head + place * to.row;
    std::memcpy(static_cast<char*>(to.data) + element * bytes_of(problem.dtype), from, static_cast<size_t>(bytes));
  }

  const DecodeBlocks& problem;
  const Workspace at;
  const Threads& threads;
  const void *stream, *branch;
};

}  // namespace

size_t decode_blocks_workspace(const DecodeBlocks& problem) { return Workspace(problem, nullptr).bytes; }

void decode_blocks(const DecodeBlocks& problem, void* workspace, const Threads& threads) {
  Steps(problem, workspace, threads).compute();
}

}  // namespace trilby
