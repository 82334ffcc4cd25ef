// torch tensors -> the attention kernel: the CPU implementation of ternc::attention.
#include "bind.h"
#include "entry.h"

namespace ternc {
namespace {

// Queries up to which two at a time are faster than a block of them in lanes.
constexpr int64_t MAX_ROW_QUERIES = 4;

// A dense [B, heads, L, D] of fp32 that a kernel reads.
Tensor heads_of(const char* name, const Tensor& t) {
  TERNC_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float, "ternc::attention: ", name,
              " is not float32 [B, heads, L, D]");
  return dense(t);
}

// [B, H, L, Dv] whose heads lie side by side, as the projection behind reads them.
Tensor side_by_side(int64_t batch, int64_t heads, int64_t queries, int64_t columns) {
  const int64_t sizes[] = {batch, heads, queries, columns};
  const int64_t strides[] = {queries * heads * columns, columns, heads * columns, 1};
  return allocate(4, sizes, strides, ScalarType::Float);
}

// The mask and its strides, as if it had the sizes [B, H, L, S].
void read_mask(const Tensor& mask, AttentionArgs& args, int64_t batch) {
  const int64_t sizes[] = {batch, args.heads, args.queries, args.keys};
  int64_t* strides[] = {&args.mask_batch, &args.mask_head, &args.mask_query, &args.mask_key};
  const Shape shape = mask.shape();
  const int64_t* mask_strides = mask.strides();
  const int64_t missing = 4 - shape.dims;
  TERNC_CHECK(missing >= 0 && missing <= 2 && mask.scalar_type() == ScalarType::Bool,
              "ternc::attention: mask is not bool of 2 to 4 dimensions");
  for (int64_t i = missing; i < 4; ++i) {
    const int64_t size = shape.sizes[i - missing];
    TERNC_CHECK(size == sizes[i] || size == 1, "ternc::attention: mask does not fit q and k");
    *strides[i] = size == 1 ? 0 : mask_strides[i - missing];
  }
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
}

// Many queries without a mask in blocks, else in pairs that share keys.
void run_attention(const AttentionArgs& args, int64_t batch) {
  const Kernels& kernels = *isa().kernels;
  if (args.mask == nullptr && args.queries > MAX_ROW_QUERIES) {
    const int64_t blocks = ceil_div(args.queries, kernels.query_rows);
    parallel_for(batch * args.heads * blocks, 1, [&](int64_t i, int64_t end) {
      const Scratch<float> scratch(attention_floats(args.columns, args.value_columns));
      kernels.attention(args, i, end, scratch.get());
    });
    return;
  }
  const int64_t pairs = ceil_div(args.heads / args.key_heads * args.queries, QUERY_PAIR);
  const int64_t values = args.keys * (args.columns + args.value_columns);
  const int64_t grain = ceil_div(VALUES_PER_THREAD, values + 1);
  parallel_for(batch * args.key_heads * pairs, grain, [&](int64_t i, int64_t end) {
    const Scratch<float> scratch(attention_row_floats(args.keys));
    kernels.attention_rows(args, i, end, scratch.get());
  });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
                 const std::optional<Tensor>& mask) {
  const Tensor queries = heads_of("q", q), keys = heads_of("k", k), values = heads_of("v", v);
  const int64_t *of_q = q.shape().sizes, *of_k = k.shape().sizes, *of_v = v.shape().sizes;
  const int64_t batch = of_q[0], heads = of_q[1], groups = of_k[1];
  TERNC_CHECK(of_k[0] == batch && of_v[0] == batch && of_k[3] == of_q[3] && of_v[1] == groups &&
                  of_v[2] == of_k[2] && of_k[2] > 0 && groups > 0 && heads % groups == 0,
              "ternc::attention: q, k and v do not fit together");
  Tensor y = side_by_side(batch, heads, of_q[2], of_v[3]);
  AttentionArgs args{static_cast<const float*>(queries.const_data_ptr()),
                     static_cast<const float*>(keys.const_data_ptr()),
                     static_cast<const float*>(values.const_data_ptr()),
                     static_cast<float*>(y.mutable_data_ptr()),
                     heads,
                     groups,
                     of_q[2],
                     of_k[2],
                     of_q[3],
                     of_v[3],
                     float(scale),
                     causal};
  if (mask) read_mask(*mask, args, batch);
  run_attention(args, batch);
  return y;
}

}  // namespace
}  // namespace ternc

TERNC_ENTRY(attention, &ternc::attention)

STABLE_TORCH_LIBRARY_IMPL(ternc, CPU, m) { m.impl("attention", ternc::boxed<ternc::attention>); }
