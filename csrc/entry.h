// Operators as compiled C++ calls them, past the dispatcher, which turns every argument into a
// value of its own twice on the way. runtime/entries.py writes the callers.
#pragma once

#include "bind.h"

namespace ternc {

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
inline std::vector<Tensor> read<std::vector<Tensor>>(Slots& next) {
  const auto* handles = static_cast<const AtenTensorHandle*>(*next++);
  const int64_t count = read<int64_t>(next);
  std::vector<Tensor> list;
  list.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) list.push_back(Tensor::borrowed(handles[i]));
  return list;
}
template <>
inline std::vector<int64_t> read<std::vector<int64_t>>(Slots& next) {
  const auto* values = static_cast<const int64_t*>(*next++);
  return std::vector<int64_t>(values, values + read<int64_t>(next));
}

inline void give(Tensor& result, Slots& next) {
  *static_cast<AtenTensorHandle*>(const_cast<void*>(*next++)) = result.give();
}

// Calls an operator with what the slots hold, and leaves its results in the places that follow.
template <class R, class... A>
void call(R (*op)(A...), Slots next) {
  std::tuple<std::decay_t<A>...> arguments{read<std::decay_t<A>>(next)...};
  auto results = std::apply(op, arguments);
  if constexpr (std::is_same_v<std::decay_t<R>, Tensor>)
    give(results, next);
  else
    std::apply([&](auto&... result) { (give(result, next), ...); }, results);
}

}  // namespace ternc

// The way into an operator for compiled C++, past the dispatcher: runtime/entries.py declares it.
#define TERNC_ENTRY(name, op)                                                \
  extern "C" __attribute__((visibility("default"))) void ternc_entry_##name( \
      const void* const* s) {                                                \
    ternc::call(op, s);                                                      \
  }
