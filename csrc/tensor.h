// A tensor as the operators take and give it: borrowed from the caller, or owned.
//
// Tensor of the stable ABI owns a handle and a counter, each in memory of its own: 70 ns for every
// argument of a call, a call of one token has up to seven. Compiled C++ keeps its tensors alive
// while it calls, so that they need be neither.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <utility>

namespace ternc {

using torch::headeronly::ScalarType;

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned)
      : handle_(owned), owner_(std::make_shared<Owner>(owned)) {}
  Tensor(const torch::stable::Tensor& other) : Tensor(another(other.get())) {}

  // Of a tensor that outlives this one and its copies.
  static Tensor borrowed(AtenTensorHandle handle) { return Tensor(handle, nullptr); }

  torch::stable::Tensor stable() const { return torch::stable::Tensor(another(handle_)); }

  // A handle for the caller: the one held here, if nobody else has it.
  AtenTensorHandle give() {
    if (owner_ == nullptr || owner_.use_count() > 1) return another(handle_);
    return std::exchange(owner_->handle, nullptr);
  }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t d) const { return ask<int64_t>(aoti_torch_get_size, d); }
  int64_t stride(int64_t d) const { return ask<int64_t>(aoti_torch_get_stride, d); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  ScalarType scalar_type() const {
    const int32_t type = ask<int32_t>(aoti_torch_get_dtype);
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(type));
  }

 private:
  struct Owner {
    AtenTensorHandle handle;

    explicit Owner(AtenTensorHandle owned) : handle(owned) {}
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;
    ~Owner() {
      if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
    }
  };

  Tensor(AtenTensorHandle handle, std::shared_ptr<Owner> owner)
      : handle_(handle), owner_(std::move(owner)) {}

  static AtenTensorHandle another(AtenTensorHandle handle) {
    AtenTensorHandle copy = nullptr;
    STD_TORCH_CHECK(aoti_torch_new_tensor_handle(handle, &copy) == 0, "ternc: no tensor");
    return copy;
  }

  template <class T, class F, class... A>
  T ask(F question, A... about) const {
    T answer{};
    STD_TORCH_CHECK(question(handle_, about..., &answer) == 0, "ternc: a tensor has no answer");
    return answer;
  }

  AtenTensorHandle handle_;
  std::shared_ptr<Owner> owner_;  // none: borrowed
};

}  // namespace ternc

// As arguments and results of operators that the dispatcher calls: there, handles are owned.
namespace torch::stable::detail {

template <>
struct ToImpl<ternc::Tensor> {
  static ternc::Tensor call(StableIValue value, uint64_t, bool) {
    return ternc::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
};

template <>
struct FromImpl<ternc::Tensor> {
  static StableIValue call(ternc::Tensor tensor, uint64_t, bool) {
    return torch::stable::detail::from(tensor.give());
  }
};

}  // namespace torch::stable::detail
