// torch tensors -> the attention kernel: the CPU implementation of ternc::attention.
#include "bind.h"
#include "entry.h"

namespace ternc {
namespace {

// A dense [B, heads, L, D] of fp32 that a kernel reads.
Tensor heads_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float, "ternc::attention: ", name,
                  " is not float32 [B, heads, L, D]");
  return dense(t);
}

// [B, H, L, Dv] whose heads lie side by side, as the projection behind reads them.
Tensor side_by_side(int64_t batch, int64_t heads, int64_t queries, int64_t columns) {
  const int64_t sizes[] = {batch, heads, queries, columns};
  const int64_t strides[] = {queries * heads * columns, columns, heads * columns, 1};
  return allocate(4, sizes, strides, ScalarType::Float);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  const Tensor queries = heads_of("q", q), keys = heads_of("k", k), values = heads_of("v", v);
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1);
  STD_TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && k.size(3) == q.size(3) &&
                      v.size(1) == groups && v.size(2) == k.size(2) && k.size(2) > 0 &&
                      groups > 0 && heads % groups == 0,
                  "ternc::attention: q, k and v do not fit together");
  const Tensor y = side_by_side(batch, heads, q.size(2), v.size(3));
  const AttentionArgs args{static_cast<const float*>(queries.const_data_ptr()),
                           static_cast<const float*>(keys.const_data_ptr()),
                           static_cast<const float*>(values.const_data_ptr()),
                           static_cast<float*>(y.mutable_data_ptr()),
                           heads,
                           groups,
                           q.size(2),
                           k.size(2),
                           q.size(3),
                           v.size(3),
                           float(scale),
                           causal};
  const Kernels& kernels = *isa().kernels;
  const int64_t blocks = ceil_div(args.queries, kernels.query_rows);
  torch::stable::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(attention_floats(args.columns, args.value_columns));
    kernels.attention(args, begin, end, scratch.get());
  });
  return y;
}

}  // namespace
}  // namespace ternc

TERNC_ENTRY(attention, &ternc::attention)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) { m.impl("attention", TORCH_BOX(&ternc::attention)); }
