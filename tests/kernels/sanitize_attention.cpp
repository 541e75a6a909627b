// Attention forward and backward at random sizes, with every tensor in a block of its own, so that AddressSanitizer
// sees the first byte read or written outside. Built and run by test_sanitizers.py, once for each instruction-set
// level.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "level.h"

using namespace trilby;

namespace {

std::mt19937 generator(1);

int64_t up_to(int64_t most) { return 1 + static_cast<int64_t>(generator() % static_cast<uint64_t>(most)); }

// A [B, H, T, D] tensor of numbers from -1 to 1; columns lie `gap` apart.
struct Tensor {
  std::unique_ptr<char, decltype(&std::free)> memory;
  View view;

  Tensor(int64_t B, int64_t H, int64_t T, int64_t D, Dtype dtype, int64_t gap = 1) : memory(nullptr, &std::free) {
    const int64_t row = (D - 1) * gap + 1;
    const size_t count = static_cast<size_t>(B * H * T * row), bytes = count * (dtype == Dtype::float32 ? 4 : 2);
    memory.reset(static_cast<char*>(std::malloc(bytes)));
    for (size_t i = 0; i < count; i++) {
      const uint32_t random = static_cast<uint32_t>(generator());
      if (dtype == Dtype::float32) {
        reinterpret_cast<float*>(memory.get())[i] = static_cast<float>(random) * 0x1p-31f - 1.0f;
      } else {  // the sign and the mantissa are random, the exponent that of 0.5
        const uint32_t half = dtype == Dtype::bfloat16 ? 0x3f00u | (random & 0x807fu) : 0x3800u | (random & 0x83ffu);
        reinterpret_cast<uint16_t*>(memory.get())[i] = static_cast<uint16_t>(half);
      }
    }
    view = {memory.get(), H * T * row, T * row, row, gap};
  }
};

void run(int64_t workers, void (*body)(int64_t, void*), void* context) {
  for (int64_t worker = 0; worker < workers; worker++) body(worker, context);
}

void attend_once() {
  const int64_t B = up_to(2), key_heads = up_to(2), H = key_heads * up_to(2), T = up_to(300), S = up_to(300);
  const int64_t D = up_to(70), Dv = up_to(70), gap = up_to(2);
  const Dtype dtype = static_cast<Dtype>(generator() % 3);
  const AttentionShape shape = {B, H, key_heads, T, S, D, Dv, dtype};
  AttentionRule rule = {0.2f};
  rule.window_right = generator() % 2 ? 0 : -1;
  const Threads threads = {up_to(3), run};
  const Tensor query(B, H, T, D, dtype, gap), key(B, key_heads, S, D, dtype), value(B, key_heads, S, Dv, dtype, gap);
  const Tensor output(B, H, T, Dv, dtype), grad_output(B, H, T, Dv, dtype, gap), logsumexp(B, H, T, 1, Dtype::float32);
  const Tensor grad_query(B, H, T, D, dtype), grad_key(B, key_heads, S, D, dtype),
      grad_value(B, key_heads, S, Dv, dtype);
  float* statistics = static_cast<float*>(logsumexp.view.data);
  TRILBY_LEVEL::attention_forward({shape, {B}, rule, query.view, key.view, value.view, output.view, statistics},
                                  threads);
  TRILBY_LEVEL::attention_backward({shape,
                                    {B},
                                    rule,
                                    query.view,
                                    key.view,
                                    value.view,
                                    output.view,
                                    grad_output.view,
                                    statistics,
                                    grad_query.view,
                                    grad_key.view,
                                    grad_value.view},
                                   threads);
}

}  // namespace

int main() {
  constexpr int CASES = 150;
  for (int i = 0; i < CASES; i++) attend_once();
  std::printf("%d cases\n", CASES);
}
