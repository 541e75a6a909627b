// Attention forward, backward and decoding at random sizes, with all that it may be asked for, its weights, and linear
// layers of few rows, with every tensor in a block of its own, so that AddressSanitizer sees the first byte read or
// written outside. Built and run by test_sanitizers.py, once for each instruction-set level.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention_plan.h"
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

// `count` numbers in a block of their own.
template <class Number>
struct Numbers {
  std::unique_ptr<Number[]> data;

  template <class Make>
  Numbers(int64_t count, const Make& make) : data(new Number[static_cast<size_t>(count)]) {
    for (int64_t i = 0; i < count; i++) data[static_cast<size_t>(i)] = make(i);
  }
};

bool one_in(int64_t times) { return up_to(times) == 1; }

// N + 1 starts of sequences in `rows` rows, of which some at both ends belong to none.
Numbers<int32_t> starts(int64_t sequences, int64_t rows) {
  int64_t at = up_to(rows) / 8;
  return Numbers<int32_t>(sequences + 1, [&](int64_t n) {
    if (n > 0 && !one_in(4)) at += up_to(rows - at + 1) - 1;
    return static_cast<int32_t>(at);
  });
}

AttentionRule random_rule() {
  AttentionRule rule = {0.2f};
  rule.lower_right = one_in(2);
  if (one_in(3)) rule.window_left = up_to(150) - 1;
  if (one_in(2)) rule.window_right = one_in(2) ? 0 : up_to(150) - 1;
  if (one_in(3)) rule.softcap = 1.5f;
  if (one_in(3)) rule.dropout = {20000, 1.4f, generator()};
  return rule;
}

void attend_once() {
  const bool packed = one_in(3), paged = one_in(4), masked = !packed && !paged && one_in(2);
  const int64_t B = packed ? 1 : up_to(2), N = packed ? up_to(4) : B, key_heads = up_to(2), H = key_heads * up_to(2);
  const int64_t T = one_in(3) ? up_to(8) : up_to(300), D = up_to(70), Dv = up_to(70), gap = up_to(2);
  const int64_t pages = up_to(5), page_size = up_to(70), all_pages = up_to(6),
                S = paged ? pages * page_size : up_to(300);
  const Dtype dtype = static_cast<Dtype>(generator() % 3);
  const Threads threads = {up_to(3), run};
  const AttentionShape shape = {B, H, key_heads, T, S, D, Dv, dtype};
  AttentionRule rule = random_rule();
  const Numbers<float> slopes(N * H, [](int64_t n) { return static_cast<float>(n) * 0.1f; });
  if (one_in(3)) {
    rule.alibi_slopes = slopes.data.get();
    rule.alibi_sequence = H;
    rule.alibi_head = 1;
  }
  const Dtype mask_dtype = one_in(2) ? Dtype::float32 : Dtype::bfloat16;
  const Tensor additive(masked ? B : 1, masked ? H : 1, masked ? T : 1, masked ? S : 1, mask_dtype, gap);
  const Numbers<uint8_t> boolean(masked ? B * H * T * S : 1, [](int64_t) { return one_in(2); });
  if (masked && one_in(2)) {
    rule.mask_kind = Mask::boolean;
    rule.mask = {boolean.data.get(), H * T * S, T * S, S, 1};
  } else if (masked) {
    rule.mask_kind = mask_dtype == Dtype::float32 ? Mask::float32 : Mask::bfloat16;
    rule.mask = additive.view;
  }
  if (one_in(3)) rule.mask.row = 0;
  AttentionSequences sequences = {N};
  const Numbers<int32_t> query_starts = starts(N, T), key_starts = starts(N, S);
  const auto& keys_of = key_starts.data;
  const Numbers<int32_t> key_lengths(N, [&](int64_t n) {
    const size_t i = static_cast<size_t>(n);
    return static_cast<int32_t>(up_to((packed && !paged ? keys_of[i + 1] - keys_of[i] : S) + 1) - 1);
  });
  const Numbers<int32_t> table(N * pages, [&](int64_t) { return static_cast<int32_t>(up_to(all_pages) - 1); });
  if (packed) sequences.query_starts = query_starts.data.get();
  if (packed && !paged) sequences.key_starts = key_starts.data.get();
  if (paged || one_in(3)) sequences.key_lengths = key_lengths.data.get();
  if (paged) {
    sequences.block_table = table.data.get();
    sequences.pages = pages;
    sequences.page_size = page_size;
  }
  const int64_t batches = paged ? all_pages : B, rows = paged ? page_size : S;
  const Tensor query(B, H, T, D, dtype, gap), key(batches, key_heads, rows, D, dtype),
      value(batches, key_heads, rows, Dv, dtype, gap);
  const Tensor output(B, H, T, Dv, dtype), grad_output(B, H, T, Dv, dtype, gap), logsumexp(B, H, T, 1, Dtype::float32);
  float* statistics = static_cast<float*>(logsumexp.view.data);
  const AttentionForward problem = {shape, sequences, rule, query.view, key.view, value.view, output.view, statistics};
  TRILBY_LEVEL::attention_forward(problem, threads);
  attend({"", TRILBY_LEVEL::attention_forward, TRILBY_LEVEL::attention_decode}, problem, threads);
  if (paged) return;
  const Tensor grad_query(B, H, T, D, dtype), grad_key(B, key_heads, S, D, dtype),
      grad_value(B, key_heads, S, Dv, dtype);
  TRILBY_LEVEL::attention_backward({shape, sequences, rule, query.view, key.view, value.view, output.view,
                                    grad_output.view, statistics, grad_query.view, grad_key.view, grad_value.view},
                                   threads);
}

void weigh_once() {
  const int64_t B = up_to(2), H = up_to(3), T = up_to(150), S = up_to(150), D = up_to(70), gap = up_to(2);
  const Dtype dtype = static_cast<Dtype>(generator() % 3);
  const bool of_all_heads = one_in(2);
  const Tensor query(B, H, T, D, dtype, gap), key(B, H, S, D, dtype, gap),
      weights(B, of_all_heads ? 1 : H, T, S, dtype);
  const Numbers<float> logsumexp(B * H * T, [](int64_t n) { return n % 9 ? 3.0f : -INFINITY; });
  const Numbers<uint8_t> mask(B * H * T * S, [](int64_t) { return one_in(2); });
  AttentionRule rule = {0.2f};
  if (one_in(2)) {
    rule.mask_kind = Mask::boolean;
    rule.mask = {mask.data.get(), H * T * S, T * S, S, 1};
  }
  TRILBY_LEVEL::attention_weights(
      {{B, H, H, T, S, D, D, dtype}, rule, query.view, key.view, logsumexp.data.get(), weights.view, of_all_heads},
      {up_to(3), run});
}

void multiply_once() {
  const int64_t M = up_to(20), K = up_to(700), N = up_to(70), gap = up_to(2);
  const Dtype dtype = static_cast<Dtype>(generator() % 3);
  const Tensor input(1, 1, M, K, dtype, gap), weight(1, 1, N, K, dtype), bias(1, 1, 1, N, dtype),
      output(1, 1, M, N, dtype);
  const Numbers<int8_t> integers(N * K, [](int64_t) { return static_cast<int8_t>(generator()); });
  const Numbers<float> scales(N, [](int64_t n) { return static_cast<float>(n) * 0.01f; });
  Linear problem = {M,
                    K,
                    N,
                    dtype,
                    input.view.data,
                    input.view.row,
                    gap,
                    weight.view.data,
                    K,
                    nullptr,
                    one_in(2) ? bias.view.data : nullptr,
                    output.view.data};
  if (one_in(2)) {
    problem.weight = integers.data.get();
    problem.scales = scales.data.get();
  }
  TRILBY_LEVEL::linear(problem, {up_to(3), run});
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // as isa.cpp asks for it
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) return 1;
#endif
  constexpr int CASES = 200;
  for (int i = 0; i < CASES; i++) {
    attend_once();
    weigh_once();
    multiply_once();
  }
  std::printf("%d cases\n", CASES);
}
