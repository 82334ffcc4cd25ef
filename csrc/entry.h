// The two ways into an operator: boxed values of the dispatcher, and what compiled C++ hands over
// past it, which saves the dispatcher's turning every argument into a value of its own twice.
// runtime/entries.py writes the callers.
#pragma once

#include "bind.h"

namespace ternc {

// An argument as the dispatcher hands it over; what that holds is freed with this object. Numbers
// have no version, which the conversions of the stable ABI ask torch for one by one.
template <class T>
struct Boxed {
  T value;
  explicit Boxed(StableIValue given)
      : value(torch::stable::detail::ToImpl<T>::call(given, 0, false)) {}
};
template <>
struct Boxed<ScalarType> {
  ScalarType value;
  explicit Boxed(StableIValue given) : value(type_of(Boxed<int32_t>(given).value)) {}
};
template <>
struct Boxed<Tensor> {
  Tensor value;
  explicit Boxed(StableIValue given) : value(Tensor::owned(Boxed<AtenTensorHandle>(given).value)) {}
};
template <>
struct Boxed<std::optional<Tensor>> {
  std::optional<Tensor> value;
  explicit Boxed(StableIValue given) {
    const std::unique_ptr<StableIValue> place(Boxed<StableIValue*>(given).value);
    if (place != nullptr) value = std::move(Boxed<Tensor>(*place).value);
  }
};
template <>
struct Boxed<const char*> {
  StringHandle handle;
  const char* value = nullptr;
  explicit Boxed(StableIValue given) : handle(Boxed<StringHandle>(given).value) {
    TERNC_CHECK(torch_string_c_str(handle, &value) == 0, "ternc: a str argument has no text");
  }
  Boxed(const Boxed&) = delete;
  Boxed& operator=(const Boxed&) = delete;
  ~Boxed() { torch_delete_string(handle); }
};
template <class T>
struct Boxed<Few<T>> {
  Few<T> value;
  size_t count = 0;
  explicit Boxed(StableIValue given) {
    const auto list = Boxed<StableListHandle>(given).value;
    torch_list_size(list, &count);
    StableIValue item;
    for (size_t i = 0; i < count && torch_list_get_item(list, i, &item) == 0; ++i) {
      Boxed<T> taken(item);
      if (i < MAX_WEIGHTS) value.push_back(std::move(taken.value));
    }
    torch_delete_list(list);
  }
};

// Refuses lists that are too long: once all arguments of a call are held, so that all are freed.
template <class T>
void check(const Boxed<T>&) {}
template <class T>
void check(const Boxed<Few<T>>& list) {
  TERNC_CHECK(list.value.size() == list.count, "ternc: a list of ", list.count, " for at most ",
              MAX_WEIGHTS, " weights");
}

template <class R, class... A, size_t... I>
R unbox(R (*op)(A...), const StableIValue* stack, std::index_sequence<I...>) {
  const std::tuple<Boxed<std::decay_t<A>>...> arguments(stack[I]...);
  (check(std::get<I>(arguments)), ...);
  return op(std::get<I>(arguments).value...);
}
template <class R, class... A>
R unbox(R (*op)(A...), const StableIValue* stack) {
  return unbox(op, stack, std::index_sequence_for<A...>());
}

// Calls take(result), for each of what an operator returned.
template <class Take>
void each_result(Tensor& result, const Take& take) {
  take(result);
}
template <class Take, class... T>
void each_result(std::tuple<T...>& results, const Take& take) {
  std::apply([&](T&... result) { (take(result), ...); }, results);
}

// An operator as the dispatcher calls it: results take the place of the arguments.
template <auto op>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  auto results = unbox(op, stack);
  each_result(results, [&](Tensor& result) {
    *stack++ = torch::stable::detail::FromImpl<AtenTensorHandle>::call(result.give(), 0, false);
  });
}

// One argument of an entry point after another, each behind a pointer: a tensor by its handle, an
// optional one by the place of its handle or null, text as it is, a list by its place and length.
using Slots = const void* const*;

template <class T>
T read(Slots& next) {
  return *static_cast<const T*>(*next++);
}
template <>
inline bool read<bool>(Slots& next) {
  return read<int32_t>(next) != 0;
}
template <>
inline ScalarType read<ScalarType>(Slots& next) {
  return static_cast<ScalarType>(read<int32_t>(next));
}
template <>
inline const char* read<const char*>(Slots& next) {
  return static_cast<const char*>(*next++);
}
template <>
inline Tensor read<Tensor>(Slots& next) {
  return Tensor::borrowed(static_cast<AtenTensorHandle>(const_cast<void*>(*next++)));
}
template <>
inline std::optional<Tensor> read<std::optional<Tensor>>(Slots& next) {
  const void* place = *next++;
  if (place == nullptr) return std::nullopt;
  return Tensor::borrowed(*static_cast<const AtenTensorHandle*>(place));
}
template <>
inline Few<Tensor> read<Few<Tensor>>(Slots& next) {
  const auto* handles = static_cast<const AtenTensorHandle*>(*next++);
  const int64_t count = read<int64_t>(next);
  Few<Tensor> list;
  for (int64_t i = 0; i < count; ++i) list.push_back(Tensor::borrowed(handles[i]));
  return list;
}
template <>
inline Few<int64_t> read<Few<int64_t>>(Slots& next) {
  const auto* values = static_cast<const int64_t*>(*next++);
  const int64_t count = read<int64_t>(next);
  Few<int64_t> list;
  for (int64_t i = 0; i < count; ++i) list.push_back(values[i]);
  return list;
}

// Calls an operator with what the slots hold, and leaves its results in the places that follow.
template <class R, class... A>
void call(R (*op)(A...), Slots next) {
  std::tuple<std::decay_t<A>...> arguments{read<std::decay_t<A>>(next)...};
  auto results = std::apply(op, arguments);
  each_result(results, [&](Tensor& result) {
    *static_cast<AtenTensorHandle*>(const_cast<void*>(*next++)) = result.give();
  });
}

}  // namespace ternc

// The way into an operator for compiled C++, past the dispatcher: runtime/entries.py declares it.
#define TERNC_ENTRY(name, op)                                                \
  extern "C" __attribute__((visibility("default"))) void ternc_entry_##name( \
      const void* const* s) {                                                \
    ternc::call(op, s);                                                      \
  }
