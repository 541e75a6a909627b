// torch's side of the extension, for the blocks of a GPT: the trilby::decode_blocks operator on CPU tensors. Arguments
// arrive checked by kernels/blocks.py; what would make a kernel read or write outside its tensors is checked here
// again.
#include "bindings.h"

#include "blocks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using trilby::empty_contiguous;
using trilby::Optional;
using trilby::sizes_of;

// The parameters, in the order of kernels/blocks.py, each checked as it is taken.
class Parameters {
 public:
  Parameters(const std::vector<Optional>& tensors, ScalarType dtype, int64_t width)
      : tensors(tensors), dtype(dtype), width(width), next(0) {}

  trilby::NormWeights norm() {
    const void* const weight = vector(width, dtype);
    return {weight, vector(width, dtype)};
  }

  // `outputs` = 0: as many as there are rows.
  trilby::LinearWeights linear(int64_t outputs, int64_t inputs) {
    const Optional& weight = take();
    STD_TORCH_CHECK(weight && weight->dim() == 2 && (outputs == 0 || weight->size(0) == outputs) &&
                        weight->size(1) == inputs && weight->stride(1) == 1,
                    "trilby::decode_blocks: weights[", next - 1, "] must be [", outputs, ", ", inputs,
                    "], the elements of a row adjacent");
    const int64_t rows = weight->size(0);
    const void* const bias = vector(rows, dtype);
    const void* const scales = vector(rows, ScalarType::Float);
    STD_TORCH_CHECK(weight->scalar_type() == (scales ? ScalarType::Char : dtype), "trilby::decode_blocks: weights[",
                    next - 3, "] must have stream's dtype, or be int8 and be followed by scales");
    return {rows, inputs, weight->stride(0), weight->const_data_ptr(), bias, static_cast<const float*>(scales)};
  }

 private:
  const Optional& take() { return tensors[next++]; }

  const void* vector(int64_t size, ScalarType of) {
    const Optional& tensor = take();
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(
        tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous() && tensor->scalar_type() == of,
        "trilby::decode_blocks: weights[", next - 1, "] must be [", size,
        "], contiguous, and of the dtype it goes with");
    return tensor->const_data_ptr();
  }

  const std::vector<Optional>& tensors;
  const ScalarType dtype;
  const int64_t width;
  size_t next;
};

// The keys (0) or the values (1) of a layer of memory [layers, 2, B, H, S, D].
trilby::View part_of(const Tensor& memory, int64_t layer, int64_t part) {
  const auto strides = memory.strides();
  char* const data = static_cast<char*>(memory.mutable_data_ptr());
  const int64_t size = memory.scalar_type() == ScalarType::Float ? 4 : 2;
  return {data + (layer * strides[0] + part * strides[1]) * size, strides[2], strides[3], strides[4], strides[5]};
}

const int32_t* lengths_of(const Optional& key_lengths, int64_t B, int64_t length) {
  if (!key_lengths) return nullptr;
  STD_TORCH_CHECK(key_lengths->dim() == 1 && key_lengths->size(0) == B && key_lengths->is_contiguous() &&
                      key_lengths->scalar_type() == ScalarType::Int,
                  "trilby::decode_blocks: key_lengths must be [B] int32, contiguous");
  const int32_t* const lengths = key_lengths->const_data_ptr<int32_t>();
  for (int64_t b = 0; b < B; b++) {
    STD_TORCH_CHECK(1 <= lengths[b] && lengths[b] <= length, "trilby::decode_blocks: key_lengths[", b, "] is ",
                    lengths[b], ", not from 1 to ", length);
  }
  return lengths;
}

Tensor decode_blocks(const Tensor& stream, const Tensor& memory, const Optional& key_lengths, int64_t length,
                     double eps, const std::vector<Optional>& weights) {
  STD_TORCH_CHECK(stream.dim() == 3 && stream.size(1) == 1 && memory.dim() == 6,
                  "trilby::decode_blocks: stream must be [B, 1, C], and memory [layers, 2, B, H, S, D]");
  const ScalarType dtype = stream.scalar_type();
  const int64_t B = stream.size(0), C = stream.size(2), layers = memory.size(0), H = memory.size(3);
  STD_TORCH_CHECK(memory.size(1) == 2 && memory.size(2) == B && H * memory.size(5) == C && memory.stride(5) == 1 &&
                      memory.scalar_type() == dtype && 1 <= length && length <= memory.size(4),
                  "trilby::decode_blocks: memory must be [layers, 2, B, H, at least length, C / H] in stream's dtype, "
                  "the elements of a row adjacent");
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == 16 * layers + 2,
                  "trilby::decode_blocks: weights must be 16 for each layer, and 2");
  const Tensor input = torch::stable::contiguous(stream), output = empty_contiguous(sizes_of(stream), dtype);
  trilby::DecodeBlocks problem = {B,
                                  C,
                                  H,
                                  trilby::dtype_of(stream, "stream"),
                                  static_cast<float>(eps),
                                  {},
                                  {},
                                  length,
                                  lengths_of(key_lengths, B, length),
                                  input.const_data_ptr(),
                                  output.mutable_data_ptr()};
  Parameters parameters(weights, dtype, C);
  for (int64_t layer = 0; layer < layers; layer++) {
    trilby::Block block = {};
    block.norm_1 = parameters.norm();
    block.attention_in = parameters.linear(3 * C, C);
    block.attention_out = parameters.linear(C, C);
    block.norm_2 = parameters.norm();
    block.expand = parameters.linear(0, C);
    block.contract = parameters.linear(C, block.expand.outputs);
    block.keys = part_of(memory, layer, 0);
    block.values = part_of(memory, layer, 1);
    problem.blocks.push_back(block);
  }
  problem.last_norm = parameters.norm();
  const int64_t bytes = static_cast<int64_t>(trilby::decode_blocks_workspace(problem));
  const Tensor workspace = empty_contiguous({bytes}, ScalarType::Byte);
  trilby::decode_blocks(problem, workspace.mutable_data_ptr(), trilby::torch_threads());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trilby, CPU, library) { library.impl("decode_blocks", TORCH_BOX(&decode_blocks)); }
