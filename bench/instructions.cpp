// Runs each CPU kernel of one instruction set on two numbers of rows under valgrind --tool=callgrind, which writes a count of
// instructions for each run. bench/instructions.py compiles this, runs it and takes the differences.
//
// One tile is the work of one task (csrc/cpu/arguments.h), so nothing of torch is needed, and no threads.

#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "math/activations.h"

using namespace chainzrule;

namespace {

constexpr int64_t kColumns = 512;
// Backward sums are handed on after every kRowsPerSum rows: the difference holds that once.
constexpr int64_t kRowCounts[] = {kRowsPerSum, 2 * kRowsPerSum};
constexpr int64_t kMostRows = 2 * kRowsPerSum;
constexpr int kMostTangents = 8;
constexpr int kMostCoefficients = 9;

// Room for `count` numbers of any type. Zero bytes are zeros of all of them: the instructions of a kernel do not depend on values,
// but NaN and subnormal numbers are kept out of it all the same.
class Numbers {
 public:
  explicit Numbers(int64_t count) : data_(static_cast<size_t>(count), 0.0) {}
  void* data() { return data_.data(); }
  double* doubles() { return data_.data(); }

 private:
  std::vector<double> data_;
};

struct Work {
  std::string op;
  std::string arguments;
  FunctionSpec function;
  DataType type = DataType::float32;
  bool norm = true;          // polynomial_dreg and activation_dreg, with row_sq; or polynomial alone
  int64_t positions = 1;     // of a feature map with its channels outermost; 1 for samples by channels
  int64_t tangents = 0;      // of the tangent ops
};

FunctionSpec polynomial(int degree, bool per_channel, bool rectified = false) {
  FunctionSpec spec;
  spec.degree = degree;
  spec.per_channel = per_channel;
  spec.rectified = rectified;
  return spec;
}


std::vector<Work> works() {
  std::vector<Work> result;
  const auto add = [&](const char* op, const std::string& arguments, FunctionSpec function) -> Work& {
    result.push_back({op, arguments, function});
    return result.back();
  };
  add("polynomial", "degree 3, per channel", polynomial(3, true)).norm = false;
  for (int degree = 1; degree < kMostCoefficients; ++degree) {
    add("polynomial_dreg", "degree " + std::to_string(degree) + ", per channel", polynomial(degree, true));
  }
  add("polynomial_dreg", "degree 3, shared", polynomial(3, false));
  add("polynomial_dreg", "degree 3, per channel, rectified", polynomial(3, true, true));
  add("polynomial_dreg", "degree 3, per channel, bfloat16", polynomial(3, true)).type = DataType::bfloat16;
  add("polynomial_dreg", "degree 3, per channel, float16", polynomial(3, true)).type = DataType::float16;
  add("polynomial_dreg", "degree 3, per channel, float64", polynomial(3, true)).type = DataType::float64;
  std::map<std::string, FunctionSpec> activations;
  scalar_target::for_each_activation([&](auto kind) {
    FunctionSpec spec;
    spec.activation = static_cast<int>(activations.size());
    activations[decltype(kind)::kName] = spec;
  });
  for (const auto& [name, spec] : activations) add("activation_dreg", name, spec);
  add("polynomial_spatial_dreg", "degree 3, per channel", polynomial(3, true)).positions = 64;
  add("activation_spatial_dreg", "relu", activations["relu"]).positions = 64;
  for (int64_t tangents : {1, 2, 4, 8}) {
    add("polynomial_tangent", "degree 3, per channel, tangents " + std::to_string(tangents), polynomial(3, true)).tangents =
        tangents;
  }
  add("activation_tangent", "gelu, tangents 4", activations["gelu"]).tangents = 4;
  return result;
}

// What the kernels read and write, of the largest size that any of them needs.
struct Room {
  Numbers z{kMostRows * kColumns}, y{kMostRows * kColumns};
  Numbers z_dot{kMostTangents * kMostRows * kColumns}, y_dot{kMostTangents * kMostRows * kColumns};
  Numbers grad_y{kMostRows * kColumns}, grad_y_dot{kMostTangents * kMostRows * kColumns};
  Numbers coefficients{kMostCoefficients * kColumns}, row_sq{kColumns};
  Numbers norm{kMostTangents * kMostRows};
  Numbers coefficient_sums{kMostCoefficients * kColumns}, row_sq_sums{kColumns};
};

// Counts what happens between here and the end of `run`, once for each number of rows.
template <class Run>
void count(const Work& work, const char* stage, const Run& run) {
  for (const int64_t rows : kRowCounts) {
    const Tile tile{0, rows, 0, kColumns};
    const std::string name =
        work.op + ", " + work.arguments + "|" + stage + "|" + std::to_string(rows * kColumns);
    CALLGRIND_ZERO_STATS;
    run(rows, tile);
    CALLGRIND_DUMP_STATS_AT(name.c_str());
  }
}

template <class Arguments>
Arguments common(const Work& work, Room& room) {
  Arguments a{};
  a.type = work.type;
  a.function = work.function;
  a.function.coefficients = room.coefficients.data();
  a.z = {room.z.data(), kColumns};
  return a;
}

template <class Arguments>
Arguments dreg(const Work& work, Room& room) {
  Arguments a = common<Arguments>(work, room);
  a.order.channels = kColumns / work.positions;
  a.order.positions = work.positions;
  a.order.outermost = work.positions > 1;
  if (work.norm) a.row_sq = {room.row_sq.data(), work.positions == 1};
  return a;
}

void count_dreg(const KernelTable& table, const Work& work, Room& room) {
  DregForward forward = dreg<DregForward>(work, room);
  forward.y = {room.y.data(), kColumns};
  if (work.norm) forward.norm = room.norm.data();
  count(work, "forward", [&](int64_t, const Tile& tile) { table.dreg_forward(forward, tile, 0); });

  DregBackward backward = dreg<DregBackward>(work, room);
  backward.grad_y = {room.grad_y.data(), kColumns};
  backward.grad_z = {room.y.data(), kColumns};
  if (work.norm) backward.grad_norm = room.norm.data();
  GradientSums sums;
  if (work.function.activation < 0) sums.coefficients = room.coefficient_sums.doubles();
  if (work.norm) sums.row_sq = room.row_sq_sums.doubles();
  count(work, "backward", [&](int64_t, const Tile& tile) { table.dreg_backward(backward, tile, sums); });
}

template <class Arguments>
Arguments tangent(const Work& work, Room& room, int64_t rows) {
  Arguments a = common<Arguments>(work, room);
  a.columns = kColumns;
  a.rows = rows;
  a.tangents = work.tangents;
  a.z_dot = {room.z_dot.data(), kColumns};
  a.z_dot_tangent_stride = rows * kColumns;
  return a;
}

void count_tangent(const KernelTable& table, const Work& work, Room& room) {
  count(work, "forward", [&](int64_t rows, const Tile& tile) {
    TangentForward forward = tangent<TangentForward>(work, room, rows);
    forward.y = {room.y.data(), kColumns};
    forward.y_dot = {room.y_dot.data(), kColumns};
    forward.norm = room.norm.data();
    table.tangent_forward(forward, tile, 0);
  });
  count(work, "backward", [&](int64_t rows, const Tile& tile) {
    TangentBackward backward = tangent<TangentBackward>(work, room, rows);
    backward.grad_y = {room.grad_y.data(), kColumns};
    backward.grad_y_dot = {room.grad_y_dot.data(), kColumns};
    backward.grad_y_dot_tangent_stride = rows * kColumns;
    backward.grad_norm = room.norm.data();
    backward.grad_z = {room.y.data(), kColumns};
    backward.grad_z_dot = {room.y_dot.data(), kColumns};
    GradientSums sums;
    if (work.function.activation < 0) sums.coefficients = room.coefficient_sums.doubles();
    table.tangent_backward(backward, tile, sums);
  });
}

}  // namespace

int main() {
  if (!RUNNING_ON_VALGRIND) {
    std::fputs("to be run under valgrind --tool=callgrind\n", stderr);
    return 2;
  }
  const KernelTable& table = CHAINZRULE_COUNTED_KERNELS();
  Room room;
  for (const Work& work : works()) {
    if (work.tangents) {
      count_tangent(table, work, room);
    } else {
      count_dreg(table, work, room);
    }
  }
  return 0;
}
