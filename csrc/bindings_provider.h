// What kernels in PyTorch's place share: what they hand calls on to, and the count of those they compute.
#pragma once

#include "bindings.h"

#include <array>
#include <memory>
#include <stdexcept>
#include <string>

// What PyTorch said when a call of its C interface failed. A torch before 2.13 prints that itself, and does not tell.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace trilby {

// An error that came by way of Python begins with its type.
[[noreturn]] inline void throw_pytorchs_error() {
  const bool told = torch_exception_get_what_without_backtrace;
  std::string words = told ? torch_exception_get_what_without_backtrace() : "PyTorch's kernel refused the call";
  const std::string type = "RuntimeError: ";
  if (words.compare(0, type.size(), type) == 0) words.erase(0, type.size());
  throw std::runtime_error(words);
}

// Calls an operator; its results take the place of the arguments.
template <size_t SIZE>
void call_operator(const char* name, const char* overload, std::array<StableIValue, SIZE>& stack) {
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw_pytorchs_error();
  }
}

// How many calls of each operator trilby's kernels have computed on this thread: what kernels/explain.py goes by.
enum Served { ATTENTION, ATTENTION_BACKWARD, LAYER_NORM, LAYER_NORM_BACKWARD, ENCODER, OPERATORS };
inline thread_local std::array<int64_t, OPERATORS> served = {};

inline bool has_kernel_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// PyTorch's autograd gives an optional tensor that is absent as one that is undefined.
inline Optional defined(const Optional& tensor) { return tensor && tensor->defined() ? tensor : std::nullopt; }

using Library = torch::stable::detail::StableLibrary;

// Kernels of PyTorch's operators that stand above its own for as long as this lives; PyTorch says of which file they
// are.
inline std::unique_ptr<Library> in_pytorchs_place(const char* file, uint32_t line) {
  return std::make_unique<Library>(Library::Kind::IMPL, "aten", "CPU", file, line);
}

}  // namespace trilby
