// What the bindings (ops.cpp, which knows torch) hand to the kernels (which do not).
//
// Tensors arrive as matrices with a row for each sample. Data tensors have any row stride and unit column stride. The columns of
// a row are the channels of the sample, or those of each of its positions (an image). Parameters and per-sample quantities have
// the compute type: double for float64 data, float for everything else.
#pragma once

#include <cstdint>

namespace chainzrule {

enum class DataType { float32, float64, bfloat16, float16 };

// The scalar function: a fixed activation, or a polynomial.
struct FunctionSpec {
  int activation = -1;          // index in the order of for_each_activation; -1 for a polynomial
  int degree = 0;               // of the polynomial
  bool per_channel = false;     // whether coefficient k of channel c stands at [k * channels + c], or at [k] for all
  bool rectified = false;       // p(relu(z)) in the place of p(z)
  const void* coefficients = nullptr;
};

// Which channel a column belongs to.
struct ChannelOrder {
  int64_t channels = 0;
  int64_t positions = 1;   // columns = channels * positions
  bool outermost = false;  // the positions of a channel side by side, or the channels of a position

  int64_t columns() const { return channels * positions; }
  // Whether a channel has a sum of many columns, or of none, rather than a column of its own.
  bool sums_columns() const { return positions != 1; }
};

// The rows of a channel's positions, of which many are alike: the windows in the middle of an image have all their taps inside.
struct RowKinds {
  int64_t width = 1;  // positions in a row
  int64_t kinds = 1;
  const int32_t* kind_of_row = nullptr;
};

// r of sum_j f'(z_j)^2 r_j.
struct RowSq {
  const void* data = nullptr;      // null for 1
  bool per_channel = true;         // for each channel, or for each column
  const RowKinds* rows = nullptr;  // not null, with per_channel: for each channel, which is outermost, a row of each kind

  int64_t row_width() const { return rows ? rows->width : 1; }
};

struct ConstMatrix {
  const void* data = nullptr;  // null: absent
  int64_t row_stride = 0;
};

struct Matrix {
  void* data = nullptr;  // null: not wanted
  int64_t row_stride = 0;
};

// A rectangle of the matrix: the work of one task.
struct Tile {
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
};

// y = f(z), derivative = f'(z), norm = sum_j f'(z_j)^2 row_sq_j over the columns of the tile.
struct DregForward {
  DataType type;
  ChannelOrder order;
  FunctionSpec function;
  ConstMatrix z;
  bool z_is_wide = false;  // z has the compute type, whatever the type of the results
  Matrix y;
  Matrix derivative;
  Matrix kept_z;  // a copy of z, in the type of the results
  RowSq row_sq;
  void* norm = nullptr;              // compute type, norm[row]: when a tile holds whole rows
  double* norm_partials = nullptr;   // norm_partials[row * splits + split]: when it does not
  int64_t splits = 1;
};

// The gradients of z, and sums over the rows of the tile for the parameters.
struct DregBackward {
  DataType type;
  ChannelOrder order;
  FunctionSpec function;
  ConstMatrix z;
  ConstMatrix grad_y;
  ConstMatrix grad_derivative;
  const void* grad_norm = nullptr;  // compute type, [row]
  RowSq row_sq;
  Matrix grad_z;
};

// y = f(z), y_dot_t = f'(z) z_dot_t, norm_t = sum_j y_dot_tj^2. Tangent t starts `tangent_stride` elements after tangent t - 1.
struct TangentForward {
  DataType type;
  int64_t columns;
  int64_t rows;
  int64_t tangents;
  FunctionSpec function;
  ConstMatrix z;
  ConstMatrix z_dot;
  int64_t z_dot_tangent_stride;
  Matrix y;
  Matrix y_dot;                     // contiguous
  void* norm = nullptr;             // compute type, norm[t * rows + row]
  double* norm_partials = nullptr;  // norm_partials[(t * rows + row) * splits + split]
  int64_t splits = 1;
};

struct TangentBackward {
  DataType type;
  int64_t columns;
  int64_t rows;
  int64_t tangents;
  FunctionSpec function;
  ConstMatrix z;
  ConstMatrix z_dot;
  int64_t z_dot_tangent_stride;
  ConstMatrix grad_y;
  ConstMatrix grad_y_dot;
  int64_t grad_y_dot_tangent_stride;
  const void* grad_norm = nullptr;  // compute type, [t * rows + row]
  Matrix grad_z;
  Matrix grad_z_dot;                // contiguous
};

// Sums of the squares of a weight (K, C, taps): a number for each of the K units, or for each window of the given rows of windows.
struct SquaredTaps {
  // One spatial dimension of a convolution.
  struct Dimension {
    int64_t taps = 1, windows = 1, size = 1, stride = 1, padding = 0, dilation = 1;

    // The windows in which tap t falls inside the image: begin(t), ..., end(t) - 1.
    int64_t begin(int64_t t) const { return first_at(padding - t * dilation); }
    int64_t end(int64_t t) const {
      const int64_t first_outside = first_at(size + padding - t * dilation);
      return first_outside > begin(t) ? first_outside : begin(t);
    }

   private:
    // The first window that starts at `place` or behind it, in an image that starts at `padding`.
    int64_t first_at(int64_t place) const {
      const int64_t window = place <= 0 ? 0 : (place + stride - 1) / stride;
      return window < windows ? window : windows;
    }
  };

  DataType type;                // of the weight
  const void* weight = nullptr; // contiguous
  int64_t columns = 1;          // C * taps
  int64_t outer_taps = 1;       // of all dimensions but the last; 1 where every tap counts alike
  Dimension along;              // the last dimension
  int64_t rows = 1;             // rows of windows
  const char* inside = nullptr; // [row * outer_taps + tap]: whether the tap falls inside the image in all dimensions but the last
  const void* factors = nullptr; // compute type, null for 1: what the sums of each of the K are multiplied by
  const void* grad = nullptr;   // compute type, contiguous: of the sums
  void* result = nullptr;       // the sums in the compute type, or the gradient in the weight's
  void* factor_gradients = nullptr;  // compute type; null: not wanted

  int64_t taps() const { return outer_taps * along.taps; }
  int64_t windows() const { return rows * along.windows; }
};

// Where a backward task leaves its sums. The gradient of coefficient k goes to coefficients[k] (shared), or to
// coefficients[k * channels + c] (per channel); that of row_sq to row_sq[c], to the place of its column's row_sq among the rows of
// each kind or, with one for each column, to row_sq_columns[j]. What belongs to the columns of the tile is written; where there are
// positions, all of coefficients[] and of row_sq[] is, or all that belongs to the tile's channels. A tile with sums for each column
// has at most kRowsPerSum rows.
struct GradientSums {
  double* coefficients = nullptr;
  double* row_sq = nullptr;
  void* row_sq_columns = nullptr;  // compute type
  bool of_own_channels = false;    // the tile has whole channels, outermost, and other tiles write what belongs to the others
};

// Rows that a backward sums in the compute type before it goes over to double.
constexpr int64_t kRowsPerSum = 32;
// Columns of a backward tile that keeps sums for each channel: small enough for them to stay in the first-level cache.
constexpr int64_t kColumnsPerSum = 1024;

// The kernels of one instruction set.
struct KernelTable {
  const char* instruction_set;
  void (*dreg_forward)(const DregForward&, const Tile&, int64_t split);
  void (*dreg_backward)(const DregBackward&, const Tile&, const GradientSums&);
  // Whether the two take RowSq::rows of that width; they are then to have whole rows in each tile, and an activation.
  bool (*takes_rows)(DataType, int64_t width);
  void (*tangent_forward)(const TangentForward&, const Tile&, int64_t split);
  void (*tangent_backward)(const TangentBackward&, const Tile&, const GradientSums&);
  // to[j] = sum over the slabs of from[slab * n + j], in order; `to` has the compute type
  void (*sum_slabs)(DataType type, const double* from, int64_t slabs, int64_t n, int64_t begin, int64_t end, void* to);
  // The same with `from` in the compute type.
  void (*sum_column_slabs)(DataType type, const void* from, int64_t slabs, int64_t n, int64_t begin, int64_t end, void* to);
  // Of the rows `begin` to `end` of the weight.
  void (*squared_taps)(const SquaredTaps&, int64_t begin, int64_t end);
  void (*squared_taps_backward)(const SquaredTaps&, int64_t begin, int64_t end);
};

const KernelTable& kernels_baseline();
#if defined(__x86_64__)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
#endif

// The index of an activation's name, or -1.
int activation_index(const char* name);

// Whether the activation of an index has a curvature, so that its gradient depends on row_sq.
bool activation_is_curved(int index);

}  // namespace chainzrule
