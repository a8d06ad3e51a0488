// A GPU of one multiprocessor on the host, enough of one to run the convolution kernels: included before each .cu file, which
// is then compiled as C++. The threads of a block are fibers that take turns; they change at a barrier or an instruction of the
// whole warp. CUTLASS's own host code stands in for what it writes in PTX, except for ldmatrix, mma and ld.shared, which are
// emulated here, as the shuffles are.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>
#include <vector_types.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

namespace host_device {

constexpr int kSharedBytes = 163 << 10;  // as sm_80

inline uint3 thread_index{}, block_index{};
inline dim3 block_size{}, grid_size{};

class Block {
 public:
  // Runs one block of so many threads.
  static void run(int threads, const std::function<void()>& body) {
    Block block(threads, body);
    current() = &block;
    while (block.remaining_ > 0) {
      for (int i = 0; i < threads; ++i) {
        if (block.fibers_[i].finished) continue;
        thread_index = {static_cast<unsigned>(i), 0, 0};
        block.running_ = i;
        swapcontext(&block.scheduler_, &block.fibers_[i].context);
      }
    }
    current() = nullptr;
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  void wait_for_block() { wait(block_barrier_, static_cast<int>(fibers_.size())); }
  void wait_for_warp() { wait(warp_barriers_[running_ / 32], 32); }

  // Leaves `mine` where the warp's other lanes find it, and calls use(lane) -> bytes to read them; all lanes take part.
  template <class Value, class Use>
  void exchange(const Value& mine, const Use& use) {
    static_assert(sizeof(Value) <= kSlot);
    std::memcpy(slots_[running_].bytes, &mine, sizeof(Value));
    wait_for_warp();
    const int first = running_ / 32 * 32;
    use([&](int lane) -> const Value& { return *reinterpret_cast<const Value*>(slots_[first + lane].bytes); });
    wait_for_warp();
  }
  int lane() const { return running_ % 32; }

 private:
  static constexpr size_t kStack = size_t{1} << 18;
  static constexpr size_t kSlot = 64;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool finished = false;
  };
  struct Barrier {
    int arrived = 0;
    int generation = 0;
  };
  struct alignas(16) Slot {
    unsigned char bytes[kSlot];
  };

  Block(int threads, const std::function<void()>& body)
      : body_(body), fibers_(threads), warp_barriers_((threads + 31) / 32), slots_(threads), remaining_(threads) {
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.stack.reset(new char[kStack]);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::start, 0);
    }
  }

  static void start() {
    Block& block = *current();
    block.body_();
    block.fibers_[block.running_].finished = true;
    --block.remaining_;
  }

  void wait(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    const int me = running_;
    while (barrier.generation == generation) swapcontext(&fibers_[me].context, &scheduler_);
  }

  const std::function<void()>& body_;
  std::vector<Fiber> fibers_;
  Barrier block_barrier_;
  std::vector<Barrier> warp_barriers_;
  std::vector<Slot> slots_;
  ucontext_t scheduler_{};
  int running_ = 0;
  int remaining_;
};

// ldmatrix: kMatrices times 8 x 8 numbers of 16 bits, whose rows stand where lanes 8 i to 8 i + 7 point.
template <class Registers>
void load_matrices(Registers& result, const void* row) {
  Block::current()->exchange(row, [&](const auto& of_lane) {
    const int lane = Block::current()->lane();
    for (int matrix = 0; matrix < int(sizeof(result) / 4); ++matrix) {
      std::memcpy(reinterpret_cast<char*>(&result) + 4 * matrix,
                  static_cast<const char*>(of_lane(8 * matrix + lane / 4)) + 4 * (lane % 4), 4);
    }
  });
}

// mma.m16n8k16 of 16-bit numbers and mma.m16n8k8 of TF32: each register of A and B holds 4 bytes of a row or column, the
// registers of A are rows g, g + 8, g, g + 8 (g = lane / 4), and the sums are rows g, g, g + 8, g + 8.
template <class Sums, class A, class B>
void multiply_add_of_warp(Sums& d, const A& a, const B& b, const Sums& c) {
  constexpr int kPerRegister = 4 / int(sizeof(typename A::Element));
  constexpr int kRegisters = int(sizeof(A)) / 4;  // of A; half as many of B
  struct Operands {
    A a;
    B b;
  };
  const Sums before = c;
  Block::current()->exchange(Operands{a, b}, [&](const auto& of_lane) {
    const int lane = Block::current()->lane();
    for (int sum = 0; sum < 4; ++sum) {
      const int row = lane / 4, half = sum / 2, column = lane % 4 * 2 + sum % 2;
      float total = before[sum];
      for (int part = 0; part < kRegisters / 2; ++part) {
        for (int quarter = 0; quarter < 4; ++quarter) {
          for (int i = 0; i < kPerRegister; ++i) {
            const Operands& left = of_lane(4 * row + quarter);
            const Operands& right = of_lane(4 * column + quarter);
            total += float(left.a[(2 * part + half) * kPerRegister + i]) * float(right.b[part * kPerRegister + i]);
          }
        }
      }
      d[sum] = total;
    }
  });
}

template <class Sums, class A, class B>
void multiply_add(Sums& d, const A& a, const B& b, const Sums& c) {
  // Of the many shapes that CUTLASS names, the others are not run.
  if constexpr (!std::is_same_v<typename Sums::Element, float> || sizeof(Sums) != 16 || sizeof(A) != 2 * sizeof(B)) std::abort();
  else multiply_add_of_warp(d, a, b, c);
}


}  // namespace host_device

#define threadIdx host_device::thread_index
#define blockIdx host_device::block_index
#define blockDim host_device::block_size
#define gridDim host_device::grid_size

inline void __syncthreads() { host_device::Block::current()->wait_for_block(); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { host_device::Block::current()->wait_for_warp(); }

template <class Value>
Value __shfl_sync(unsigned, Value value, int lane, int = 32) {
  host_device::Block::current()->exchange(Value(value), [&](const auto& of_lane) { value = of_lane(lane); });
  return value;
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int distance, int = 32) {
  const int other = host_device::Block::current()->lane() ^ distance;
  host_device::Block::current()->exchange(Value(value), [&](const auto& of_lane) { value = of_lane(other); });
  return value;
}

// Named by CUTLASS code that is never run here.
[[noreturn]] inline unsigned __byte_perm(unsigned, unsigned, unsigned) { std::abort(); }
[[noreturn]] inline int __syncthreads_and(int) { std::abort(); }

// Addresses of shared memory go into PTX only.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline size_t __cvta_generic_to_shared(const void*) { return 0; }

// Shared memory of the block that runs (cutlass/device_kernel.h).
namespace cutlass {
alignas(128) inline int SharedStorageBase[host_device::kSharedBytes / sizeof(int)];
namespace arch {
inline int LaneId() { return host_device::Block::current()->lane(); }
}  // namespace arch
}  // namespace cutlass

// The launch, in the place of the runtime's: the kernel's blocks one after the other.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  host_device::grid_size = grid;
  host_device::block_size = block;
  const std::function<void()> body = [&] {
    int next = 0;
    std::tuple<Parameters...> values{*static_cast<Parameters*>(arguments[next++])...};
    std::apply(kernel, values);
  };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      host_device::block_index = {x, y, 0};
      host_device::Block::run(static_cast<int>(block.x), body);
    }
  }
  return cudaSuccess;
}

// What stands between CUTLASS and the PTX of two of its headers.
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/util.hpp>
#include <cutlass/array.h>
#include <cutlass/functional.h>
#include <cutlass/layout/matrix.h>

#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() host_device::load_matrices(D, ptr)
// Its other assembly is ld.shared.
#define asm
#define volatile(...) v = *static_cast<const decltype(v)*>(ptr)
#include <cutlass/arch/memory_sm75.h>
#undef asm
#undef volatile
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() host_device::multiply_add(d, a, b, c)
#include <cutlass/arch/mma.h>
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() std::abort()

// A static array of a kernel is one array for its block, and one block runs at a time.
#include <cutlass/device_kernel.h>
#undef __shared__
#define __shared__ static
