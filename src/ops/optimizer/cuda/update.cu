// One launch for all tensors: a table on the device says which stretch of which tensor is whose. It is sent
// once and kept with the context for as long as the tensors stay the same.
#include <cstring>
#include <memory>
#include <vector>

#include "core/cuda/elements.cuh"
#include "ops/optimizer/kernels.h"

namespace krait::optimizer_detail {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kPiece = 1 << 14;  // elements of a block: 16 vectors for each thread

// One tensor of a table; what an operator does not need is null.
struct Record {
  float* parameter;
  const float* gradient;
  float* m;
  float* v;
  void* compute;
  std::int64_t count;
  std::int32_t half;  // compute is f16, not bf16
  std::int32_t decay;
};

struct Piece {
  std::int64_t begin;
  std::int64_t tensor;
};

struct Table {
  std::vector<std::byte> host;  // records, then pieces
  Tensor device;
  std::int64_t records = 0;
  std::int64_t pieces = 0;

  [[nodiscard]] const Record* first_record() const { return static_cast<const Record*>(device.raw()); }
  [[nodiscard]] const Piece* first_piece() const {
    return reinterpret_cast<const Piece*>(static_cast<const std::byte*>(device.raw()) +
                                          static_cast<std::size_t>(records) * sizeof(Record));
  }
};

// The table of these records on the device; `key` tells apart the operators that keep one.
const Table& table_of(Context& ctx, const void* key, const std::vector<Record>& records) {
  std::shared_ptr<void>& kept = ctx.attachment(key);
  if (!kept) kept = std::make_shared<Table>();
  Table& table = *static_cast<Table*>(kept.get());
  // The pieces follow from the records.
  if (table.device && table.records == static_cast<std::int64_t>(records.size()) &&
      std::memcmp(table.host.data(), records.data(), records.size() * sizeof(Record)) == 0)
    return table;
  std::vector<Piece> pieces;
  for (std::size_t t = 0; t < records.size(); ++t)
    for (std::int64_t begin = 0; begin < records[t].count; begin += kPiece)
      pieces.push_back({begin, static_cast<std::int64_t>(t)});
  const std::size_t head = records.size() * sizeof(Record);
  const std::size_t tail = pieces.size() * sizeof(Piece);
  std::vector<std::byte> host(head + tail);
  if (head > 0) std::memcpy(host.data(), records.data(), head);
  if (tail > 0) std::memcpy(host.data() + head, pieces.data(), tail);

  const auto bytes = static_cast<std::int64_t>(host.size());
  table.host = std::move(host);
  table.records = static_cast<std::int64_t>(records.size());
  table.pieces = static_cast<std::int64_t>(pieces.size());
  table.device = ctx.empty({bytes}, DType::u8);
  ctx.copy(Tensor::wrap(table.host.data(), {bytes}, DType::u8), table.device);
  return table;
}

struct Vector {
  float v[4];
};

// body(first element, how many) on groups of four elements of a piece, whole ones in vectors.
template <typename Body>
__device__ __forceinline__ void walk(const Piece& piece, std::int64_t count, const Body& body) {
  const std::int64_t end = piece.begin + kPiece < count ? piece.begin + kPiece : count;
#pragma unroll 2
  for (std::int64_t i = piece.begin + threadIdx.x * 4; i < end; i += kThreads * 4)
    body(i, end - i < 4 ? static_cast<int>(end - i) : 4);
}

__device__ __forceinline__ bool on_boundary(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

__device__ __forceinline__ Vector load(const float* from, int count, bool aligned) {
  Vector r = {};
  if (aligned && count == 4) {
    const float4 f = __ldcs(reinterpret_cast<const float4*>(from));
    r = {{f.x, f.y, f.z, f.w}};
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count) r.v[i] = from[i];
  }
  return r;
}

__device__ __forceinline__ void store(float* to, const Vector& value, int count, bool aligned) {
  if (aligned && count == 4) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(value.v[0], value.v[1], value.v[2], value.v[3]));
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = value.v[i];
  }
}

template <typename T>
__device__ __forceinline__ void store_rounded(void* to, std::int64_t at, const Vector& value, int count,
                                              bool aligned) {
  struct alignas(8) Four {
    T v[4];
  };
  T* first = static_cast<T*>(to) + at;
  if (aligned && count == 4) {
    Four four;
    for (int i = 0; i < 4; ++i) four.v[i] = cuda::from_float<T>(value.v[i]);
    *reinterpret_cast<Four*>(first) = four;
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count) first[i] = cuda::from_float<T>(value.v[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const Record* records, const Piece* pieces, const AdamWStep s, float decay) {
  const Piece piece = pieces[blockIdx.x];
  const Record t = records[piece.tensor];
  const float kept = t.decay != 0 ? decay : 1.0F;
  const bool aligned = on_boundary(t.parameter) && on_boundary(t.gradient) && on_boundary(t.m) &&
                       on_boundary(t.v) && reinterpret_cast<std::uintptr_t>(t.compute) % 8 == 0;
  walk(piece, t.count, [&](std::int64_t at, int count) {
    const Vector gradient = load(t.gradient + at, count, aligned);
    Vector p = load(t.parameter + at, count, aligned);
    Vector m = load(t.m + at, count, aligned);
    Vector v = load(t.v + at, count, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float g = gradient.v[i] * s.scale;
      m.v[i] = fmaf(s.beta1, m.v[i], (1.0F - s.beta1) * g);
      v.v[i] = fmaf(s.beta2, v.v[i], (1.0F - s.beta2) * (g * g));
      p.v[i] = p.v[i] * kept - s.rate * m.v[i] / fmaf(sqrtf(v.v[i]), s.correction, s.eps);
    }
    store(t.parameter + at, p, count, aligned);
    store(t.m + at, m, count, aligned);
    store(t.v + at, v, count, aligned);
    if (t.compute == nullptr) return;
    if (t.half != 0)
      store_rounded<__half>(t.compute, at, p, count, aligned);
    else
      store_rounded<__nv_bfloat16>(t.compute, at, p, count, aligned);
  });
}

__global__ void __launch_bounds__(kThreads)
    average_kernel(const Record* records, const Piece* pieces, float decay) {
  const Piece piece = pieces[blockIdx.x];
  const Record t = records[piece.tensor];
  const bool aligned = on_boundary(t.parameter) && on_boundary(t.gradient);
  walk(piece, t.count, [&](std::int64_t at, int count) {
    const Vector now = load(t.gradient + at, count, aligned);
    Vector average = load(t.parameter + at, count, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) average.v[i] = fmaf(1.0F - decay, now.v[i] - average.v[i], average.v[i]);
    store(t.parameter + at, average, count, aligned);
  });
}

// In f64, in an order that the sizes of the tensors alone decide.
__device__ double block_sum(double sum) {
  __shared__ double scratch[kThreads];
  scratch[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  return scratch[0];
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const Record* records, const Piece* pieces, double* sums) {
  const Piece piece = pieces[blockIdx.x];
  const Record t = records[piece.tensor];
  const bool aligned = on_boundary(t.gradient);
  double sum = 0.0;
  walk(piece, t.count, [&](std::int64_t at, int count) {
    const Vector x = load(t.gradient + at, count, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(x.v[i]) * static_cast<double>(x.v[i]);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(const double* sums, std::int64_t count, double* total) {
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = sum;
}

}  // namespace

void cuda_adamw(Context& ctx, const AdamWStep& step, float decay, std::span<const AdamWTensor> tensors) {
  static const char key = 0;
  std::vector<Record> records;
  for (const AdamWTensor& t : tensors)
    records.push_back({.parameter = t.parameter.data<float>(),
                       .gradient = t.gradient.data<float>(),
                       .m = t.m.data<float>(),
                       .v = t.v.data<float>(),
                       .compute = t.compute.raw(),
                       .count = t.parameter.numel(),
                       .half = t.compute && t.compute.dtype() == DType::f16,
                       .decay = t.decay});
  const Table& table = table_of(ctx, &key, records);
  if (table.pieces == 0) return;
  cuda::launch(ctx, "adamw", adamw_kernel, dim3(static_cast<unsigned>(table.pieces)), dim3(kThreads), 0,
               table.first_record(), table.first_piece(), step, decay);
}

void cuda_update_average(Context& ctx, float decay, std::span<const AveragedTensor> tensors) {
  static const char key = 0;
  std::vector<Record> records;
  for (const AveragedTensor& t : tensors)
    records.push_back({.parameter = t.average.data<float>(),
                       .gradient = t.parameter.data<float>(),
                       .count = t.parameter.numel()});
  const Table& table = table_of(ctx, &key, records);
  if (table.pieces == 0) return;
  cuda::launch(ctx, "update_average", average_kernel, dim3(static_cast<unsigned>(table.pieces)),
               dim3(kThreads), 0, table.first_record(), table.first_piece(), decay);
}

double cuda_sum_of_squares(Context& ctx, std::span<const Tensor> tensors) {
  static const char key = 0;
  std::vector<Record> records;
  for (const Tensor& t : tensors) records.push_back({.gradient = t.data<float>(), .count = t.numel()});
  const Table& table = table_of(ctx, &key, records);
  if (table.pieces == 0) return 0.0;
  const Tensor sums = ctx.empty({table.pieces + 1}, DType::f64);
  auto* partial = sums.data<double>();
  cuda::launch(ctx, "global_norm", squares_kernel, dim3(static_cast<unsigned>(table.pieces)), dim3(kThreads),
               0, table.first_record(), table.first_piece(), partial);
  cuda::launch(ctx, "global_norm", add_kernel, dim3(1), dim3(kThreads), 0, partial, table.pieces,
               partial + table.pieces);
  return ctx.to_host(sums.slice(0, table.pieces, table.pieces + 1)).data<double>()[0];
}

}  // namespace krait::optimizer_detail
