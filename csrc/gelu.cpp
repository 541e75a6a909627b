// GELU in its tanh form, forward and backward, on one instruction-set level.
//
//     u = √(2/π) (x + 0.044715 x³)
//     gelu(x) = x/2 · (1 + tanh u) = x · σ(2u)
//     gelu'(x) = σ(2u) + x · σ(2u) · (1 - σ(2u)) · 2u'
//
// The logistic function needs one power and one division, and neither σ nor 1 - σ is a difference of near numbers,
// where 1 + tanh u loses every digit that tanh u has of a negative u. Traffic an element: one read and one write, or
// two reads and one write backward; 25 (36) operations, so that the first level of memory is what it waits for.
#include "level.h"
#include "queue.h"
#include "vector.h"

namespace trilby::TRILBY_LEVEL {

namespace {

constexpr float ROOT = 0.79788456080286536f;  // √(2/π)
constexpr float CUBIC = 0.044715f;
constexpr float TWO_OVER_LN2 = 2.88539008177792681f;
// A task's elements: 32 KiB of float32, so that a task is tens of microseconds and dealing it a hundredth of that.
constexpr int64_t BLOCK = 8192;

// σ(2u) and 1 - σ(2u).
struct Logistic {
  Vector below, above;
};

inline Logistic logistic(Vector x) {
  const Vector u = x * (ROOT + (ROOT * CUBIC) * (x * x));
  const Vector power = exp2_of_nonpositive((u > 0.0f ? -u : u) * TWO_OVER_LN2);  // e^(-2|u|)
  const Vector larger_part = 1.0f / (1.0f + power), smaller_part = power * larger_part;
  return {u > 0.0f ? larger_part : smaller_part, u > 0.0f ? smaller_part : larger_part};
}

inline Vector gelu_of(Vector x) { return x * logistic(x).below; }

inline Vector gradient_of(Vector grad_output, Vector x) {
  const Logistic of = logistic(x);
  const Vector twice_slope = (2.0f * ROOT) + (2.0f * ROOT * 3.0f * CUBIC) * (x * x);  // 2u'
  return grad_output * (of.below + x * of.below * of.above * twice_slope);
}

template <class Format>
void compute(const Gelu& problem, int64_t begin, int64_t end) {
  using Element = typename Format::Element;
  const Element* input = static_cast<const Element*>(problem.input);
  const Element* grad = static_cast<const Element*>(problem.grad_output);
  Element* output = static_cast<Element*>(problem.output);
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) {
    const Vector x = Format::load_vector(input + i);
    Format::store_vector(output + i, grad ? gradient_of(Format::load_vector(grad + i), x) : gelu_of(x));
  }
  if (i < end) {
    const Vector x = load_some<Format>(input + i, end - i);
    const Vector result = grad ? gradient_of(load_some<Format>(grad + i, end - i), x) : gelu_of(x);
    store_some<Format>(output + i, result, end - i);
  }
}

}  // namespace

void gelu(const Gelu& problem, const Threads& threads) {
  deal(ceiling(problem.count, BLOCK), threads, [&](int64_t block) {
    const int64_t begin = block * BLOCK, end = smaller(begin + BLOCK, problem.count);
    switch (problem.dtype) {
      case Dtype::float32: return compute<Float32>(problem, begin, end);
      case Dtype::bfloat16: return compute<BFloat16>(problem, begin, end);
      case Dtype::float16: return compute<Float16>(problem, begin, end);
    }
  });
}

}  // namespace trilby::TRILBY_LEVEL
