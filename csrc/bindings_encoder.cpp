// Encoders in inference, in PyTorch's place: `aten::_native_multi_head_attention` on CPU tensors, which is what
// `nn.MultiheadAttention` runs then, and `nn.TransformerEncoderLayer` by way of an operator of its own. It composes
// projections and attention, and holds all scores; here attention is trilby's kernel, on the projections where they
// lie. In Python, as it once was, the same steps took 40 µs more; what they take the place of begins at 16. A call that
// is PyTorch's to compute goes to an operator of trilby that kernels/provider.py fills, which takes 8 to 12.
#include "attention_plan.h"
#include "bindings_provider.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using trilby::empty_contiguous;
using trilby::has_kernel_dtype;
using trilby::has_sizes;
using trilby::Optional;
using trilby::seen_as;
using trilby::Sizes;
using trilby::sizes_of;
using trilby::throw_pytorchs_error;

// A call of the operator. H heads of D; C = H · D.
struct Call {
  const Tensor &query, &key, &value;      // [B, T, C]
  int64_t embed_dim, num_head;            // C, H
  const Tensor &qkv_weight, &qkv_bias;    // [3C, C], [3C]
  const Tensor &proj_weight, &proj_bias;  // [C, C], [C]
  const Optional& mask;                   // hides where it is true, or another number than 0
  bool need_weights, average_attn_weights;
  std::optional<int64_t> mask_type;

  // What the mask's sizes must be.
  Sizes mask_sizes() const {
    const int64_t B = query.size(0), T = query.size(1);
    switch (mask_type.value_or(-1)) {
      case 0: return {T, T};
      case 1: return {B, T};
      case 2: return {B, num_head, T, T};
      default: return {};
    }
  }
};

bool are_one(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

bool is_trilbys(const Call& call) {
  const Tensor& query = call.query;
  const int64_t C = call.embed_dim, H = call.num_head;
  if (query.dim() != 3 || query.numel() == 0 || !has_kernel_dtype(query)) return false;
  if (query.size(2) != C || H <= 0 || C % H != 0 || C / H > trilby::LARGEST_HEAD_DIM) return false;
  const std::pair<const Tensor&, Sizes> parameters[] = {
      {call.qkv_weight, {3 * C, C}}, {call.qkv_bias, {3 * C}}, {call.proj_weight, {C, C}}, {call.proj_bias, {C}}};
  for (const auto& [parameter, sizes] : parameters) {
    if (parameter.scalar_type() != query.scalar_type() || !has_sizes(parameter, sizes)) return false;
  }
  return (!call.mask || has_sizes(*call.mask, call.mask_sizes())) && are_one(query, call.key) &&
         are_one(query, call.value);
}

// rows [N, K] · weight [M, K]ᵀ + bias [M]
Tensor projected(const Tensor& rows, const Tensor& weight, const Tensor& bias) {
  const Tensor out = empty_contiguous({rows.size(0), weight.size(0)}, rows.scalar_type());
  const Tensor transposed = seen_as(weight, {weight.size(1), weight.size(0)}, {weight.stride(1), weight.stride(0)});
  if (aoti_torch_cpu_addmm_out(out.get(), bias.get(), rows.get(), transposed.get(), 1.0, 1.0) != AOTI_TORCH_SUCCESS) {
    throw_pytorchs_error();
  }
  return out;
}

// What the mask does not hide, stored as small as the mask is.
Tensor seen_by(const Call& call) {
  Sizes sizes = sizes_of(*call.mask), strides;
  for (size_t d = 0; d < sizes.size(); d++) {
    strides.push_back(call.mask->stride(static_cast<int64_t>(d)));
    if (strides[d] == 0) sizes[d] = 1;
  }
  std::array<StableIValue, 1> stack = {from(seen_as(*call.mask, sizes, strides))};
  trilby::call_operator("aten::logical_not", "", stack);
  const Tensor seen = to<Tensor>(stack[0]);
  return call.mask_type == 1 ? seen_as(seen, {sizes[0], 1, 1, sizes[1]}, {seen.stride(0), 0, 0, seen.stride(1)}) : seen;
}

// [B, T, T] of the mean over the heads, or [B, H, T, T].
Tensor weights_of(const trilby::AttentionForward& attention, const Call& call) {
  const trilby::AttentionShape& shape = attention.shape;
  const int64_t B = shape.batch, H = shape.query_heads, T = shape.query_length;
  const bool mean = call.average_attn_weights;
  const Tensor weights = empty_contiguous(mean ? Sizes{B, T, T} : Sizes{B, H, T, T}, call.query.scalar_type());
  trilby::kernels().attention_weights({shape,
                                       attention.rule,
                                       attention.query,
                                       attention.key,
                                       attention.logsumexp,
                                       {weights.mutable_data_ptr(), (mean ? 1 : H) * T * T, T * T, T, 1},
                                       mean},
                                      trilby::torch_threads());
  return weights;
}

// Attention of the projections [B, T, 3, H, D], as [B · T, C], and its weights, where they are wanted.
std::tuple<Tensor, Tensor> attended(const Tensor& projections, const Call& call) {
  const int64_t B = call.query.size(0), T = call.query.size(1), C = call.embed_dim, H = call.num_head, D = C / H;
  const auto part = [=](const Tensor& tensor, int64_t number, int64_t parts) -> trilby::View {
    auto* data = static_cast<char*>(tensor.mutable_data_ptr()) + number * C * tensor.element_size();
    return {data, T * parts * C, D, parts * C, 1};
  };
  const Tensor output = empty_contiguous({B * T, C}, call.query.scalar_type());
  const Tensor logsumexp = empty_contiguous({B, H, T}, ScalarType::Float);
  trilby::AttentionRule rule = {static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)))};
  Optional seen;
  if (call.mask) {
    seen = seen_by(call);
    rule.mask_kind = trilby::Mask::boolean;
    rule.mask = trilby::spread_view(*seen);
  }
  const trilby::AttentionForward problem = {{B, H, H, T, T, D, D, trilby::dtype_of(call.query, "query")},
                                            {B},
                                            rule,
                                            part(projections, 0, 3),
                                            part(projections, 1, 3),
                                            part(projections, 2, 3),
                                            part(output, 0, 1),
                                            logsumexp.mutable_data_ptr<float>()};
  trilby::attend(trilby::kernels(), problem, trilby::torch_threads());
  return {output, call.need_weights ? weights_of(problem, call) : Tensor()};
}

std::tuple<Tensor, Tensor> multi_head_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                int64_t embed_dim, int64_t num_head, const Tensor& qkv_weight,
                                                const Tensor& qkv_bias, const Tensor& proj_weight,
                                                const Tensor& proj_bias, const Optional& mask, bool need_weights,
                                                bool average_attn_weights, std::optional<int64_t> mask_type) {
  const Call call = {query,    key,         value,     embed_dim, num_head,     qkv_weight,
                     qkv_bias, proj_weight, proj_bias, mask,      need_weights, average_attn_weights,
                     mask_type};
  if (!is_trilbys(call)) {
    std::array<StableIValue, 13> stack = {from(query),     from(key),          from(value),
                                          from(embed_dim), from(num_head),     from(qkv_weight),
                                          from(qkv_bias),  from(proj_weight),  from(proj_bias),
                                          from(mask),      from(need_weights), from(average_attn_weights),
                                          from(mask_type)};
    trilby::call_operator("trilby::pytorch__native_multi_head_attention", "", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  trilby::served[trilby::ENCODER]++;
  const int64_t B = query.size(0), T = query.size(1), C = embed_dim;
  const Tensor rows = torch::stable::reshape(query, {B * T, C});
  const auto [heads, weights] = attended(projected(rows, qkv_weight, qkv_bias), call);
  const Tensor output = projected(heads, proj_weight, proj_bias);
  return {seen_as(output, {B, T, C}, {T * C, C, 1}), weights};
}

std::unique_ptr<trilby::Library> library_in_place;

void provide_encoder() {
  library_in_place = trilby::in_pytorchs_place(__FILE__, __LINE__);
  library_in_place->impl("_native_multi_head_attention", TORCH_BOX(&multi_head_attention));
}

void withdraw_encoder() { library_in_place.reset(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trilby, library) {
  library.def("provide_encoder() -> ()");
  library.def("withdraw_encoder() -> ()");
  library.def(
      "pytorch__native_multi_head_attention(Tensor query, Tensor key, Tensor value, int embed_dim, int num_head, "
      "Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor? mask=None, "
      "bool need_weights=True, bool average_attn_weights=True, int? mask_type=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(trilby, CompositeExplicitAutograd, library) {
  library.impl("provide_encoder", TORCH_BOX(&provide_encoder));
  library.impl("withdraw_encoder", TORCH_BOX(&withdraw_encoder));
}
