// What every file that knows torch shares: dtypes, allocation and threads, through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace trilby {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

// As kernels/attention_rules.py has it: wider heads are computed by the reference.
constexpr int64_t LARGEST_HEAD_DIM = 256;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "trilby: ", name, " must be float32, bfloat16 or float16");
  }
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline bool has_sizes(const Tensor& tensor, const Sizes& sizes) {
  const auto found = tensor.sizes();
  return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
}

inline Tensor empty(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return empty(sizes, strides, dtype);
}

// The elements of `tensor`, from its own first one on, as a tensor of other sizes and strides.
inline Tensor seen_as(const Tensor& tensor, const Sizes& sizes, const Sizes& strides) {
  constexpr int64_t NO_FURTHER = 0;  // what is added to the tensor's own offset
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), NO_FURTHER, &handle));
  return Tensor(handle);
}

// [B, H, T, D] in the memory order (B, T, H, D): what a projection of all heads reads without a copy.
inline Tensor empty_heads_inside(int64_t B, int64_t H, int64_t T, int64_t D, ScalarType dtype) {
  return empty({B, H, T, D}, {T * H * D, D, H * D, 1}, dtype);
}

// Of a [B, H, T, D] tensor.
inline View view_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {const_cast<void*>(tensor.const_data_ptr()), strides[0], strides[1], strides[2], strides[3]};
}

// Whether `mask` spreads over [B, H, T, S].
inline bool spreads(const Tensor& mask, int64_t B, int64_t H, int64_t T, int64_t S) {
  const int64_t to[4] = {B, H, T, S};
  const auto sizes = mask.sizes();
  const int64_t absent = 4 - mask.dim();
  for (int64_t d = absent; d < 4; d++) {
    if (sizes[d - absent] != 1 && sizes[d - absent] != to[d]) return false;
  }
  return true;
}

// `mask` as [B, H, T, S], stride 0 where it is spread.
inline View spread_view(const Tensor& mask) {
  const auto sizes = mask.sizes(), strides = mask.strides();
  int64_t spread[4] = {};
  const int64_t absent = 4 - mask.dim();
  for (int64_t d = absent; d < 4; d++) spread[d] = sizes[d - absent] == 1 ? 0 : strides[d - absent];
  return {const_cast<void*>(mask.const_data_ptr()), spread[0], spread[1], spread[2], spread[3]};
}

// torch's own threads. A call from inside a parallel region runs all workers in turn on the calling thread.
inline Threads torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t workers, void (*body)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; worker++) body(worker, context);
            });
          }};
}

}  // namespace trilby
