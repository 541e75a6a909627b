// torch's side of the extension, for the linear layer: the trilby::linear operator on CPU tensors.
#include "bindings.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using trilby::dtype_of;
using trilby::empty_contiguous;
using trilby::Optional;
using trilby::Sizes;
using trilby::sizes_of;
using trilby::torch_threads;

void check_parameter(const Optional& tensor, int64_t outputs, ScalarType dtype, const char* name, const char* wanted) {
  STD_TORCH_CHECK(!tensor || (tensor->dim() == 1 && tensor->sizes()[0] == outputs && tensor->is_contiguous() &&
                              tensor->scalar_type() == dtype),
                  "trilby::linear: ", name, " must be [N], contiguous and ", wanted);
}

// The rows of input at one stride; copied where their leading dimensions have no common one.
Tensor with_even_rows(const Tensor& input) {
  const auto sizes = input.sizes(), strides = input.strides();
  for (int64_t d = 0; d + 2 < input.dim(); d++) {
    if (sizes[d] != 1 && strides[d] != strides[d + 1] * sizes[d + 1]) return torch::stable::contiguous(input);
  }
  return input;
}

Tensor linear(const Tensor& input, const Tensor& weight, const Optional& bias, const Optional& scales) {
  STD_TORCH_CHECK(input.dim() >= 1 && weight.dim() == 2, "trilby::linear: input must be [..., K], weight [N, K]");
  const int64_t N = weight.sizes()[0], K = weight.sizes()[1];
  STD_TORCH_CHECK(input.sizes()[input.dim() - 1] == K, "trilby::linear: input has ", input.sizes()[input.dim() - 1],
                  " columns, and weight ", K);
  STD_TORCH_CHECK(K <= 1 || weight.strides()[1] == 1,
                  "trilby::linear: the elements of a row of weight must be adjacent");
  STD_TORCH_CHECK(weight.scalar_type() == (scales ? ScalarType::Char : input.scalar_type()),
                  "trilby::linear: weight must have input's dtype, or be int8 and have scales");
  check_parameter(bias, N, input.scalar_type(), "bias", "of input's dtype");
  check_parameter(scales, N, ScalarType::Float, "scales", "float32");
  const Tensor rows = with_even_rows(input);
  const int64_t last = input.dim() - 1;
  int64_t count = 1;
  for (int64_t d = 0; d < last; d++) count *= input.sizes()[d];
  Sizes sizes = sizes_of(input);
  sizes.back() = N;
  Tensor output = empty_contiguous(sizes, input.scalar_type());
  trilby::kernels().linear({count, K, N, dtype_of(input, "input"), rows.const_data_ptr(),
                            last ? rows.strides()[last - 1] : 0, rows.strides()[last], weight.const_data_ptr(),
                            weight.strides()[0], scales ? scales->const_data_ptr<float>() : nullptr,
                            bias ? bias->const_data_ptr() : nullptr, output.mutable_data_ptr()},
                           torch_threads());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trilby, CPU, library) { library.impl("linear", TORCH_BOX(&linear)); }
