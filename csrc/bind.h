// What the implementations of the ternc:: operators share: reading and checking their tensors.
// Through LibTorch's stable ABI: one binary for every torch from TORCH_TARGET_VERSION on.
#pragma once

#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "tensor.h"
#include "ternc.h"

namespace ternc {

// Values that are worth waking a second thread for.
constexpr int64_t VALUES_PER_THREAD = 1 << 15;
constexpr size_t ALIGNMENT = 64;
constexpr int64_t MAX_DIMS = 64;
constexpr size_t MAX_WEIGHTS = 4;  // of a call

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(ALIGNMENT)); }
};

// Memory of one call: on the stack while it fits NEAR bytes, which one token's does.
template <class T, size_t NEAR = 4096>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) { reserve(count); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* reserve(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T) + ALIGNMENT;
    if (bytes <= NEAR) return values_ = reinterpret_cast<T*>(near_);
    far_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t(ALIGNMENT))));
    return values_ = far_.get();
  }
  T* get() const { return values_; }
  T& operator[](int64_t i) const { return values_[i]; }

 private:
  alignas(ALIGNMENT) unsigned char near_[NEAR];
  std::unique_ptr<T[], FreeAligned> far_;
  T* values_ = nullptr;
};

// At most as many as a call has weights; no memory of its own.
template <class T>
struct Few {
  T items[MAX_WEIGHTS];
  size_t count = 0;

  void push_back(T item) {
    TERNC_CHECK(count < MAX_WEIGHTS, "ternc: more than ", MAX_WEIGHTS, " weights in a call");
    items[count++] = std::move(item);
  }
  size_t size() const { return count; }
  T& operator[](size_t i) { return items[i]; }
  const T& operator[](size_t i) const { return items[i]; }
  const T* begin() const { return items; }
  const T* end() const { return items + count; }
};

inline const Isa& isa() {
  const char* error = nullptr;
  const Isa* active = active_isa(&error);
  TERNC_CHECK(active != nullptr, error);
  return *active;
}

inline Dtype dtype_of(ScalarType type, const char* op, const char* name) {
  if (type == ScalarType::Float) return Dtype::f32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  TERNC_CHECK(type == ScalarType::Half, "ternc::", op, ": ", name, " is ",
              torch::headeronly::toString(type), ", not float32, bfloat16 or float16");
  return Dtype::f16;
}

[[gnu::cold, gnu::noinline]] inline Tensor dense_copy(const Tensor& t) {
  return Tensor::another(torch::stable::contiguous(t.stable()));
}

// `t`, which outlives the result, if it is dense; else a copy.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t.borrow() : dense_copy(t); }

[[gnu::cold, gnu::noinline]] inline Tensor converted(const Tensor& t, ScalarType type) {
  return Tensor::another(torch::stable::to(t.stable(), type));
}

// body(begin, end) over the threads, `grain` at least in each; here where that is all.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count > grain) return torch::stable::parallel_for(0, count, grain, body);
  if (count > 0) body(int64_t(0), count);
}

// A new tensor on the CPU, straight from the allocator: new_empty() of the stable ABI looks its
// operator up by name, 1 us a call.
inline Tensor allocate(int64_t dims, const int64_t* sizes, const int64_t* strides,
                       ScalarType type) {
  AtenTensorHandle handle = nullptr;
  TERNC_CHECK(aoti_torch_empty_strided(dims, sizes, strides, code_of(type),
                                       aoti_torch_device_type_cpu(), 0, &handle) == 0,
              "ternc: a tensor could not be allocated");
  return Tensor::owned(handle);
}

// Of the shape of `x`, its last dimension `last` long; dense.
inline Tensor empty(const Shape& x, int64_t last, ScalarType type) {
  const int64_t dims = x.dims;
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS], count = 1;
  TERNC_CHECK(dims >= 1 && dims <= MAX_DIMS, "ternc: a tensor of ", dims, " dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? last : x.sizes[d];
    strides[d] = count;
    count *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return allocate(dims, sizes, strides, type);
}

inline Tensor vector(int64_t size, ScalarType type) {
  const int64_t stride = 1;
  return allocate(1, &size, &stride, type);
}

inline Tensor matrix(int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 1 ? columns : 1, 1};
  return allocate(2, sizes, strides, type);
}

// Tokens a thread takes at least, of `columns` values each.
inline int64_t token_grain(int64_t columns) { return VALUES_PER_THREAD / (columns + 1) + 1; }

// A packed weight as an op receives it; keeps contiguous copies alive.
struct WeightTensors {
  Tensor bytes, scale, multiplier;
  Weight weight;
  int planes;
};

inline WeightTensors read_weight(const char* op, const Tensor& bytes, const Tensor& scale,
                                 const std::optional<Tensor>& multiplier, int64_t rows,
                                 int64_t columns, int64_t group_size, int64_t layout) {
  const bool at_rest = layout < 10;
  const int planes = int(layout % 10);
  TERNC_CHECK(layout >= 1 && layout < 20 &&
                  (planes == INT8 || (planes >= 1 && planes <= MAX_PLANES) || layout == 10 + DENSE),
              "ternc::", op, ": layout ", layout,
              " is unknown; layouts are 1..3 and 8 (rows), 11..14 and 18 (lanes)");
  TERNC_CHECK(columns <= MAX_COLUMNS, "ternc::", op, ": in_features=", columns,
              " is over 131,072: the integer sum of a row would not fit 32 bits");
  TERNC_CHECK(group_size >= 0 && (at_rest || group_size % STEP_COLUMNS == 0), "ternc::", op,
              ": group_size=", group_size, " is not a multiple of 4 (layout ", layout, ")");
  const int64_t groups = group_size == 0 ? 1 : ceil_div(columns, group_size);
  const int64_t blocks = at_rest ? rows : ceil_div(rows, block_rows(planes));
  const int64_t block_groups = groups * (at_rest ? 1 : block_rows(planes));
  const int64_t row_bytes = planes == INT8 ? columns : planes * ceil_div(columns, 5);
  const int64_t block_bytes =
      at_rest ? row_bytes : ceil_div(columns, STEP_COLUMNS) * step_bytes(planes);
  const int64_t stored = bytes.shape().numel();
  TERNC_CHECK(bytes.scalar_type() == ScalarType::Byte && stored == blocks * block_bytes,
              "ternc::", op, ": weight holds ", stored, " elements; layout ", layout, " of [", rows,
              ", ", columns, "] is ", blocks * block_bytes, " uint8");
  TERNC_CHECK(scale.scalar_type() == ScalarType::Float, "ternc::", op, ": scale is not float32");
  const Shape scales = scale.shape();
  const bool free_scales = scales.dims == 2;
  const int64_t scale_count = scales.numel();
  TERNC_CHECK(free_scales ? scales.sizes[0] == rows && scales.sizes[1] == groups &&
                                group_size > 0 && !multiplier.has_value()
                          : scales.dims == 1 && (scale_count == 1 || scale_count == rows),
              "ternc::", op, ": scale has ", scale_count, " elements; wanted [1], [", rows,
              "], or [", rows, ", ", groups, "] without multiplier and with group_size");
  TERNC_CHECK(!free_scales || planes != DENSE, "ternc::", op,
              ": layout 14 (dense) takes no free scales; pack the weight as layout 11");
  WeightTensors held{dense(bytes), dense(scale), {}, {}, planes};
  if (multiplier.has_value()) {
    const int64_t count = multiplier->shape().numel();
    TERNC_CHECK(multiplier->scalar_type() == ScalarType::Byte && group_size > 0 &&
                    count == blocks * block_groups,
                "ternc::", op, ": multiplier holds ", count, " elements; wanted ",
                blocks * block_groups, " uint8 and group_size > 0");
    held.multiplier = dense(*multiplier);
    held.weight.multiplier = static_cast<const uint8_t*>(held.multiplier.const_data_ptr());
  }
  held.weight.bytes = static_cast<const uint8_t*>(held.bytes.const_data_ptr());
  held.weight.scale = static_cast<const float*>(held.scale.const_data_ptr());
  held.weight.scale_kind = free_scales                     ? ScaleKind::group
                           : scale_count == 1 && rows != 1 ? ScaleKind::tensor
                                                           : ScaleKind::row;
  held.weight.rows = rows;
  held.weight.columns = columns;
  held.weight.group_size = group_size == 0 ? columns : group_size;
  held.weight.groups = groups;
  return held;
}

}  // namespace ternc
