// What the forward and the backward share on a GPU: rows in kernels, and sums over the threads of a group.
#pragma once

#include <algorithm>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/vectors.cuh"
#include "ops/norm/kernels.h"

namespace krait::norm_kernels {

using cuda::Pack;

// Rows as a kernel sees them, in any layout.
struct GpuRows {
  std::byte* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t channel_stride = 1;
  int rank = 0;
  std::int64_t size[Dims::max_ndim - 1] = {};
  std::int64_t stride[Dims::max_ndim - 1] = {};

  GpuRows() = default;
  explicit GpuRows(const Rows& rows) {
    if (!rows) return;
    data = static_cast<std::byte*>(rows.row(0));
    dtype = rows.dtype();
    channel_stride = rows.channel_stride();
    rank = rows.sizes().size();
    for (int d = 0; d < rank; ++d) {
      size[d] = rows.sizes()[d];
      stride[d] = rows.strides()[d];
    }
  }

  // One row of them. Absent rows read as `otherwise`, and take no values.
  struct Row {
    std::byte* data;
    DType dtype;
    std::int64_t stride;

    __device__ explicit operator bool() const { return data != nullptr; }
    __device__ __forceinline__ float load(std::int64_t c, float otherwise) const {
      return data == nullptr ? otherwise : cuda::load_float(data, dtype, c * stride);
    }
    __device__ __forceinline__ void store(std::int64_t c, float value) const {
      if (data != nullptr) cuda::store_float(data, dtype, c * stride, value);
    }
  };
  __device__ Row row(std::int64_t index) const {
    std::byte* at = data;
    if (at != nullptr) {
      for (int d = rank - 1; d > 0; --d) {
        at += index % size[d] * stride[d];
        index /= size[d];
      }
      if (rank > 0) at += index * stride[0];
    }
    return {at, dtype, channel_stride};
  }
};

// Rows with channels side by side and one stride, in elements.
template <typename T>
struct PackedRows {
  T* data = nullptr;
  std::int64_t stride = 0;

  PackedRows() = default;
  explicit PackedRows(const Rows& rows) {
    if (!rows) return;
    data = static_cast<T*>(rows.row(0));
    if (!rows.strides().empty()) stride = rows.strides()[0] / static_cast<std::int64_t>(sizeof(T));
  }
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ T* at(std::int64_t row, std::int64_t channel) const {
    return data + row * stride + channel;
  }
};

// One value for each channel: weight or bias, read in vectors.
struct PackedVector {
  const void* data = nullptr;
  DType dtype = DType::f32;

  PackedVector() = default;
  explicit PackedVector(const Rows& rows) {
    if (!rows) return;
    data = rows.row(0);
    dtype = rows.dtype();
  }
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ void load(std::int64_t channel, float otherwise,
                                       float (&to)[cuda::kPack]) const {
    if (data != nullptr) {
      cuda::load_floats(data, dtype, channel, to);
    } else {
#pragma unroll
      for (float& value : to) value = otherwise;
    }
  }
};

// A warp holds vectors side by side: this thread's first channel of a group, and from one vector to its next.
inline constexpr int kStep = 32 * cuda::kPack;
template <int kVectors>
__device__ __forceinline__ int first_channel() {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return (warp * kVectors * 32 + lane) * cuda::kPack;
}

// Rows are copied to shared memory ahead of their turn, each warp's vectors by the warp itself: that takes no
// barriers of the block, and the memory is busy while sums go round it. What a warp moves by one instruction
// lies side by side in memory: 16-bit vectors are 16 bytes, which each thread moves for itself. Those of f32
// are two pieces of 16 bytes; in memory's order they alternate between the halves of neighbouring threads, so
// that a thread moves pieces of others, and they change hands in shared memory.
template <typename T>
inline constexpr int kSlots = static_cast<int>(sizeof(Pack<T>) / 16);  // of 16 bytes for a vector

class Stages {
 public:
  // `per_row` slots for each of a thread's rows.
  __device__ Stages(uint4* shared, int per_row)
      : warp_(shared + threadIdx.y * blockDim.x + threadIdx.x / 32 * 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        threads_(static_cast<int>(blockDim.x * blockDim.y)),
        per_row_(per_row) {}

  // All lanes take part in these three. `left`: channels that the group has from the warp's first on; `from`
  // and `to` are those of the lane.
  template <typename T>
  __device__ __forceinline__ void copy(int stage, int slot, const T* from, int left) const {
    if constexpr (kSlots<T> == 1) {
      if (lane_ * cuda::kPack < left) cuda::copy_async(at(stage, slot, lane_), from);
    } else {
      const T* const first = from - lane_ * cuda::kPack;
#pragma unroll
      for (int i = 0; i < kSlots<T>; ++i) {
        const int piece = i * 32 + lane_;
        if (piece * kPiece < left) cuda::copy_async(place_of(stage, slot, piece), first + piece * kPiece);
      }
    }
  }
  // Through the slots of a vector that this lane has read.
  template <typename T>
  __device__ __forceinline__ void store(int stage, int slot, T* to, int left,
                                        const float (&values)[cuda::kPack]) const {
    if constexpr (kSlots<T> == 1) {
      if (lane_ * cuda::kPack < left) cuda::store_pack(to, values);
    } else {
#pragma unroll
      for (int i = 0; i < kSlots<T>; ++i)
        *reinterpret_cast<float4*>(place_of(stage, slot, lane_ * kSlots<T> + i)) =
            make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
      __syncwarp();
      T* const first = to - lane_ * cuda::kPack;
#pragma unroll
      for (int i = 0; i < kSlots<T>; ++i) {
        const int piece = i * 32 + lane_;
        if (piece * kPiece < left)
          *reinterpret_cast<uint4*>(first + piece * kPiece) = *place_of(stage, slot, piece);
      }
    }
  }
  // What lanes wrote and read before this, others may read and write after it.
  __device__ __forceinline__ void meet() const { __syncwarp(); }

  template <typename T>
  __device__ __forceinline__ Pack<T> read(int stage, int slot) const {
    Pack<T> pack;
    if constexpr (kSlots<T> == 1) {
      *reinterpret_cast<uint4*>(&pack) = *at(stage, slot, lane_);
    } else {
#pragma unroll
      for (int i = 0; i < kSlots<T>; ++i)
        reinterpret_cast<uint4*>(&pack)[i] = *place_of(stage, slot, lane_ * kSlots<T> + i);
    }
    return pack;
  }

 private:
  static constexpr int kPiece = 4;  // channels of f32

  __device__ __forceinline__ uint4* at(int stage, int slot, int lane) const {
    return warp_ + (stage * per_row_ + slot) * threads_ + lane;
  }
  // Of a piece in memory's order: neighbours are exchanged in every other eight of them, so that neither
  // order meets the banks twice.
  __device__ __forceinline__ uint4* place_of(int stage, int slot, int piece) const {
    return at(stage, slot + piece / 32, (piece ^ (piece >> 3 & 1)) % 32);
  }

  uint4* warp_;
  int lane_;
  int threads_;
  int per_row_;
};

// Whether a block may have so much of what it asks for at a launch, beside what the kernels declare.
inline constexpr std::size_t kDeclaredShared = 1024;
inline bool shared_memory_suffices(const Context& ctx, std::size_t shared) {
  return shared + kDeclaredShared <= static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block);
}

// Blocks of `threads` with `shared` bytes each that a multiprocessor holds, of a kernel whose registers let
// it hold `threads_at_once`.
inline std::int64_t resident_blocks(const Context& ctx, int threads, std::size_t shared,
                                    int threads_at_once) {
  const auto bytes = static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block);
  const auto by_memory = static_cast<std::int64_t>(bytes / (shared + kDeclaredShared));
  return std::max<std::int64_t>(std::min<std::int64_t>(threads_at_once / threads, by_memory), 1);
}

// Sums over the threads of a group, each of kSums values in every thread, in a fixed order. A group is a row
// of the block (threadIdx.y), or the whole block where that has one row of several warps. Two halves of
// `scratch` take turns: who writes one has passed the barrier of the other, and with it all who read this
// one.
template <int kSums>
class GroupSums {
 public:
  static constexpr int kFloats = 2 * kSums * kMaxWarps;
  __device__ explicit GroupSums(float* scratch) : scratch_(scratch) {}

  __device__ __forceinline__ void operator()(float (&values)[kSums]) {
#pragma unroll
    for (float& value : values) value = cuda::warp_sum(value);
    const int warps = static_cast<int>(blockDim.x) / 32;
    if (warps == 1) return;
    float* own = scratch_ + turn_ * kSums * kMaxWarps;
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) own[i * kMaxWarps + threadIdx.x / 32] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      values[i] = 0.0F;
      for (int w = 0; w < warps; ++w) values[i] += own[i * kMaxWarps + w];
    }
  }

 private:
  float* scratch_;
  int turn_ = 0;
};

// From T of x, z and out and the dtype of the residual, which is T's or f32, to f(T{}, R{}).
template <typename F>
void dispatch_pair(DType dtype, DType residual, F&& f) {
  cuda::dispatch_element(dtype, "norm", [&](auto t) {
    if (residual == DType::f32)
      f(t, float{});
    else
      f(t, t);
  });
}

}  // namespace krait::norm_kernels
