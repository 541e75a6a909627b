// torch's side of the extension, for GELU: the trilby:: operators on CPU tensors.
#include "bindings.h"

namespace {

using torch::stable::Tensor;

Tensor compute(const Tensor& input, const void* grad_output) {
  Tensor output = trilby::empty_contiguous(trilby::sizes_of(input), input.scalar_type());
  trilby::kernels().gelu(
      {input.numel(), trilby::dtype_of(input, "input"), input.const_data_ptr(), grad_output, output.mutable_data_ptr()},
      trilby::torch_threads());
  return output;
}

Tensor gelu(const Tensor& input) { return compute(torch::stable::contiguous(input), nullptr); }

Tensor gelu_backward(const Tensor& grad_output, const Tensor& input) {
  STD_TORCH_CHECK(
      trilby::sizes_of(grad_output) == trilby::sizes_of(input) && grad_output.scalar_type() == input.scalar_type(),
      "trilby: grad_output must have the size and dtype of input");
  const Tensor gradient = torch::stable::contiguous(grad_output);
  return compute(torch::stable::contiguous(input), gradient.const_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trilby, CPU, library) {
  library.impl("gelu", TORCH_BOX(&gelu));
  library.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}
