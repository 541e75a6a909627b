// mean and rstd of a norm's rows, as PyTorch keeps them from its forward for its backward, and as kernels have them: in
// float32.
#pragma once

#include <algorithm>

#include "bindings.h"

namespace trilby {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The same elements side by side: the tensor itself, or a copy, as PyTorch makes one.
inline Tensor adjacent(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Floats for the length of a call. A few lie on the stack: to have torch allocate them takes half a microsecond.
class Floats {
 public:
  explicit Floats(int64_t count) {
    if (count > FEW) many_ = empty({count}, {1}, ScalarType::Float);
  }
  float* data() { return many_ ? many_->mutable_data_ptr<float>() : few_; }

 private:
  static constexpr int64_t FEW = 2048;
  alignas(64) float few_[FEW];
  Optional many_;
};

template <typename From, typename To>
void convert(const void* from, int64_t count, void* to) {
  const From* source = static_cast<const From*>(from);
  std::transform(source, source + count, static_cast<To*>(to),
                 [](From element) { return static_cast<To>(static_cast<float>(element)); });
}

// mean or rstd of each row as PyTorch keeps it: in the parameters' dtype, and without parameters in the input's.
class Kept {
 public:
  Kept(const Sizes& sizes, int64_t rows, ScalarType dtype)
      : tensor_(empty_contiguous(sizes, dtype)), rows_(rows), floats_(dtype == ScalarType::Float ? 0 : rows) {}

  // What a kernel writes to.
  float* data() {
    return tensor_.scalar_type() == ScalarType::Float ? tensor_.mutable_data_ptr<float>() : floats_.data();
  }

  Tensor tensor() {
    const ScalarType dtype = tensor_.scalar_type();
    if (dtype == ScalarType::BFloat16) convert<float, BFloat16>(floats_.data(), rows_, tensor_.mutable_data_ptr());
    if (dtype == ScalarType::Half) convert<float, Half>(floats_.data(), rows_, tensor_.mutable_data_ptr());
    return tensor_;
  }

 private:
  Tensor tensor_;
  int64_t rows_;
  Floats floats_;
};

// mean or rstd of each row, as a kernel reads it.
class Statistics {
 public:
  explicit Statistics(const Tensor& kept)
      : from_(adjacent(kept)), floats_(kept.scalar_type() == ScalarType::Float ? 0 : kept.numel()) {}

  const float* data() {
    const ScalarType dtype = from_.scalar_type();
    if (dtype == ScalarType::Float) return from_.const_data_ptr<float>();
    if (dtype == ScalarType::BFloat16) convert<BFloat16, float>(from_.const_data_ptr(), from_.numel(), floats_.data());
    if (dtype == ScalarType::Half) convert<Half, float>(from_.const_data_ptr(), from_.numel(), floats_.data());
    return floats_.data();
  }

 private:
  Tensor from_;
  Floats floats_;
};

}  // namespace trilby
