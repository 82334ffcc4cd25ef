// The arithmetic of the kernels, one value at a time and written for reading: what the instruction
// sets are compared with. It shares no code with csrc/.
#pragma once

#include <vector>

#include "harness.h"

namespace ternc::tests {

constexpr Dtype DTYPES[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
const char* name_of(Dtype dtype);
int itemsize(Dtype dtype);
// Twice the relative error of one rounding to `dtype`.
double unit_of(Dtype dtype);

// `value` rounded to `dtype`, ties to even.
float rounded(float value, Dtype dtype);

// An exactly-sized array of one dtype.
class Values {
 public:
  Values() = default;
  Values(Dtype dtype, int64_t count)
      : dtype_(dtype), count_(count), bytes_(count * itemsize(dtype)) {}

  Dtype dtype() const { return dtype_; }
  int64_t size() const { return count_; }
  void* data() const { return bytes_.data(); }
  float at(int64_t i) const;
  void set(int64_t i, float value) const;  // rounded to the dtype
  std::vector<float> row(int64_t begin, int64_t count) const;

 private:
  Dtype dtype_ = Dtype::f32;
  int64_t count_ = 0;
  Buffer<uint8_t> bytes_;
};

Values random_values(Random& random, Dtype dtype, int64_t count);

// One check: every value of `seen` is the one wanted, bit for bit; NaN is NaN.
bool expect_values(const Values& seen, const std::vector<float>& wanted, const char* what);

struct QuantizedRow {
  std::vector<int8_t> q;
  float scale;
};

// 8 bits: q = round(x * (127 / max|x|)); 4 bits: q = clamp(round(x * (sqrt 7 / mean|x|)), -8, 7).
QuantizedRow quantize(const std::vector<float>& x, int bits);

// (x * signs) blockdiag(H_block) / sqrt(block), butterflies at distance 1 first; block 0: x.
std::vector<float> rotate(std::vector<float> x, const int8_t* signs, int64_t block);

double activate(double x, Activation function);

}  // namespace ternc::tests
