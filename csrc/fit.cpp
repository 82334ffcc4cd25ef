// fit: what a weight is fitted to beyond one row. The step of a whole tensor, the rounding of the
// scales, and the split over threads; rows are fitted by the kernels (generic/fit.h).
//
// Work is cut into pieces that do not depend on the number of threads, and their sums are added in
// order, so the result does not either.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "ternc.h"

namespace ternc {
namespace {

constexpr int64_t PIECE = 1 << 16;     // weights of a piece of a tensor
constexpr int64_t ROW_WORK = 1 << 14;  // weights that are worth a thread
constexpr int TOP_EXPONENT = 15;       // the largest scale is stored below 2^15
constexpr uint32_t INFINITE = 0x7f800000u;

// parallel(count, grain, ...) with a callable.
template <class Body>
void run(ParallelFor parallel, int64_t count, int64_t grain, const Body& body) {
  parallel(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Largest |w| of the whole tensor as the bits of a float.
uint32_t largest(const FitArgs& args, const Kernels& kernels, ParallelFor parallel) {
  const int64_t total = args.rows * args.columns;
  std::atomic<uint32_t> top{0};
  run(parallel, ceil_div(total, PIECE), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * PIECE, count = std::min(PIECE, total - first);
      const uint32_t seen = kernels.largest(args.w, args.dtype, first, count);
      uint32_t before = top.load();
      while (seen > before && !top.compare_exchange_weak(before, seen)) {
      }
    }
  });
  return top.load();
}

// Calls body(piece, magnitudes, count) for every piece of the tensor.
template <class Body>
void each_piece(const FitArgs& args, int exponent, const Kernels& kernels, ParallelFor parallel,
                const Body& body) {
  const int64_t total = args.rows * args.columns;
  run(parallel, ceil_div(total, PIECE), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> values(new float[PIECE]);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * PIECE, count = std::min(PIECE, total - first);
      kernels.magnitudes(args, exponent, first, count, values.get());
      body(piece, values.get(), count);
    }
  });
}

std::vector<SnapSums> tensor_sums(const FitArgs& args, int exponent,
                                  const std::vector<double>& steps, const Kernels& kernels,
                                  ParallelFor parallel) {
  const int64_t pieces = ceil_div(args.rows * args.columns, PIECE), wide = int64_t(steps.size());
  std::vector<SnapSums> partial(size_t(pieces * wide), SnapSums{0.0, 0.0});
  each_piece(args, exponent, kernels, parallel, [&](int64_t piece, const float* w, int64_t count) {
    kernels.snap_sums(w, count, args.planes, steps.data(), int(wide), &partial[piece * wide]);
  });
  std::vector<SnapSums> sums(steps.size(), SnapSums{0.0, 0.0});
  for (int64_t i = 0; i < pieces * wide; ++i) {
    sums[i % wide].weight_code += partial[i].weight_code;
    sums[i % wide].code_code += partial[i].code_code;
  }
  return sums;
}

// Two and three planes: the candidates of generic/fit.h over the whole tensor.
double tensor_candidate(const FitArgs& args, uint32_t top, int exponent, const Kernels& kernels,
                        ParallelFor parallel) {
  float largest_value;
  std::memcpy(&largest_value, &top, 4);
  const double unit = std::ldexp(double(largest_value), -exponent) / code_max(args.planes);
  double best = 0.0, best_step = 0.0, ratio = FIRST_RATIO;
  bool lowest_is_best = true;
  for (int tried = 0; tried <= MORE_CANDIDATES && lowest_is_best; tried += CANDIDATES) {
    std::vector<double> steps;
    for (int i = 0; i < CANDIDATES; ++i)
      steps.push_back(unit * ratio * std::pow(RATIO, tried == 0 ? i : -1 - i));
    ratio = tried == 0 ? ratio : ratio * std::pow(RATIO, -CANDIDATES);
    const std::vector<SnapSums> sums = tensor_sums(args, exponent, steps, kernels, parallel);
    const double lowest = *std::min_element(steps.begin(), steps.end());
    for (size_t i = 0; i < steps.size(); ++i) {
      const double error = steps[i] * (steps[i] * sums[i].code_code - 2.0 * sums[i].weight_code);
      if (error < best) best = error, best_step = steps[i];
    }
    lowest_is_best = best_step == lowest;
  }
  for (int round = 0; round < LLOYD_ROUNDS + args.refine; ++round) {
    const SnapSums sums = tensor_sums(args, exponent, {best_step}, kernels, parallel)[0];
    if (sums.code_code > 0.0) best_step = sums.weight_code / sums.code_code;
  }
  return best_step;
}

// One plane, exactly, without sorting the tensor: the largest of (prefix sum)^2 / length over |w|
// in descending order. Magnitudes are binned by their leading bits; within a bin the quotient is
// at most the larger of its value at the bin's start and that of `count` copies of the bin's upper
// edge (it is convex in the number kept), so only the few bins whose bound beats the best bin
// border are sorted.
double tensor_one_plane(const FitArgs& args, int exponent, const Kernels& kernels) {
  constexpr int SHIFT = 15, BINS = (0x3f800000 >> SHIFT) + 1;
  struct Bin {
    double sum;
    int64_t count;
    bool open;
  };
  std::vector<Bin> bins(BINS, Bin{0.0, 0, false});
  const auto bin_of = [](float w) {
    uint32_t bits;
    std::memcpy(&bits, &w, 4);
    return int(bits >> SHIFT);
  };
  const auto serial = [](int64_t count, int64_t, ParallelBody body, void* context) {
    body(context, 0, count);
  };
  each_piece(args, exponent, kernels, serial, [&](int64_t, const float* w, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Bin& bin = bins[bin_of(w[i])];
      bin.sum += double(w[i]);
      ++bin.count;
    }
  });
  double best = 0.0, step = 0.0, prefix = 0.0;
  int64_t length = 0;
  const auto consider = [&] {
    const double kept = length == 0 ? 0.0 : prefix * prefix / double(length);
    if (kept > best) best = kept, step = prefix / double(length);
  };
  for (int b = BINS; b-- > 0; consider()) prefix += bins[b].sum, length += bins[b].count;
  prefix = 0.0, length = 0;
  for (int b = BINS; b-- > 0; prefix += bins[b].sum, length += bins[b].count) {
    float edge;
    const uint32_t bits = uint32_t(b + 1) << SHIFT;
    std::memcpy(&edge, &bits, 4);
    const double end = prefix + double(bins[b].count) * double(edge);
    bins[b].open = bins[b].count > 1 && end * end / double(length + bins[b].count) > best;
  }
  std::vector<float> inside;
  each_piece(args, exponent, kernels, serial, [&](int64_t, const float* w, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      if (bins[bin_of(w[i])].open) inside.push_back(w[i]);
  });
  std::sort(inside.begin(), inside.end(), std::greater<float>());
  prefix = 0.0, length = 0;
  size_t next = 0;
  for (int b = BINS; b-- > 0;) {
    const double prefix_end = prefix + bins[b].sum;
    const int64_t length_end = length + bins[b].count;
    if (bins[b].open)
      for (; length < length_end; ++length, consider()) prefix += double(inside[next++]);
    prefix = prefix_end, length = length_end;
  }
  return step;
}

// fp16 value nearest to x >= 0, ties to even.
double round_to_half(double x) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  return std::nearbyint(x / unit) * unit;
}

// Real scales -> fp16 times one power of two that brings the largest into [2^14, 2^15).
void round_scales(const double* real, int64_t count, float* scale) {
  int exponent;
  std::frexp(*std::max_element(real, real + count), &exponent);
  const int shift = exponent - TOP_EXPONENT;
  for (int64_t i = 0; i < count; ++i)
    scale[i] = float(std::ldexp(round_to_half(std::ldexp(real[i], -shift)), shift));
}

}  // namespace

bool fit(const FitArgs& args, bool tensor_scale, float* scale, const Kernels& kernels,
         ParallelFor parallel) {
  const uint32_t top = largest(args, kernels, parallel);
  if (top >= INFINITE) return false;
  const int64_t grain = ROW_WORK / args.columns + 1, scales = tensor_scale ? 1 : args.rows;
  std::vector<double> real(size_t(scales), 0.0);
  if (!tensor_scale) {
    run(parallel, args.rows, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(new float[fit_scratch(args.columns)]);
      kernels.fit_rows(args, begin, end, scratch.get(), real.data());
    });
  } else if (top != 0) {
    int exponent;
    float largest_value;
    std::memcpy(&largest_value, &top, 4);
    std::frexp(largest_value, &exponent);
    const double step = args.planes == 1 ? tensor_one_plane(args, exponent, kernels)
                                         : tensor_candidate(args, top, exponent, kernels, parallel);
    real[0] = std::ldexp(step, exponent);
  }
  round_scales(real.data(), scales, scale);
  run(parallel, args.rows, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[fit_scratch(args.columns)]);
    kernels.snap_rows(args, begin, end, scratch.get(), scale, tensor_scale ? 0 : 1);
  });
  return true;
}

}  // namespace ternc
