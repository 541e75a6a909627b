// torch's side of the extension, for attention: the trilby:: operators on CPU tensors, through the LibTorch stable ABI.
// Arguments arrive checked by kernels/ops.py's schemas and by the functions that call them; what would make a kernel
// read outside its tensors is checked here again.
#include "bindings.h"

#include <optional>
#include <string>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using trilby::dtype_of;
using trilby::empty;
using trilby::empty_heads_inside;
using trilby::torch_threads;
using trilby::view_of;

trilby::AttentionShape attention_shape(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "trilby::attention: query, key and value must be [B, H, T, D]");
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  STD_TORCH_CHECK(k[0] == q[0] && v[0] == q[0] && v[1] == k[1] && v[2] == k[2] && k[3] == q[3],
                  "trilby::attention: sizes of query, key and value do not agree");
  STD_TORCH_CHECK(k[1] > 0 ? q[1] % k[1] == 0 : q[1] == 0, "trilby::attention: query has ", q[1],
                  " heads, not a multiple of key's ", k[1]);
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "trilby::attention: query, key and value must have one dtype");
  return {q[0], q[1], k[1], q[2], k[2], q[3], v[3], dtype_of(query, "query")};
}

trilby::AttentionRule attention_rule(bool is_causal, double scale) {
  trilby::AttentionRule rule = {static_cast<float>(scale)};
  if (is_causal) rule.window_right = 0;
  return rule;
}

void check_result(const Tensor& tensor, const Tensor& query, const trilby::AttentionShape& shape, const char* name) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(tensor.dim() == 4 && sizes[0] == shape.batch && sizes[1] == shape.query_heads &&
                      sizes[2] == shape.query_length && sizes[3] == shape.value_dim,
                  "trilby::attention_backward: ", name, " must be [B, H, T, Dv]");
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), "trilby::attention_backward: ", name,
                  " must have query's dtype");
}

using Maybe = std::optional<Tensor>;

// Whether keys after a query's own are hidden; of what else attention can be asked, these kernels know nothing.
bool is_causal_alone(const Maybe& mask, const Maybe& alibi_slopes, const Maybe& query_starts, const Maybe& key_starts,
                     const Maybe& key_lengths, const Maybe& block_table, bool lower_right, int64_t window_left,
                     int64_t window_right, double softcap, double dropout_p) {
  STD_TORCH_CHECK(!mask && !alibi_slopes && !query_starts && !key_starts && !key_lengths && !block_table &&
                      !lower_right && window_left < 0 && window_right <= 0 && softcap == 0.0 && dropout_p == 0.0,
                  "trilby::attention: the CPU has no kernel for what is asked for");
  return window_right == 0;
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, Maybe mask,
                                     Maybe alibi_slopes, Maybe, Maybe query_starts, Maybe key_starts, Maybe key_lengths,
                                     Maybe block_table, double scale, bool lower_right, int64_t window_left,
                                     int64_t window_right, double softcap, double dropout_p, int64_t) {
  const bool is_causal = is_causal_alone(mask, alibi_slopes, query_starts, key_starts, key_lengths, block_table,
                                         lower_right, window_left, window_right, softcap, dropout_p);
  const auto shape = attention_shape(query, key, value);
  const trilby::AttentionSequences sequences = {shape.batch};
  const int64_t B = shape.batch, H = shape.query_heads, T = shape.query_length;
  Tensor output = empty_heads_inside(B, H, T, shape.value_dim, query.scalar_type());
  Tensor logsumexp = empty({B, H, T}, {H * T, T, 1}, ScalarType::Float);
  trilby::kernels().attention_forward({shape, sequences, attention_rule(is_causal, scale), view_of(query), view_of(key),
                                       view_of(value), view_of(output), logsumexp.mutable_data_ptr<float>()},
                                      torch_threads());
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& output,
                                                      const Tensor& logsumexp, Maybe mask, Maybe alibi_slopes, Maybe,
                                                      Maybe query_starts, Maybe key_starts, Maybe key_lengths,
                                                      Maybe block_table, double scale, bool lower_right,
                                                      int64_t window_left, int64_t window_right, double softcap,
                                                      double dropout_p, int64_t) {
  const bool is_causal = is_causal_alone(mask, alibi_slopes, query_starts, key_starts, key_lengths, block_table,
                                         lower_right, window_left, window_right, softcap, dropout_p);
  const auto shape = attention_shape(query, key, value);
  const trilby::AttentionSequences sequences = {shape.batch};
  const int64_t B = shape.batch, S = shape.key_length;
  check_result(grad_output, query, shape, "grad_output");
  check_result(output, query, shape, "output");
  STD_TORCH_CHECK(logsumexp.is_contiguous() && logsumexp.scalar_type() == ScalarType::Float &&
                      logsumexp.numel() == B * shape.query_heads * shape.query_length,
                  "trilby::attention_backward: logsumexp must be [B, H, T], float32 and contiguous");
  const auto dtype = query.scalar_type();
  Tensor grad_query = empty_heads_inside(B, shape.query_heads, shape.query_length, shape.head_dim, dtype);
  Tensor grad_key = empty_heads_inside(B, shape.key_heads, S, shape.head_dim, dtype);
  Tensor grad_value = empty_heads_inside(B, shape.key_heads, S, shape.value_dim, dtype);
  trilby::kernels().attention_backward(
      {shape, sequences, attention_rule(is_causal, scale), view_of(query), view_of(key), view_of(value),
       view_of(output), view_of(grad_output), logsumexp.const_data_ptr<float>(), view_of(grad_query), view_of(grad_key),
       view_of(grad_value)},
      torch_threads());
  return {grad_query, grad_key, grad_value};
}

std::string cpu_levels() {
  int count = 0;
  const trilby::Kernels* const* levels = trilby::available_levels(&count);
  std::string names;
  for (int i = 0; i < count; i++) names += (i ? " " : "") + std::string(levels[i]->level);
  return names;
}

std::string cpu_level() { return trilby::kernels().level; }

bool use_cpu_level(std::string level) { return trilby::use_level(level.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trilby, library) {
  library.def("cpu_levels() -> str");
  library.def("cpu_level() -> str");
  library.def("use_cpu_level(str level) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(trilby, CompositeExplicitAutograd, library) {
  library.impl("cpu_levels", TORCH_BOX(&cpu_levels));
  library.impl("cpu_level", TORCH_BOX(&cpu_level));
  library.impl("use_cpu_level", TORCH_BOX(&use_cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(trilby, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("attention_backward", TORCH_BOX(&attention_backward));
}
