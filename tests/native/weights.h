// Random weights in the layouts of csrc/ternc.h, packed code by code, and their products.
#pragma once

#include "definition.h"

namespace ternc::tests {

struct Form {
  int64_t rows, columns, group_size;  // group_size 0: none
  ScaleKind scales;
};

// Odd shapes, one and several blocks, ragged groups, every kind of scale.
constexpr Form FORMS[] = {
    {1, 1, 0, ScaleKind::row},       {3, 3, 0, ScaleKind::tensor},
    {1, 129, 4, ScaleKind::row},     {127, 129, 32, ScaleKind::row},
    {129, 127, 128, ScaleKind::row}, {65, 132, 32, ScaleKind::group},
    {3, 260, 128, ScaleKind::group}, {130, 300, 128, ScaleKind::tensor},
    {70, 1100, 0, ScaleKind::row},   {257, 64, 64, ScaleKind::row},
    {33, 516, 0, ScaleKind::tensor}, {2, 1540, 512, ScaleKind::row},
    {66, 124, 0, ScaleKind::row},    {0, 8, 0, ScaleKind::row},
    {5, 0, 0, ScaleKind::row},
};

// Of weights: numbers of planes, 1.6 bits, or bytes.
constexpr int KINDS[] = {1, 2, 3, DENSE, INT8};

// Dense weights have no free scales.
inline bool fits(const Form& form, int planes) {
  return planes != DENSE || form.scales != ScaleKind::group;
}

class TernaryWeight {
 public:
  enum class Content { random, largest };

  TernaryWeight(const Form& form, int planes, Random& random, Content content = Content::random);

  const Weight& lanes() const { return lanes_; }      // layouts 11..13, 18
  const Weight& at_rest() const { return at_rest_; }  // layouts 1..3, 8
  int planes() const { return planes_; }
  int64_t blocks() const { return ceil_div(lanes_.rows, block_rows(planes_)); }

  int code(int64_t row, int64_t column) const {
    return codes_[size_t(row * lanes_.columns + column)];
  }
  int multiplier(int64_t row, int64_t group) const {
    return multipliers_.empty() ? 1 : multipliers_[size_t(row * lanes_.groups + group)];
  }
  float scale(int64_t row, int64_t group) const;
  int64_t group_of(int64_t column) const { return column / lanes_.group_size; }

 private:
  void pack_lanes();
  void pack_lane_multipliers();
  void pack_rows();

  int planes_;
  std::vector<int8_t> codes_;         // [N, K]
  std::vector<uint8_t> multipliers_;  // [N, groups] or empty
  Buffer<float> scales_;
  Buffer<uint8_t> lane_bytes_, lane_multipliers_, row_bytes_, row_multipliers_;
  Weight lanes_, at_rest_;
};

// What is added to a product, and what it is rounded to.
struct Epilogue {
  Dtype dtype;
  Values bias;      // [N] or empty
  Values residual;  // [M, N] in `dtype`, or empty

  Epilogue(Random& random, Dtype output, int64_t tokens, int64_t rows, int64_t variant);
  Output into(const Values& y) const;
  float finish(float value, int64_t token, int64_t row, int64_t rows) const;
};

}  // namespace ternc::tests
