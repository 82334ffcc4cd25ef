// A tensor as the operators take and give it: a handle, borrowed from the caller or owned.
//
// Tensor of the stable ABI owns a handle and a counter, each in memory of its own: 70 ns for every
// argument of a call, a call of one token has up to seven. And its conversions of data types ask
// torch for the number of every type there is, up to the one that is meant.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace ternc {

using torch::headeronly::ScalarType;

template <class... Words>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(Words... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// Refuses a call. The text is made elsewhere: between the code of a call that is right, which may
// come from memory, it would be most of it.
#define TERNC_CHECK(condition, ...)                                      \
  do {                                                                   \
    if (__builtin_expect(!(condition), 0)) ::ternc::refuse(__VA_ARGS__); \
  } while (0)

// A type that operators take often, with its number in the running torch.
struct TypeCode {
  ScalarType type;
  int32_t code;
};
inline const TypeCode TYPE_CODES[] = {
    {ScalarType::Float, aoti_torch_dtype_float32()},
    {ScalarType::Byte, aoti_torch_dtype_uint8()},
    {ScalarType::Char, aoti_torch_dtype_int8()},
    {ScalarType::BFloat16, aoti_torch_dtype_bfloat16()},
    {ScalarType::Half, aoti_torch_dtype_float16()},
};

[[gnu::cold, gnu::noinline]] inline ScalarType other_type(int32_t code) {
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
}
[[gnu::cold, gnu::noinline]] inline int32_t other_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

inline ScalarType type_of(int32_t code) {
  for (const TypeCode& known : TYPE_CODES)
    if (known.code == code) return known.type;
  return other_type(code);
}

inline int32_t code_of(ScalarType type) {
  for (const TypeCode& known : TYPE_CODES)
    if (known.type == type) return known.code;
  return other_code(type);
}

// The sizes of a tensor, where torch keeps them.
struct Shape {
  const int64_t* sizes;
  int64_t dims;

  int64_t columns() const { return sizes[dims - 1]; }
  int64_t numel() const { return product(sizes, dims); }
  int64_t tokens() const { return product(sizes, dims - 1); }

 private:
  [[gnu::noinline]] static int64_t product(const int64_t* sizes, int64_t count) {
    int64_t numel = 1;
    for (int64_t d = 0; d < count; ++d) numel *= sizes[d];
    return numel;
  }
};

class Tensor {
 public:
  Tensor() = default;  // none
  Tensor(Tensor&& other) noexcept
      : handle_(other.handle_), owned_(std::exchange(other.owned_, false)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~Tensor() {
    if (owned_) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor owned(AtenTensorHandle handle) { return Tensor(handle, true); }
  // Of a tensor that outlives this one.
  static Tensor borrowed(AtenTensorHandle handle) { return Tensor(handle, false); }
  Tensor borrow() const { return borrowed(handle_); }
  // In torch's form, whose operators give another tensor.
  static Tensor another(const torch::stable::Tensor& other) { return owned(copied(other.get())); }
  torch::stable::Tensor stable() const { return torch::stable::Tensor(copied(handle_)); }

  // The handle of an owned tensor, for the caller to own.
  AtenTensorHandle give() {
    owned_ = false;
    return handle_;
  }

  Shape shape() const { return {ask<int64_t*>(aoti_torch_get_sizes), dim()}; }
  const int64_t* strides() const { return ask<int64_t*>(aoti_torch_get_strides); }
  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  ScalarType scalar_type() const { return type_of(ask<int32_t>(aoti_torch_get_dtype)); }

 private:
  Tensor(AtenTensorHandle handle, bool owned) : handle_(handle), owned_(owned) {}

  static AtenTensorHandle copied(AtenTensorHandle handle) {
    AtenTensorHandle copy = nullptr;
    TERNC_CHECK(aoti_torch_new_tensor_handle(handle, &copy) == 0, "ternc: no tensor");
    return copy;
  }

  template <class T>
  T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer{};
    TERNC_CHECK(question(handle_, &answer) == 0, "ternc: a tensor has no answer");
    return answer;
  }

  AtenTensorHandle handle_ = nullptr;
  bool owned_ = false;
};

}  // namespace ternc
