// trilby as PyTorch's own: kernels for four aten:: operators on CPU tensors, in PyTorch's place from `provide_…` to
// `withdraw_…`. Their results are PyTorch's to the stride and dtype, and they hand on each call that is PyTorch's to
// compute: attention by PyTorch's C functions, which lead straight to its kernel; layer norm, for which there are none,
// by an operator of trilby that kernels/provider.py fills with the kernel that was there before. That takes longer than
// computing a tiny norm (8 µs against 2), so only norms that no kernel of trilby's can compute take that way.
#include "bindings_provider.h"
#include "attention_plan.h"
#include "bindings_statistics.h"
#include "norm_plan.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using trilby::adjacent;
using trilby::defined;
using trilby::empty;
using trilby::empty_contiguous;
using trilby::Floats;
using trilby::has_kernel_dtype;
using trilby::has_sizes;
using trilby::in_pytorchs_place;
using trilby::Kept;
using trilby::Library;
using trilby::Optional;
using trilby::served;
using trilby::Sizes;
using trilby::sizes_of;
using trilby::spread_view;
using trilby::spreads;
using trilby::Statistics;
using trilby::throw_pytorchs_error;
using trilby::view_of;

// Which calls of attention are worth taking; kernels/attention_rules.py says why.
struct Limits {
  int64_t fewest_queries, fewest_multiplications, fewest_masked_multiplications, largest_head_dim, most_decoded,
      most_decoded_rows, few_decoded;
  std::vector<int64_t> fewest_decoded;  // in float32, bfloat16 and float16
  int64_t few_keys;
  std::vector<int64_t> fewest_in_place;  // to few keys and to more; inference, training; both in half precision
} limits;

// ---- attention -----------------------------------------------------------------------------------------------------

trilby::Mask mask_kind(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::BFloat16: return trilby::Mask::bfloat16;
    case ScalarType::Half: return trilby::Mask::float16;
    default: return trilby::Mask::float32;
  }
}

// Whether a corner of a batch of `mask`, float32, hides a pair: the last key from the first query, as a causal mask, or
// the first or the last key from the last query, as one of padding. Then whole blocks are likely to be hidden.
bool hides_corner(const Tensor& mask) {
  const trilby::View view = spread_view(mask);
  const auto sizes = mask.sizes();
  const int64_t dims = mask.dim(), last_row = (sizes[dims - 2] - 1) * view.row,
                last_column = (sizes[dims - 1] - 1) * view.column;
  const int64_t batches = dims == 4 ? sizes[0] : 1, heads = dims == 4 ? sizes[1] : 1;
  for (int64_t b = 0; b < batches; b++) {
    for (int64_t h = 0; h < heads; h++) {
      const float* plane = static_cast<const float*>(view.data) + b * view.batch + h * view.head;
      for (const int64_t corner : {last_column, last_row, last_row + last_column}) {
        if (plane[corner] == -std::numeric_limits<float>::infinity()) return true;
      }
    }
  }
  return false;
}

// Of a call whose sizes are known to agree.
bool is_trilbys_mask(const Tensor& mask, const Tensor& query, const Tensor& key) {
  const auto q = query.sizes();
  const bool has_dtype = mask.scalar_type() == query.scalar_type() || mask.scalar_type() == ScalarType::Float;
  return has_dtype && (mask.dim() == 2 || mask.dim() == 4) && spreads(mask, q[0], q[1], q[2], key.sizes()[2]);
}

// Whether a call is one for the kernel of few queries; few keys without a mask leave it nothing to gain.
bool decodes(int64_t T, int64_t S, const Optional& mask, bool trains) {
  return !trains && T <= limits.most_decoded && (mask || S > limits.few_keys);
}

// Whether trilby is the faster, of a call that its kernels can compute. A forward that is to have a backward goes by
// the limits of both together, and so does the backward: one side computes both. Each rounds the scores in its own way,
// which is lost in a probability only if it is the way of the logsumexp, too. What is trilby's in training is so in
// inference.
bool is_worth_taking(const Tensor& query, const Tensor& key, const Optional& mask, bool trains) {
  const auto q = query.sizes(), k = key.sizes();
  const int64_t H = q[1], T = q[2], S = k[2], multiplications = query.numel() * S;
  if (decodes(T, S, mask, trains)) {
    const auto dtype = static_cast<size_t>(trilby::dtype_of(query, "query"));
    const int64_t fewest = limits.fewest_decoded[dtype] * (T <= limits.few_decoded ? 1 : 4);
    return H * T / k[1] <= limits.most_decoded_rows && multiplications >= fewest;
  }
  const bool is_float32 = query.scalar_type() == ScalarType::Float;
  if (!mask) return T >= limits.fewest_in_place[4 * !is_float32 + 2 * trains + (S > limits.few_keys)];
  return T >= limits.fewest_queries && multiplications >= limits.fewest_multiplications &&
         (!is_float32 || (multiplications >= limits.fewest_masked_multiplications && hides_corner(*mask)));
}

bool is_trilbys(const Tensor& query, const Tensor& key, const Tensor& value, double dropout_p, const Optional& mask,
                bool trains) {
  if (dropout_p != 0.0 || query.dim() != 4 || key.dim() != 4 || value.dim() != 4 || query.numel() == 0) return false;
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  const int64_t B = q[0], H = q[1], D = q[3];
  if (D > limits.largest_head_dim || k[0] != B || k[3] != D || key.numel() == 0 || H % k[1] != 0) return false;
  for (int d = 0; d < 4; d++) {
    if (v[d] != k[d]) return false;
  }
  return has_kernel_dtype(query) && key.scalar_type() == query.scalar_type() &&
         value.scalar_type() == query.scalar_type() && (!mask || is_trilbys_mask(*mask, query, key)) &&
         is_worth_taking(query, key, mask, trains);
}

trilby::AttentionShape attention_shape(const Tensor& query, const Tensor& key) {
  const auto q = query.sizes(), k = key.sizes();
  return {q[0], q[1], k[1], q[2], k[2], q[3], q[3], trilby::dtype_of(query, "query")};
}

trilby::AttentionRule attention_rule(const Tensor& query, bool is_causal, const Optional& mask,
                                     std::optional<double> scale) {
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(query.sizes()[3])));
  trilby::AttentionRule rule = {static_cast<float>(factor)};
  if (is_causal) rule.window_right = 0;
  if (mask) {
    rule.mask_kind = mask_kind(*mask);
    rule.mask = spread_view(*mask);
  }
  return rule;
}

Tensor empty_like_heads_inside(const Tensor& like) {
  const auto sizes = like.sizes();
  return trilby::empty_heads_inside(sizes[0], sizes[1], sizes[2], sizes[3], like.scalar_type());
}

// logsumexp, [B, H, T] in the memory of trilby, as PyTorch has it: (B, T, H) in memory, and 0 where no key is seen.
void to_pytorchs(const float* from, int64_t B, int64_t H, int64_t T, float* to) {
  for (int64_t b = 0; b < B; b++, from += H * T, to += H * T) {
    for (int64_t h = 0; h < H; h++) {
      for (int64_t i = 0; i < T; i++) {
        const float value = from[h * T + i];
        to[i * H + h] = value == -std::numeric_limits<float>::infinity() ? 0.0f : value;
      }
    }
  }
}

std::tuple<Tensor, Tensor> pytorchs_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                              double dropout_p, bool is_causal, const Optional& mask,
                                              std::optional<double> scale) {
  AtenTensorHandle output = nullptr, logsumexp = nullptr, given = mask ? mask->get() : nullptr;
  if (aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
          query.get(), key.get(), value.get(), dropout_p, is_causal, mask ? &given : nullptr, scale ? &*scale : nullptr,
          &output, &logsumexp) != AOTI_TORCH_SUCCESS) {
    throw_pytorchs_error();
  }
  return {Tensor(output), Tensor(logsumexp)};
}

// [B, H, T], its memory as PyTorch's (B, T, H). Marked, the memory is longer by one.
Tensor empty_logsumexp(int64_t B, int64_t H, int64_t T, bool marked) {
  const Sizes sizes = {B, H, T}, strides = {T * H, 1, H};
  if (!marked) return empty(sizes, strides, ScalarType::Float);
  return trilby::seen_as(empty({B * H * T + 1}, {1}, ScalarType::Float), sizes, strides);
}

bool is_marked(const Tensor& logsumexp) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(logsumexp.get(), &bytes));
  return bytes > logsumexp.numel() * static_cast<int64_t>(sizeof(float));
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, double dropout_p,
                                     bool is_causal, const Optional& given_mask, std::optional<double> scale) {
  const Optional mask = defined(given_mask);
  const bool trains = aoti_torch_grad_mode_is_enabled();
  if (!is_trilbys(query, key, value, dropout_p, mask, trains)) {
    return pytorchs_attention(query, key, value, dropout_p, is_causal, mask, scale);
  }
  const Tensor output = torch::stable::empty_like(query);
  if (output.strides()[3] != 1) return pytorchs_attention(query, key, value, dropout_p, is_causal, mask, scale);
  served[trilby::ATTENTION]++;
  const trilby::AttentionShape shape = attention_shape(query, key);
  const trilby::AttentionSequences sequences = {shape.batch};
  const int64_t B = shape.batch, H = shape.query_heads, T = shape.query_length;
  const Tensor by_head = empty({B, H, T}, {H * T, T, 1}, ScalarType::Float);
  // A compiled function computes its forward as in inference, and may want a backward all the same.
  const Tensor logsumexp = empty_logsumexp(B, H, T, !trains && !is_worth_taking(query, key, mask, true));
  const trilby::AttentionForward problem = {shape,
                                            sequences,
                                            attention_rule(query, is_causal, mask, scale),
                                            view_of(query),
                                            view_of(key),
                                            view_of(value),
                                            view_of(output),
                                            by_head.mutable_data_ptr<float>()};
  if (decodes(T, shape.key_length, mask, trains)) {
    trilby::attend(trilby::kernels(), problem, trilby::torch_threads());
  } else {
    trilby::kernels().attention_forward(problem, trilby::torch_threads());
  }
  to_pytorchs(by_head.const_data_ptr<float>(), B, H, T, logsumexp.mutable_data_ptr<float>());
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& given_output,
                                                      const Tensor& given_logsumexp, double dropout_p, bool is_causal,
                                                      const Optional& given_mask, std::optional<double> scale) {
  const Optional mask = defined(given_mask);
  Tensor output = given_output, logsumexp = given_logsumexp;
  if (!is_trilbys(query, key, value, dropout_p, mask, true) || grad_output.scalar_type() != query.scalar_type()) {
    // To its own numbers alone PyTorch's backward is exact. The forward of few queries costs a third of it.
    if (is_marked(logsumexp)) {
      std::tie(output, logsumexp) = pytorchs_attention(query, key, value, dropout_p, is_causal, mask, scale);
    }
    AtenTensorHandle gradients[3] = {}, given = mask ? mask->get() : nullptr;
    if (aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output.get(), query.get(), key.get(), value.get(), output.get(), logsumexp.get(), dropout_p, is_causal,
            mask ? &given : nullptr, scale ? &*scale : nullptr, &gradients[0], &gradients[1],
            &gradients[2]) != AOTI_TORCH_SUCCESS) {
      throw_pytorchs_error();
    }
    return {Tensor(gradients[0]), Tensor(gradients[1]), Tensor(gradients[2])};
  }
  served[trilby::ATTENTION_BACKWARD]++;
  const trilby::AttentionShape shape = attention_shape(query, key);
  const trilby::AttentionSequences sequences = {shape.batch};
  const Tensor by_head = torch::stable::contiguous(logsumexp);
  const Tensor grad_query = empty_like_heads_inside(query), grad_key = empty_like_heads_inside(key),
               grad_value = empty_like_heads_inside(value);
  trilby::kernels().attention_backward(
      {shape, sequences, attention_rule(query, is_causal, mask, scale), view_of(query), view_of(key), view_of(value),
       view_of(output), view_of(grad_output), by_head.const_data_ptr<float>(), view_of(grad_query), view_of(grad_key),
       view_of(grad_value)},
      trilby::torch_threads());
  return {grad_query, grad_key, grad_value};
}

// ---- layer norm ----------------------------------------------------------------------------------------------------

constexpr trilby::Dropout NO_DROPOUT = {0, 1.0f, 0};
constexpr trilby::Rows NO_ROWS = {};

// Calls the operator of trilby that holds PyTorch's kernel.
template <size_t INPUTS>
std::tuple<Tensor, Tensor, Tensor> pytorchs(const char* name, std::array<StableIValue, INPUTS> stack) {
  trilby::call_operator(name, "", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

// The parameters of a norm have its row's size, and float32 or the input's dtype.
bool fits(const Optional& parameter, const Tensor& input, const Sizes& row) {
  return !parameter || (has_sizes(*parameter, row) && (parameter->scalar_type() == ScalarType::Float ||
                                                       parameter->scalar_type() == input.scalar_type()));
}

// A row of one element is 0 but for how it is rounded, and PyTorch rounds it its own way.
bool is_trilbys(const Tensor& input, const Sizes& row, const Optional& weight, const Optional& bias) {
  const auto sizes = input.sizes();
  const auto holds_one = [](int64_t size) { return size == 1; };
  return !std::all_of(row.begin(), row.end(), holds_one) && row.size() <= sizes.size() &&
         std::equal(row.rbegin(), row.rend(), sizes.rbegin()) && input.numel() > 0 && has_kernel_dtype(input) &&
         fits(weight, input, row) && fits(bias, input, row) &&
         (!bias || bias->scalar_type() == (weight ? *weight : input).scalar_type());
}

trilby::NormShape norm_shape(const Tensor& input, const Sizes& row, const Optional& weight, const Optional& bias,
                             double eps) {
  int64_t width = 1;
  for (const int64_t size : row) width *= size;
  const trilby::Dtype dtype = trilby::dtype_of(input, "input");
  const trilby::Dtype weight_dtype =
      weight ? trilby::dtype_of(*weight, "weight") : (bias ? trilby::dtype_of(*bias, "bias") : dtype);
  return {input.numel() / width, width, dtype, weight_dtype, true, static_cast<float>(eps)};
}

Optional adjacent(const Optional& tensor) { return tensor ? Optional(adjacent(*tensor)) : std::nullopt; }

const void* data_of(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

trilby::Rows rows_of(const Tensor& contiguous, const trilby::NormShape& shape) {
  return {const_cast<void*>(contiguous.const_data_ptr()), 1, {shape.rows}, {shape.width}};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input, Sizes row, const Optional& given_weight,
                                              const Optional& given_bias, double eps) {
  const Optional weight = defined(given_weight), bias = defined(given_bias);
  if (!is_trilbys(input, row, weight, bias)) {
    return pytorchs<5>("trilby::pytorch_native_layer_norm",
                       {from(input), from(row), from(weight), from(bias), from(eps)});
  }
  served[trilby::LAYER_NORM]++;
  const trilby::NormShape shape = norm_shape(input, row, weight, bias, eps);
  const Tensor stream = adjacent(input);
  const Optional scale = adjacent(weight), offset = adjacent(bias);
  Sizes sizes = sizes_of(input);
  const Tensor normalized = empty_contiguous(sizes, input.scalar_type());
  std::fill(sizes.end() - static_cast<int64_t>(row.size()), sizes.end(), 1);
  const ScalarType kept = (weight ? *weight : input).scalar_type();
  Kept mean(sizes, shape.rows, kept), rstd(sizes, shape.rows, kept);
  Floats workspace(norm_forward_workspace(shape));
  trilby::kernels().norm_forward({shape, NO_DROPOUT, rows_of(stream, shape), NO_ROWS, data_of(scale), data_of(offset),
                                  normalized.mutable_data_ptr(), nullptr, mean.data(), rstd.data(), workspace.data()},
                                 trilby::torch_threads());
  return {normalized, mean.tensor(), rstd.tensor()};
}

bool is_trilbys_backward(const Tensor& grad_output, const Tensor& input, const Sizes& row, const Tensor& mean,
                         const Tensor& rstd, const Optional& weight, const Optional& bias,
                         const std::vector<bool>& wanted) {
  if (!is_trilbys(input, row, weight, bias) || (wanted[1] && !weight) || (wanted[2] && !bias)) return false;
  const int64_t rows = norm_shape(input, row, weight, bias, 0.0).rows;
  return std::equal(grad_output.sizes().begin(), grad_output.sizes().end(), input.sizes().begin(),
                    input.sizes().end()) &&
         grad_output.scalar_type() == input.scalar_type() && mean.numel() == rows && rstd.numel() == rows &&
         has_kernel_dtype(mean) && has_kernel_dtype(rstd);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const Tensor& input, Sizes row,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const Optional& given_weight, const Optional& given_bias,
                                                       std::vector<bool> wanted) {
  const Optional weight = defined(given_weight), bias = defined(given_bias);
  if (!is_trilbys_backward(grad_output, input, row, mean, rstd, weight, bias, wanted)) {
    const bool mask[3] = {wanted[0], wanted[1], wanted[2]};
    return pytorchs<8>("trilby::pytorch_native_layer_norm_backward",
                       {from(grad_output), from(input), from(row), from(mean), from(rstd), from(weight), from(bias),
                        from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))});
  }
  served[trilby::LAYER_NORM_BACKWARD]++;
  const trilby::NormShape shape = norm_shape(input, row, weight, bias, 0.0);
  const Tensor grad = adjacent(grad_output), stream = adjacent(input);
  Statistics means(mean), inverses(rstd);
  const Optional scale = adjacent(weight);
  const Tensor grad_input = empty_contiguous(sizes_of(input), input.scalar_type());
  const Tensor grad_weight = wanted[1] ? empty_contiguous(row, weight->scalar_type()) : Tensor();
  const Tensor grad_bias = wanted[2] ? empty_contiguous(row, bias->scalar_type()) : Tensor();
  Floats workspace(norm_backward_workspace(shape));
  trilby::kernels().norm_backward(
      {shape, NO_DROPOUT, rows_of(grad, shape), NO_ROWS, rows_of(stream, shape), data_of(scale), means.data(),
       inverses.data(), grad_input.mutable_data_ptr(), nullptr, wanted[1] ? grad_weight.mutable_data_ptr() : nullptr,
       wanted[2] ? grad_bias.mutable_data_ptr() : nullptr, workspace.data()},
      trilby::torch_threads());
  return {wanted[0] ? grad_input : Tensor(), grad_weight, grad_bias};
}

// ---- in PyTorch's place --------------------------------------------------------------------------------------------

std::unique_ptr<Library> attention_library, norm_library;

void provide_attention(int64_t fewest_queries, int64_t fewest_multiplications, int64_t fewest_masked_multiplications,
                       int64_t largest_head_dim, int64_t most_decoded, int64_t most_decoded_rows, int64_t few_decoded,
                       std::vector<int64_t> fewest_decoded, int64_t few_keys, std::vector<int64_t> fewest_in_place) {
  limits = {fewest_queries,
            fewest_multiplications,
            fewest_masked_multiplications,
            largest_head_dim,
            most_decoded,
            most_decoded_rows,
            few_decoded,
            std::move(fewest_decoded),
            few_keys,
            std::move(fewest_in_place)};
  attention_library = in_pytorchs_place(__FILE__, __LINE__);
  attention_library->impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_BOX(&attention));
  attention_library->impl("_scaled_dot_product_flash_attention_for_cpu_backward", TORCH_BOX(&attention_backward));
}

void provide_layer_norm() {
  norm_library = in_pytorchs_place(__FILE__, __LINE__);
  norm_library->impl("native_layer_norm", TORCH_BOX(&layer_norm));
  norm_library->impl("native_layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

void withdraw_attention() { attention_library.reset(); }

void withdraw_layer_norm() { norm_library.reset(); }

Sizes served_calls() { return {served.begin(), served.end()}; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trilby, library) {
  library.def(
      "provide_attention(int fewest_queries, int fewest_multiplications, int fewest_masked_multiplications, "
      "int largest_head_dim, int most_decoded, int most_decoded_rows, int few_decoded, "
      "int[] fewest_decoded, int few_keys, int[] fewest_in_place) -> ()");
  library.def("withdraw_attention() -> ()");
  library.def("provide_layer_norm() -> ()");
  library.def("withdraw_layer_norm() -> ()");
  library.def("served_calls() -> int[]");
  library.def(
      "pytorch_native_layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "pytorch_native_layer_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor mean, "
      "Tensor rstd, "
      "Tensor? weight, Tensor? bias, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(trilby, CompositeExplicitAutograd, library) {
  library.impl("provide_attention", TORCH_BOX(&provide_attention));
  library.impl("withdraw_attention", TORCH_BOX(&withdraw_attention));
  library.impl("provide_layer_norm", TORCH_BOX(&provide_layer_norm));
  library.impl("withdraw_layer_norm", TORCH_BOX(&withdraw_layer_norm));
  library.impl("served_calls", TORCH_BOX(&served_calls));
}
