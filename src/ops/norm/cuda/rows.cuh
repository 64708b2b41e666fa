// What the forward and the backward share on a GPU: rows in kernels, and sums over the threads of a group.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/cuda/vectors.cuh"
#include "ops/norm/kernels.h"

namespace krait::norm_kernels {

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

// Channels that a thread moves at once: of the widest type of a kernel 16 bytes, of a narrower one fewer.
// What a warp moves by one instruction thus lies side by side in memory, whatever the types.
template <typename A, typename B>
inline constexpr int kWidth = sizeof(A) > 2 || sizeof(B) > 2 ? 4 : cuda::kPack;

template <typename T, int kChannels>
struct alignas(std::min<std::size_t>(kChannels * sizeof(T), 16)) Piece {
  T v[kChannels];
};

template <int kChannels, typename T>
__device__ __forceinline__ Piece<T, kChannels> load_piece(const T* from) {
  return *reinterpret_cast<const Piece<T, kChannels>*>(from);
}

template <int kChannels, typename T>
__device__ __forceinline__ void store_piece(T* to, const float (&values)[kChannels]) {
  Piece<T, kChannels> piece;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) piece.v[i] = cuda::from_float<T>(values[i]);
  *reinterpret_cast<Piece<T, kChannels>*>(to) = piece;
}

// Element i, known at compile time. A bf16 is a half of a word, made a float by a shift or a mask.
template <typename T, int kChannels>
__device__ __forceinline__ float float_of(const Piece<T, kChannels>& piece, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(&piece)[i / 2];
    return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000U);
  } else {
    return cuda::to_float(piece.v[i]);
  }
}

// One value for each channel: weight or bias.
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
  template <int kChannels>
  __device__ __forceinline__ void load(std::int64_t channel, float otherwise, float (&to)[kChannels]) const {
    if (data == nullptr) {
#pragma unroll
      for (float& value : to) value = otherwise;
    } else if (dtype == DType::f32) {
      load_as<float>(channel, to);
    } else if (dtype == DType::bf16) {
      load_as<__nv_bfloat16>(channel, to);
    } else {
      load_as<__half>(channel, to);
    }
  }

 private:
  template <typename T, int kChannels>
  __device__ __forceinline__ void load_as(std::int64_t channel, float (&to)[kChannels]) const {
    const Piece<T, kChannels> piece = load_piece<kChannels>(static_cast<const T*>(data) + channel);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) to[i] = float_of(piece, i);
  }
};

// The pieces of a thread: from its first channel of a group on, kStep<kChannels> apart. Those of a warp lie
// side by side.
template <int kChannels>
inline constexpr int kStep = 32 * kChannels;
template <int kPieces, int kChannels>
__device__ __forceinline__ int first_channel() {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return (warp * kPieces * 32 + lane) * kChannels;
}

enum class Gate : std::uint8_t { none, before_norm, after_norm };

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

// Sums over the threads of a group, of one value or two in every thread, in a fixed order. A group is a row
// of the block (threadIdx.y), or the whole block where that has one row of several warps. Two halves of
// `scratch` take turns: who writes one has passed the barrier of the other, and with it all who read this
// one.
template <int kSums>
class GroupSums {
 public:
  static_assert(kSums == 1 || kSums == 2);
  static constexpr int kQuads = kMaxWarps / 4;  // of a value
  static constexpr int kScratch = 2 * kSums * kQuads;

  __device__ explicit GroupSums(float4* scratch)
      : scratch_(reinterpret_cast<float*>(scratch)), warps_(static_cast<int>(blockDim.x) / 32) {
    // Warps that would fill the last four. The barrier of the first sum is in front of their first reader.
    const int missing = static_cast<int>(threadIdx.x);
    if (warps_ > 1 && missing < kMaxWarps - warps_) {
#pragma unroll
      for (int i = 0; i < 2 * kSums; ++i) scratch_[i * kMaxWarps + warps_ + missing] = 0.0F;
    }
  }

  __device__ __forceinline__ void operator()(float (&values)[kSums]) {
    constexpr unsigned kAll = 0xffffffffU;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    constexpr int kLanes = 32 / kSums;  // that add up one value
    float sum = values[0];
    if constexpr (kSums == 2) {
      // Each half of the warp takes one of the values, which spares half of the shuffles.
      const bool upper = lane >= kLanes;
      sum = (upper ? values[1] : values[0]) + __shfl_xor_sync(kAll, upper ? values[0] : values[1], kLanes);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (warps_ == 1) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) values[i] = kSums == 1 ? sum : __shfl_sync(kAll, sum, i * kLanes);
      return;
    }
    float* own = scratch_ + turn_ * kSums * kMaxWarps;
    turn_ ^= 1;
    if (lane % kLanes == 0) own[lane / kLanes * kMaxWarps + static_cast<int>(threadIdx.x) / 32] = sum;
    __syncthreads();
#pragma unroll
    for (float& value : values) value = 0.0F;
#pragma unroll 1
    for (int w = 0; w < warps_; w += 4) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(own + i * kMaxWarps + w);
        values[i] += (four.x + four.y) + (four.z + four.w);
      }
    }
  }

 private:
  float* scratch_;
  int warps_;
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
