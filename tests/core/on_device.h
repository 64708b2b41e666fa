// The operators' tests on a GPU: with KRAIT_TEST_DEVICE=cuda (cuda:N) in the environment, run(ctx, op, args)
// runs `op` there on a mirror of the tensors in `args` and brings everything back, so that a test sees the
// same tensors on the host whichever device it runs for. References stay on the CPU.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/error.h"

namespace krait::testing {

inline Device test_device() {
  static const Device device = [] {
    const char* name = std::getenv("KRAIT_TEST_DEVICE");
    return name == nullptr ? Device{} : parse_device(name);
  }();
  return device;
}
inline bool on_gpu() { return test_device().kind != Device::Kind::cpu; }

inline Context& gpu_context() {
  static Context ctx(ContextOptions{.device = test_device()});
  return ctx;
}

// Skips the whole program where a GPU is asked for and there is none; ctest knows the line.
class SkipWithoutGpu : public ::testing::Environment {
 public:
  void SetUp() override {
    if (!on_gpu()) return;
    try {
      gpu_context().synchronize();
    } catch (const Error& e) {
      std::printf("GPU tests are skipped: %s\n", e.what());
      GTEST_SKIP();
    }
  }
};
inline ::testing::Environment* const skip_without_gpu =
    ::testing::AddGlobalTestEnvironment(new SkipWithoutGpu);

// f(field) for each field of an aggregate, through its structured binding.
namespace fields_detail {
struct Any {
  template <typename T>
  operator T() const;
};
template <typename T, typename... Anys>
constexpr int count() {
  if constexpr (requires { T{Anys{}..., Any{}}; })
    return count<T, Anys..., Any>();
  else
    return sizeof...(Anys);
}
}  // namespace fields_detail

template <typename T, typename F>
void for_each_field(T& t, const F& f) {
  constexpr int n = fields_detail::count<std::remove_const_t<T>>();
  static_assert(n <= 24, "for_each_field knows up to 24 fields");
  const auto each = [&](auto&... field) { (f(field), ...); };
#define KRAIT_FIELDS(count, ...)     \
  else if constexpr (n == (count)) { \
    auto& [__VA_ARGS__] = t;         \
    each(__VA_ARGS__);               \
  }
  if constexpr (n == 0) {
  }
  KRAIT_FIELDS(1, a)
  KRAIT_FIELDS(2, a, b)
  KRAIT_FIELDS(3, a, b, c)
  KRAIT_FIELDS(4, a, b, c, d)
  KRAIT_FIELDS(5, a, b, c, d, e)
  KRAIT_FIELDS(6, a, b, c, d, e, g)
  KRAIT_FIELDS(7, a, b, c, d, e, g, h)
  KRAIT_FIELDS(8, a, b, c, d, e, g, h, i)
  KRAIT_FIELDS(9, a, b, c, d, e, g, h, i, j)
  KRAIT_FIELDS(10, a, b, c, d, e, g, h, i, j, k)
  KRAIT_FIELDS(11, a, b, c, d, e, g, h, i, j, k, l)
  KRAIT_FIELDS(12, a, b, c, d, e, g, h, i, j, k, l, m)
  KRAIT_FIELDS(13, a, b, c, d, e, g, h, i, j, k, l, m, o)
  KRAIT_FIELDS(14, a, b, c, d, e, g, h, i, j, k, l, m, o, p)
  KRAIT_FIELDS(15, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q)
  KRAIT_FIELDS(16, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r)
  KRAIT_FIELDS(17, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s)
  KRAIT_FIELDS(18, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u)
  KRAIT_FIELDS(19, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u, v)
  KRAIT_FIELDS(20, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u, v, w)
  KRAIT_FIELDS(21, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u, v, w, x)
  KRAIT_FIELDS(22, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u, v, w, x, y)
  KRAIT_FIELDS(23, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u, v, w, x, y, z)
  KRAIT_FIELDS(24, a, b, c, d, e, g, h, i, j, k, l, m, o, p, q, r, s, u, v, w, x, y, z, aa)
#undef KRAIT_FIELDS
}

// f(tensor) for each Tensor in an aggregate, in aggregates within it, or for a Tensor itself.
template <typename T, typename F>
void for_each_tensor(T& t, const F& f) {
  if constexpr (std::is_same_v<std::remove_const_t<T>, Tensor>)
    f(t);
  else if constexpr (std::is_aggregate_v<T> && std::is_class_v<T>)
    for_each_field(t, [&](auto& field) { for_each_tensor(field, f); });
}

// Memory of the host and its copy on the device. Tensors that share memory on one side do so on the other.
class Mirror {
 public:
  explicit Mirror(Context& ctx) : ctx_(ctx) {}

  void add(const Tensor& t) {
    if (!t || t.numel() == 0) return;
    auto [low, high] = extent(t);
    // Intervals that touch the new one become part of it.
    for (auto at = parts_.begin(); at != parts_.end();) {
      if (at->first < high && low < at->second.high) {
        low = std::min(low, at->first);
        high = std::max(high, at->second.high);
        at = parts_.erase(at);
      } else {
        ++at;
      }
    }
    parts_[low].high = high;
  }

  void upload() {
    for (auto& [low, part] : parts_) {
      part.memory = ctx_.empty({static_cast<std::int64_t>(part.high - low)}, DType::u8);
      ctx_.copy(host(low, part), part.memory);
    }
  }
  void download() {
    for (auto& [low, part] : parts_) ctx_.copy(part.memory, host(low, part));
  }

  [[nodiscard]] Tensor on_device(const Tensor& t) {
    if (!t) return t;
    if (t.numel() == 0) return ctx_.empty({0}, t.dtype()).as_strided(t.shape(), t.strides(), 0);
    const auto [low, part] = *std::prev(parts_.upper_bound(extent(t).first));
    auto* data = static_cast<std::byte*>(part.memory.raw()) + (address(t) - low);
    return Tensor::wrap(data, t.shape(), t.strides(), t.dtype(), part.memory.owner(), ctx_.device());
  }

  // A view of the mirrored host memory where the tensor lies in the device's, else a copy with its strides.
  [[nodiscard]] Tensor on_host(const Tensor& t) const {
    if (!t || t.device().kind == Device::Kind::cpu) return t;
    if (t.numel() == 0) return Tensor::empty({0}, t.dtype()).as_strided(t.shape(), t.strides(), 0);
    for (const auto& [low, part] : parts_) {
      const auto begin = address(part.memory);
      if (address(t) < begin || address(t) >= begin + (part.high - low)) continue;
      return Tensor::wrap(reinterpret_cast<void*>(low + (address(t) - begin)), t.shape(), t.strides(),
                          t.dtype());
    }
    const auto [low, high] = extent(t);
    const Tensor bytes = Tensor::empty({static_cast<std::int64_t>(high - low)}, DType::u8);
    ctx_.copy(Tensor::wrap(reinterpret_cast<void*>(low), bytes.shape(), DType::u8, {}, ctx_.device()), bytes);
    return Tensor::wrap(static_cast<std::byte*>(bytes.raw()) + (address(t) - low), t.shape(), t.strides(),
                        t.dtype(), bytes.owner());
  }

 private:
  struct Part {
    std::uintptr_t high = 0;
    Tensor memory;
  };
  static std::uintptr_t address(const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.raw()); }
  static std::pair<std::uintptr_t, std::uintptr_t> extent(const Tensor& t) {
    const auto element = static_cast<std::int64_t>(size_of(t.dtype()));
    std::int64_t low = 0;
    std::int64_t high = element;
    for (int i = 0; i < t.ndim(); ++i)
      (t.stride(i) < 0 ? low : high) += (t.size(i) - 1) * t.stride(i) * element;
    return {address(t) + static_cast<std::uintptr_t>(low), address(t) + static_cast<std::uintptr_t>(high)};
  }
  static Tensor host(std::uintptr_t low, const Part& part) {
    return Tensor::wrap(reinterpret_cast<void*>(low), {static_cast<std::int64_t>(part.high - low)},
                        DType::u8);
  }

  Context& ctx_;
  std::map<std::uintptr_t, Part> parts_;
};

// True where the call is one for the reference on the CPU.
template <typename Args>
bool wants_reference(const Context& ctx, const Args& args) {
  bool reference = ctx.reference();
  const auto by_path = [&](const auto& a) {
    if constexpr (requires { a.path == std::remove_cvref_t<decltype(a.path)>::reference; })
      reference = reference || a.path == std::remove_cvref_t<decltype(a.path)>::reference;
  };
  by_path(args);
  if constexpr (requires { args.forward; }) by_path(args.forward);
  for_each_tensor(args, [&](const Tensor& t) {
    reference = reference || (t && (t.dtype() == DType::f64 || t.dtype() == DType::c128));
  });
  return reference;
}

template <typename Result, typename Args>
Result run(Context& ctx, Result (*op)(Context&, const Args&), const std::type_identity_t<Args>& args) {
  if (!on_gpu() || wants_reference(ctx, args)) return op(ctx, args);
  Context& gpu = gpu_context();
  Mirror mirror(gpu);
  for_each_tensor(args, [&](const Tensor& t) { mirror.add(t); });
  mirror.upload();
  Args moved = args;
  for_each_tensor(moved, [&](Tensor& t) { t = mirror.on_device(t); });
  if constexpr (std::is_void_v<Result>) {
    op(gpu, moved);
    mirror.download();
  } else {
    Result result = op(gpu, moved);
    mirror.download();
    for_each_tensor(result, [&](Tensor& t) { t = mirror.on_host(t); });
    return result;
  }
}

}  // namespace krait::testing
