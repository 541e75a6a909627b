// torch's side of the extension, for norms: the trilby:: operators on CPU tensors.
#include "bindings.h"

#include <cmath>
#include <tuple>

#include "norm_plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using trilby::Dropout;
using trilby::dtype_of;
using trilby::empty;
using trilby::empty_contiguous;
using trilby::NormShape;
using trilby::Optional;
using trilby::Rows;
using trilby::Sizes;
using trilby::sizes_of;
using trilby::torch_threads;

Tensor absent(ScalarType dtype) { return empty({0}, {1}, dtype); }

// The rows of `tensor` where they are, its leading dimensions merged as far as their strides allow; nothing if the
// elements of a row are not adjacent, or more dimensions are left than Rows holds.
std::optional<Rows> rows_in_place(const Tensor& tensor, int64_t normalized_dims) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t adjacent = 1, d = tensor.dim() - 1;
  for (; d >= tensor.dim() - normalized_dims; d--) {
    if (sizes[d] != 1 && strides[d] != adjacent) return std::nullopt;
    adjacent *= sizes[d];
  }
  Rows rows = {const_cast<void*>(tensor.const_data_ptr()), 0, {}, {}};
  int64_t reversed_sizes[Rows::MOST_DIMENSIONS], reversed_strides[Rows::MOST_DIMENSIONS], count = 0;
  for (; d >= 0; d--) {
    if (sizes[d] == 1) continue;
    if (count && strides[d] == reversed_strides[count - 1] * reversed_sizes[count - 1]) {
      reversed_sizes[count - 1] *= sizes[d];
      continue;
    }
    if (count == Rows::MOST_DIMENSIONS) return std::nullopt;
    reversed_sizes[count] = sizes[d];
    reversed_strides[count++] = strides[d];
  }
  if (!count) reversed_sizes[count] = 1, reversed_strides[count++] = adjacent;
  rows.dimensions = count;
  for (int64_t i = 0; i < count; i++) {
    rows.sizes[i] = reversed_sizes[count - 1 - i];
    rows.strides[i] = reversed_strides[count - 1 - i];
  }
  return rows;
}

// The rows of a tensor, which is copied first where a row is not contiguous, and kept alive with them.
struct Operand {
  Tensor tensor;
  Rows rows;

  Operand(const Tensor& given, int64_t normalized_dims) : tensor(given) {
    std::optional<Rows> in_place = rows_in_place(tensor, normalized_dims);
    if (!in_place) {
      tensor = torch::stable::contiguous(given);
      in_place = rows_in_place(tensor, normalized_dims);
    }
    rows = *in_place;
  }
};

struct Weight {
  std::optional<Tensor> tensor;

  Weight(const Optional& given, const NormShape& shape, const char* name) {
    if (!given) return;
    STD_TORCH_CHECK(given->numel() == shape.width, "trilby: ", name, " has ", given->numel(),
                    " elements, the normalized dimensions ", shape.width);
    STD_TORCH_CHECK(dtype_of(*given, name) == shape.weight_dtype, "trilby: weight and bias must have one dtype");
    tensor = torch::stable::contiguous(*given);
  }
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
};

NormShape norm_shape(const Tensor& input, const Optional& weight, const Optional& bias, int64_t normalized_dims,
                     bool centered, double eps) {
  STD_TORCH_CHECK(normalized_dims >= 1 && normalized_dims <= input.dim(), "trilby: normalized_dims was ",
                  normalized_dims, ", input has ", input.dim(), " dimensions");
  NormShape shape = {1, 1, dtype_of(input, "input"), dtype_of(input, "input"), centered, static_cast<float>(eps)};
  for (int64_t d = 0; d < input.dim(); d++) {
    (d < input.dim() - normalized_dims ? shape.rows : shape.width) *= input.sizes()[d];
  }
  STD_TORCH_CHECK(shape.width > 0, "trilby: a row of input is empty");
  if (weight || bias) shape.weight_dtype = weight ? dtype_of(*weight, "weight") : dtype_of(*bias, "bias");
  return shape;
}

void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(sizes_of(tensor) == sizes_of(like) && tensor.scalar_type() == like.scalar_type(), "trilby: ", name,
                  " must have the size and dtype of input");
}

// Words are drawn with 32 bits: p is met within 2^-33.
Dropout dropout_of(const Optional& seed, double p) {
  if (p == 0.0) return {0, 1.0f, 0};
  STD_TORCH_CHECK(p > 0.0 && p <= 1.0, "trilby: dropout_p was ", p, ", it must be between 0 and 1");
  STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                  "trilby: dropout needs a seed, an int64 tensor of one element");
  const double threshold = std::fmin(std::nearbyint(p * 4294967296.0), 4294967295.0);
  return {static_cast<uint32_t>(threshold), p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f,
          static_cast<uint64_t>(seed->const_data_ptr<int64_t>()[0])};
}

// What a norm returns: normalized and summed like the input, mean and rstd [leading dimensions] in fp32.
struct Results {
  Tensor normalized, summed, mean, rstd;

  Results(const Tensor& input, int64_t normalized_dims, bool centered, bool with_sum)
      : normalized(empty_contiguous(sizes_of(input), input.scalar_type())),
        summed(with_sum ? empty_contiguous(sizes_of(input), input.scalar_type()) : normalized) {
    Sizes leading = sizes_of(input);
    leading.resize(leading.size() - static_cast<size_t>(normalized_dims));
    rstd = empty_contiguous(leading, ScalarType::Float);
    mean = centered ? empty_contiguous(leading, ScalarType::Float) : absent(ScalarType::Float);
  }
};

Tensor workspace_of(int64_t floats) { return empty({floats}, {1}, ScalarType::Float); }

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& input, const Optional& weight, const Optional& bias,
                                        int64_t normalized_dims, bool centered, double eps) {
  const NormShape shape = norm_shape(input, weight, bias, normalized_dims, centered, eps);
  const Operand stream(input, normalized_dims);
  const Weight scale(weight, shape, "weight"), offset(bias, shape, "bias");
  const Results to(input, normalized_dims, centered, false);
  const Tensor workspace = workspace_of(norm_forward_workspace(shape));
  trilby::kernels().norm_forward({shape,
                                  {0, 1.0f, 0},
                                  stream.rows,
                                  {},
                                  scale.data(),
                                  offset.data(),
                                  to.normalized.mutable_data_ptr(),
                                  nullptr,
                                  to.mean.mutable_data_ptr<float>(),
                                  to.rstd.mutable_data_ptr<float>(),
                                  workspace.mutable_data_ptr<float>()},
                                 torch_threads());
  return {to.normalized, to.mean, to.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(const Tensor& stream, const Tensor& branch, const Optional& weight,
                                                    const Optional& bias, const Optional& seed, int64_t normalized_dims,
                                                    bool centered, double eps, double dropout_p) {
  const NormShape shape = norm_shape(stream, weight, bias, normalized_dims, centered, eps);
  check_like(branch, stream, "branch");
  const Operand kept(stream, normalized_dims), added(branch, normalized_dims);
  const Weight scale(weight, shape, "weight"), offset(bias, shape, "bias");
  const Results to(stream, normalized_dims, centered, true);
  const Tensor workspace = workspace_of(norm_forward_workspace(shape));
  trilby::kernels().norm_forward(
      {shape, dropout_of(seed, dropout_p), kept.rows, added.rows, scale.data(), offset.data(),
       to.normalized.mutable_data_ptr(), to.summed.mutable_data_ptr(), to.mean.mutable_data_ptr<float>(),
       to.rstd.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>()},
      torch_threads());
  return {to.normalized, to.summed, to.mean, to.rstd};
}

Tensor gradient_of_weight(const Optional& weight, ScalarType dtype) {
  return weight ? empty_contiguous(sizes_of(*weight), weight->scalar_type()) : absent(dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& grad_normalized, const Optional& grad_summed,
                                                         const Tensor& summed, const Tensor& mean, const Tensor& rstd,
                                                         const Optional& weight, const Optional& bias,
                                                         const Optional& seed, int64_t normalized_dims, bool centered,
                                                         double dropout_p) {
  const NormShape shape = norm_shape(summed, weight, bias, normalized_dims, centered, 0.0);
  check_like(grad_normalized, summed, "grad_normalized");
  if (grad_summed) check_like(*grad_summed, summed, "grad_summed");
  STD_TORCH_CHECK(
      rstd.is_contiguous() && rstd.numel() == shape.rows && dtype_of(rstd, "rstd") == trilby::Dtype::float32,
      "trilby: rstd must be one float32 a row, contiguous");
  STD_TORCH_CHECK(!centered || (mean.is_contiguous() && mean.numel() == shape.rows &&
                                dtype_of(mean, "mean") == trilby::Dtype::float32),
                  "trilby: mean must be one float32 a row, contiguous");
  const Operand sums(summed, normalized_dims), grad(grad_normalized, normalized_dims);
  const std::optional<Operand> more =
      grad_summed ? std::optional<Operand>({*grad_summed, normalized_dims}) : std::nullopt;
  const Weight scale(weight, shape, "weight");
  const ScalarType dtype = summed.scalar_type();
  const Dropout dropout = dropout_of(seed, dropout_p);
  const Tensor grad_stream = empty_contiguous(sizes_of(summed), dtype);
  const Tensor grad_branch = dropout.threshold ? empty_contiguous(sizes_of(summed), dtype) : absent(dtype);
  const Tensor grad_weight = gradient_of_weight(weight, dtype), grad_bias = gradient_of_weight(bias, dtype);
  const Tensor workspace = workspace_of(norm_backward_workspace(shape));
  trilby::kernels().norm_backward(
      {shape, dropout, grad.rows, more ? more->rows : Rows{}, sums.rows, scale.data(), mean.const_data_ptr<float>(),
       rstd.const_data_ptr<float>(), grad_stream.mutable_data_ptr(),
       dropout.threshold ? grad_branch.mutable_data_ptr() : nullptr, weight ? grad_weight.mutable_data_ptr() : nullptr,
       bias ? grad_bias.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr<float>()},
      torch_threads());
  return {grad_stream, grad_branch, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trilby, CPU, library) {
  library.impl("norm", TORCH_BOX(&norm));
  library.impl("add_norm", TORCH_BOX(&add_norm));
  library.impl("norm_backward", TORCH_BOX(&norm_backward));
}
