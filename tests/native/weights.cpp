#include "weights.h"

#include <algorithm>

namespace ternc::tests {

TernaryWeight::TernaryWeight(const Form& form, int planes, Random& random, Content content)
    : planes_(planes) {
  const bool largest = content == Content::largest, grouped = form.group_size > 0;
  const int most = code_max(planes);
  const int64_t groups = grouped ? ceil_div(form.columns, form.group_size) : 1;
  lanes_ = {nullptr,
            nullptr,
            nullptr,
            form.scales,
            form.rows,
            form.columns,
            grouped ? form.group_size : form.columns,
            groups};
  for (int64_t i = 0; i < form.rows * form.columns; ++i)
    codes_.push_back(int8_t(largest ? most : random.below(2 * most + 1) - most));
  if (grouped && form.scales != ScaleKind::group)
    for (int64_t i = 0; i < form.rows * groups; ++i)
      multipliers_.push_back(
          uint8_t(largest ? multiplier_max(planes) : random.below(multiplier_max(planes) + 1)));
  scales_ = Buffer<float>(form.scales == ScaleKind::tensor ? 1
                          : form.scales == ScaleKind::row  ? form.rows
                                                           : form.rows * groups);
  for (int64_t i = 0; i < scales_.size(); ++i)
    scales_[i] = largest ? 1.0f : 0.01f + 0.005f * random.uniform();
  lanes_.scale = scales_.data();
  at_rest_ = lanes_;
  pack_lanes();
  pack_rows();
  if (!multipliers_.empty()) pack_lane_multipliers();
}

float TernaryWeight::scale(int64_t row, int64_t group) const {
  if (lanes_.scale_kind == ScaleKind::tensor) return scales_[0];
  return lanes_.scale_kind == ScaleKind::row ? scales_[row] : scales_[row * lanes_.groups + group];
}

// Every code, also of the padding, is or-ed into its byte of an all-zero stream.
void TernaryWeight::pack_lanes() {
  const int rows = block_rows(planes_), bytes = step_bytes(planes_);
  const int64_t steps = ceil_div(lanes_.columns, STEP_COLUMNS);
  lane_bytes_ = Buffer<uint8_t>(blocks() * steps * bytes);
  std::fill_n(lane_bytes_.data(), lane_bytes_.size(), uint8_t(0));
  for (int64_t row = 0; row < blocks() * rows; ++row)
    for (int64_t column = 0; column < steps * STEP_COLUMNS; ++column) {
      const bool inside = row < lanes_.rows && column < lanes_.columns;
      const int biased = (inside ? code(row, column) : 0) + code_max(planes_);
      const int64_t r = row % rows, field = r / FIELD_ROWS, lane = r % FIELD_ROWS;
      const int64_t at = lane * STEP_COLUMNS + column % STEP_COLUMNS;
      uint8_t* step = lane_bytes_.data() + (row / rows * steps + column / STEP_COLUMNS) * bytes;
      if (planes_ == INT8) step[field * 64 + at] = uint8_t(inside ? code(row, column) : 0);
      if (planes_ == 1) step[at] |= uint8_t(biased << (2 * field));
      if (planes_ == 2) step[at] |= uint8_t(biased << (4 * field));
      if (planes_ == DENSE && field == 4) {
        int four = 0;
        for (int64_t f = 3; f >= 0; --f) {
          const int64_t above = row - FIELD_ROWS * (4 - f);
          const bool held = above < lanes_.rows && column < lanes_.columns;
          four = 3 * four + (held ? code(above, column) : 0) + 1;
        }
        step[at] = uint8_t(four < 64 ? 64 * biased + four : 192 + 17 * biased + four - 64);
      }
      if (planes_ == 3) {
        step[field / 2 * 64 + at] |= uint8_t((biased & 15) << (4 * (field % 2)));
        step[256 + at] |= uint8_t((biased >> 4) << field);
      }
    }
  lanes_.bytes = lane_bytes_.data();
}

void TernaryWeight::pack_lane_multipliers() {
  const int rows = block_rows(planes_);
  lane_multipliers_ = Buffer<uint8_t>(blocks() * lanes_.groups * rows);
  std::fill_n(lane_multipliers_.data(), lane_multipliers_.size(), uint8_t(0));
  row_multipliers_ = Buffer<uint8_t>(lanes_.rows * lanes_.groups);
  for (int64_t row = 0; row < lanes_.rows; ++row)
    for (int64_t g = 0; g < lanes_.groups; ++g) {
      const auto m = uint8_t(multiplier(row, g));
      lane_multipliers_[(row / rows * lanes_.groups + g) * rows + row % rows] = m;
      row_multipliers_[row * lanes_.groups + g] = m;
    }
  lanes_.multiplier = lane_multipliers_.data();
  at_rest_.multiplier = row_multipliers_.data();
}

// Base 3, five trits a byte, plane p of P worth 3^(P - 1 - p); bytes as they are.
void TernaryWeight::pack_rows() {
  if (planes_ == INT8) {
    row_bytes_ = Buffer<uint8_t>(lanes_.rows * lanes_.columns);
    std::copy(codes_.begin(), codes_.end(), row_bytes_.data());
    at_rest_.bytes = row_bytes_.data();
    return;
  }
  const int64_t width = ceil_div(lanes_.columns, 5);
  const int planes = planes_ == DENSE ? 1 : planes_;
  row_bytes_ = Buffer<uint8_t>(planes * lanes_.rows * width);
  for (int plane = 0; plane < planes; ++plane)
    for (int64_t row = 0; row < lanes_.rows; ++row)
      for (int64_t byte = 0; byte < width; ++byte) {
        int value = 0;
        for (int64_t k = 5 * byte + 4; k >= 5 * byte; --k) {
          int digits = (k < lanes_.columns ? code(row, k) : 0) + code_max(planes_);
          for (int p = planes - 1; p > plane; --p) digits /= 3;
          value = 3 * value + digits % 3;
        }
        row_bytes_[(plane * lanes_.rows + row) * width + byte] = uint8_t(value);
      }
  at_rest_.bytes = row_bytes_.data();
}

Epilogue::Epilogue(Random& random, Dtype output, int64_t tokens, int64_t rows, int64_t variant)
    : dtype(output) {
  if (variant % 3 > 0) bias = random_values(random, variant % 3 == 1 ? Dtype::f32 : output, rows);
  if (variant % 4 == 3) residual = random_values(random, output, tokens * rows);
}

Output Epilogue::into(const Values& y) const {
  return {y.data(), dtype, bias.data(), bias.dtype(), residual.data()};
}

float Epilogue::finish(float value, int64_t token, int64_t row, int64_t rows) const {
  if (bias.size() > 0) value += bias.at(row);
  value = rounded(value, dtype);
  if (residual.size() > 0) value = rounded(value + residual.at(token * rows + row), dtype);
  return value;
}

}  // namespace ternc::tests
