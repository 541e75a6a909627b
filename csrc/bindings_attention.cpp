// torch's side of the extension, for attention: the trilby:: operators on CPU tensors, through the LibTorch stable ABI.
// Arguments arrive checked by kernels/ops.py's schemas and by the functions that call them; what would make a kernel
// read outside its tensors is checked here again.
#include "bindings.h"

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "attention_plan.h"
#include "bindings_statistics.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using trilby::dtype_of;
using trilby::empty;
using trilby::empty_heads_inside;
using trilby::has_sizes;
using trilby::LARGEST_HEAD_DIM;
using trilby::torch_threads;
using trilby::view_of;

using Maybe = std::optional<Tensor>;

// What attention is asked for beyond query, key and value; kernels/options.py says what each means.
struct Options {
  Maybe mask, alibi_slopes, seed, query_starts, key_starts, key_lengths, block_table;
  double scale;
  bool lower_right;
  int64_t window_left, window_right;
  double softcap, dropout_p;
};

trilby::AttentionShape attention_shape(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const Options& options) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "trilby::attention: query, key and value must be [B, H, T, D]");
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  STD_TORCH_CHECK((k[0] == q[0] || options.block_table) && v[0] == k[0] && v[1] == k[1] && v[2] == k[2] && k[3] == q[3],
                  "trilby::attention: sizes of query, key and value do not agree");
  STD_TORCH_CHECK(k[1] > 0 ? q[1] % k[1] == 0 : q[1] == 0, "trilby::attention: query has ", q[1],
                  " heads, not a multiple of key's ", k[1]);
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "trilby::attention: query, key and value must have one dtype");
  const int64_t key_length = options.block_table ? options.block_table->size(1) * k[2] : k[2];
  return {q[0], q[1], k[1], q[2], key_length, q[3], v[3], dtype_of(query, "query")};
}

// The numbers of an int32 tensor of these sizes, which lie side by side.
const int32_t* integers(const Tensor& tensor, const trilby::Sizes& sizes, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && has_sizes(tensor, sizes),
                  "trilby::attention: ", name,
                  " must be int32, contiguous, and of as many numbers as there are sequences");
  return tensor.const_data_ptr<int32_t>();
}

const int32_t* starts(const Tensor& tensor, int64_t sequences, int64_t rows, const char* name) {
  const int32_t* numbers = integers(tensor, {sequences + 1}, name);
  bool ascending = numbers[0] >= 0 && numbers[sequences] <= rows;
  for (int64_t n = 0; n < sequences; n++) ascending = ascending && numbers[n] <= numbers[n + 1];
  STD_TORCH_CHECK(ascending, "trilby::attention: ", name, " must ascend from 0 or more to ", rows, " or less");
  return numbers;
}

// The blocks that hold the keys of each sequence exist.
void check_blocks(const trilby::AttentionSequences& sequences, int64_t blocks) {
  for (int64_t n = 0; n < sequences.count; n++) {
    const int64_t used = (sequences.key_lengths[n] + sequences.page_size - 1) / sequences.page_size;
    for (int64_t p = 0; p < used; p++) {
      const int32_t block = sequences.block_table[n * sequences.pages + p];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "trilby::attention: block_table[", n, "][", p, "] is ", block,
                      ", but key has ", blocks, " blocks");
    }
  }
}

trilby::AttentionSequences attention_sequences(const trilby::AttentionShape& shape, const Tensor& key,
                                               const Options& options) {
  trilby::AttentionSequences sequences = {shape.batch};
  if (options.query_starts) {
    STD_TORCH_CHECK(
        shape.batch == 1 && options.query_starts->numel() > 0,
        "trilby::attention: query_starts needs a query [1, H, rows, D], and one number more than sequences");
    STD_TORCH_CHECK(options.key_starts.has_value() != options.block_table.has_value(),
                    "trilby::attention: query_starts needs either key_starts or block_table");
    sequences.count = options.query_starts->numel() - 1;
    sequences.query_starts = starts(*options.query_starts, sequences.count, shape.query_length, "query_starts");
  }
  if (options.key_starts) {
    STD_TORCH_CHECK(options.query_starts.has_value(), "trilby::attention: key_starts needs query_starts");
    sequences.key_starts = starts(*options.key_starts, sequences.count, shape.key_length, "key_starts");
  }
  if (options.key_lengths) {
    sequences.key_lengths = integers(*options.key_lengths, {sequences.count}, "key_lengths");
    for (int64_t n = 0; n < sequences.count; n++) {
      const int64_t most =
          sequences.key_starts ? sequences.key_starts[n + 1] - sequences.key_starts[n] : shape.key_length;
      STD_TORCH_CHECK(sequences.key_lengths[n] >= 0 && sequences.key_lengths[n] <= most,
                      "trilby::attention: key_lengths[", n, "] is ", sequences.key_lengths[n], ", not from 0 to ",
                      most);
    }
  }
  if (options.block_table) {
    STD_TORCH_CHECK(options.key_lengths.has_value(), "trilby::attention: block_table needs key_lengths");
    sequences.pages = options.block_table->size(1);
    sequences.page_size = key.size(2);
    sequences.block_table = integers(*options.block_table, {sequences.count, sequences.pages}, "block_table");
    check_blocks(sequences, key.size(0));
  }
  return sequences;
}

trilby::Mask mask_kind(const Tensor& mask, const Tensor& query) {
  if (mask.scalar_type() == ScalarType::Bool) return trilby::Mask::boolean;
  if (mask.scalar_type() == ScalarType::Float) return trilby::Mask::float32;
  STD_TORCH_CHECK(mask.scalar_type() == query.scalar_type(),
                  "trilby::attention: mask must be bool, float32 or of query's dtype");
  return mask.scalar_type() == ScalarType::BFloat16 ? trilby::Mask::bfloat16 : trilby::Mask::float16;
}

trilby::Dropout attention_dropout(const Maybe& seed, double p) {
  if (p == 0.0) return {};
  STD_TORCH_CHECK(p > 0.0 && p <= 1.0, "trilby::attention: dropout_p must be from 0 to 1, not ", p);
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "trilby::attention: dropout needs a seed, one int64");
  const double threshold = std::nearbyint(p * 65536.0);
  return {static_cast<uint32_t>(threshold),
          threshold < 65536.0 ? static_cast<float>(65536.0 / (65536.0 - threshold)) : 0.0f,
          static_cast<uint64_t>(*seed->const_data_ptr<int64_t>())};
}

trilby::AttentionRule attention_rule(const trilby::AttentionShape& shape, const trilby::AttentionSequences& sequences,
                                     const Tensor& query, const Options& options) {
  trilby::AttentionRule rule = {static_cast<float>(options.scale)};
  rule.softcap = static_cast<float>(options.softcap);
  if (options.alibi_slopes) {
    const Tensor& slopes = *options.alibi_slopes;
    STD_TORCH_CHECK(
        slopes.scalar_type() == ScalarType::Float && has_sizes(slopes, {sequences.count, shape.query_heads}),
        "trilby::attention: alibi_slopes must be float32, one to each head of each sequence");
    rule.alibi_slopes = slopes.const_data_ptr<float>();
    rule.alibi_sequence = slopes.stride(0);
    rule.alibi_head = slopes.stride(1);
  }
  if (options.mask) {
    STD_TORCH_CHECK(
        !options.query_starts && !options.block_table &&
            has_sizes(*options.mask, {shape.batch, shape.query_heads, shape.query_length, shape.key_length}),
        "trilby::attention: mask must be [B, H, T, S], of queries and keys that are neither packed nor in blocks");
    rule.mask_kind = mask_kind(*options.mask, query);
    rule.mask = view_of(*options.mask);
  }
  rule.lower_right = options.lower_right;
  rule.window_left = options.window_left;
  rule.window_right = options.window_right;
  rule.dropout = attention_dropout(options.seed, options.dropout_p);
  return rule;
}

void check_result(const Tensor& tensor, const Tensor& query, const trilby::AttentionShape& shape, const char* name) {
  STD_TORCH_CHECK(has_sizes(tensor, {shape.batch, shape.query_heads, shape.query_length, shape.value_dim}),
                  "trilby::attention_backward: ", name, " must be [B, H, T, Dv]");
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), "trilby::attention_backward: ", name,
                  " must have query's dtype");
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, Maybe mask,
                                     Maybe alibi_slopes, Maybe seed, Maybe query_starts, Maybe key_starts,
                                     Maybe key_lengths, Maybe block_table, double scale, bool lower_right,
                                     int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                                     int64_t) {
  const Options options = {mask,  alibi_slopes, seed,        query_starts, key_starts, key_lengths, block_table,
                           scale, lower_right,  window_left, window_right, softcap,    dropout_p};
  const auto shape = attention_shape(query, key, value, options);
  const auto sequences = attention_sequences(shape, key, options);
  const auto rule = attention_rule(shape, sequences, query, options);
  const int64_t B = shape.batch, H = shape.query_heads, T = shape.query_length;
  Tensor output = empty_heads_inside(B, H, T, shape.value_dim, query.scalar_type());
  Tensor logsumexp = empty({B, H, T}, {H * T, T, 1}, ScalarType::Float);
  const trilby::AttentionForward problem = {shape,
                                            sequences,
                                            rule,
                                            view_of(query),
                                            view_of(key),
                                            view_of(value),
                                            view_of(output),
                                            logsumexp.mutable_data_ptr<float>()};
  trilby::attend(trilby::kernels(), problem, torch_threads());
  return {output, logsumexp};
}

// [1, H, rows, D], of packed sequences [rows, H, D].
trilby::View packed_view(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {const_cast<void*>(tensor.const_data_ptr()), 0, strides[1], strides[0], strides[2]};
}

trilby::AttentionShape packed_shape(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                  "trilby::attention_output: packed query, key and value must be [rows, H, D]");
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  STD_TORCH_CHECK(v[0] == k[0] && v[1] == k[1] && k[2] == q[2] && (k[1] > 0 ? q[1] % k[1] == 0 : q[1] == 0),
                  "trilby::attention_output: sizes of query, key and value do not agree");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "trilby::attention_output: query, key and value must have one dtype");
  return {1, q[1], k[1], q[0], k[0], q[2], v[2], dtype_of(query, "query")};
}

// The common calls of attention in inference, checked here alone: whatever is refused, the function that called tells
// what of it was wrong, or has it computed elsewhere. Of tiny inputs the call is what takes the time: this operator,
// with fewer arguments and a single result, takes three quarters of what `attention` does.
Tensor attention_output(const Tensor& query, const Tensor& key, const Tensor& value, Maybe mask, Maybe query_starts,
                        Maybe key_starts, std::optional<double> scale, bool enable_gqa, std::optional<bool> lower_right,
                        int64_t window_left, int64_t window_right) {
  const bool packed = query_starts.has_value();
  Options options = {};
  options.query_starts = std::move(query_starts);
  options.key_starts = std::move(key_starts);
  const auto shape = packed ? packed_shape(query, key, value) : attention_shape(query, key, value, options);
  const int64_t B = shape.batch, H = shape.query_heads, T = shape.query_length, S = shape.key_length;
  STD_TORCH_CHECK(shape.head_dim <= LARGEST_HEAD_DIM && shape.value_dim <= LARGEST_HEAD_DIM,
                  "trilby::attention_output: the head dimension is above ", LARGEST_HEAD_DIM);
  STD_TORCH_CHECK(enable_gqa || H == shape.key_heads, "trilby::attention_output: query and key differ in heads");
  STD_TORCH_CHECK(lower_right || T == S || (window_left < 0 && window_right < 0),
                  "trilby::attention_output: lower_right must be said where lengths differ");
  trilby::AttentionRule rule = {
      static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.head_dim))))};
  rule.lower_right = lower_right.value_or(false);
  rule.window_left = window_left;
  rule.window_right = window_right;
  if (mask) {
    STD_TORCH_CHECK(!packed && mask->dim() <= 4 && trilby::spreads(*mask, B, H, T, S),
                    "trilby::attention_output: mask must broadcast to [B, H, T, S]");
    rule.mask_kind = mask_kind(*mask, query);
    rule.mask = trilby::spread_view(*mask);
  }
  const auto sequences = attention_sequences(shape, key, options);
  const Tensor output = packed ? trilby::empty_contiguous({T, H, shape.value_dim}, query.scalar_type())
                               : empty_heads_inside(B, H, T, shape.value_dim, query.scalar_type());
  trilby::Floats logsumexp(B * H * T);
  const auto view = packed ? packed_view : view_of;
  const trilby::AttentionForward problem = {shape,     sequences,   rule,         view(query),
                                            view(key), view(value), view(output), logsumexp.data()};
  trilby::attend(trilby::kernels(), problem, torch_threads());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& output,
                                                      const Tensor& logsumexp, Maybe mask, Maybe alibi_slopes,
                                                      Maybe seed, Maybe query_starts, Maybe key_starts,
                                                      Maybe key_lengths, Maybe block_table, double scale,
                                                      bool lower_right, int64_t window_left, int64_t window_right,
                                                      double softcap, double dropout_p, int64_t) {
  STD_TORCH_CHECK(!block_table, "trilby::attention_backward: keys in blocks have no gradients");
  const Options options = {mask,  alibi_slopes, seed,        query_starts, key_starts, key_lengths, block_table,
                           scale, lower_right,  window_left, window_right, softcap,    dropout_p};
  const auto shape = attention_shape(query, key, value, options);
  const auto sequences = attention_sequences(shape, key, options);
  const auto rule = attention_rule(shape, sequences, query, options);
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
      {shape, sequences, rule, view_of(query), view_of(key), view_of(value), view_of(output), view_of(grad_output),
       logsumexp.const_data_ptr<float>(), view_of(grad_query), view_of(grad_key), view_of(grad_value)},
      torch_threads());
  return {grad_query, grad_key, grad_value};
}

std::string cpu_levels() {
  std::string names;
  for (const trilby::Kernels* level : trilby::available_levels())
    names += (names.empty() ? "" : " ") + std::string(level->level);
  return names;
}

bool multiplies_pairs_fast() { return trilby::multiplies_pairs_fast(); }

std::string why_not_amx() { return trilby::why_not_amx(); }

std::string cpu_level() { return trilby::kernels().level; }

bool use_cpu_level(std::string level) { return trilby::use_level(level.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(trilby, library) {
  library.def("cpu_levels() -> str");
  library.def("multiplies_pairs_fast() -> bool");
  library.def("why_not_amx() -> str");
  library.def("cpu_level() -> str");
  library.def("use_cpu_level(str level) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(trilby, CompositeExplicitAutograd, library) {
  library.impl("cpu_levels", TORCH_BOX(&cpu_levels));
  library.impl("multiplies_pairs_fast", TORCH_BOX(&multiplies_pairs_fast));
  library.impl("why_not_amx", TORCH_BOX(&why_not_amx));
  library.impl("cpu_level", TORCH_BOX(&cpu_level));
  library.impl("use_cpu_level", TORCH_BOX(&use_cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(trilby, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("attention_output", TORCH_BOX(&attention_output));
  library.impl("attention_backward", TORCH_BOX(&attention_backward));
}
