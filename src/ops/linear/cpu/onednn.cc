// linear through oneDNN's matmul, versions 2 and 3. Compiled only where KRAIT_ONEDNN is on.
#include <omp.h>
#include <oneapi/dnnl/dnnl_version.h>
#include <oneapi/dnnl/dnnl.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/linear/kernels.h"

#define KRAIT_TEXT_OF(value) #value
#define KRAIT_TEXT(value) KRAIT_TEXT_OF(value)

namespace krait {

const char* onednn_version() {
  return KRAIT_TEXT(DNNL_VERSION_MAJOR) "." KRAIT_TEXT(DNNL_VERSION_MINOR) "." KRAIT_TEXT(DNNL_VERSION_PATCH);
}

OnednnProducts onednn_products() {
  // Every instruction set contains the bits of those below it.
  const auto bf16_bits = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  return (isa & bf16_bits) == bf16_bits ? OnednnProducts::f32_and_bf16 : OnednnProducts::f32;
}

}  // namespace krait

namespace krait::linear_detail {
namespace {

// What decides which code oneDNN makes: sizes, strides, dtype and whether the product is added.
struct Key {
  std::array<std::int64_t, 3> sizes;    // rows, in, out
  std::array<std::int64_t, 5> strides;  // row and column of x, row and column of weight, row of out
  DType dtype;
  bool add;
  friend auto operator<=>(const Key&, const Key&) = default;
};

struct Product {
  dnnl::memory::desc x;
  dnnl::memory::desc weight;
  dnnl::memory::desc out;
  dnnl::matmul matmul;
};

// The primitives of a context. Its engine and stream serve one caller at a time, as the context does.
struct Cache {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Key, Product> products;
};

// Prompts come in many lengths: beyond this many shapes the cache starts anew.
constexpr std::size_t kMaxProducts = 256;

Cache& cache_of(Context& ctx) {
  static const char key = 0;
  std::shared_ptr<void>& slot = ctx.attachment(&key);
  if (!slot) slot = std::make_shared<Cache>();
  return *static_cast<Cache*>(slot.get());
}

Product make_product(const dnnl::engine& engine, const Key& key) {
  const auto type = key.dtype == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
  const auto [rows, in, out] = key.sizes;
  Product product;
  product.x = {{rows, in}, type, dnnl::memory::dims{key.strides[0], key.strides[1]}};
  product.weight = {{in, out}, type, dnnl::memory::dims{key.strides[3], key.strides[2]}};
  product.out = {{rows, out}, dnnl::memory::data_type::f32, dnnl::memory::dims{key.strides[4], 1}};
  dnnl::primitive_attr attr;
  if (key.add) {
    dnnl::post_ops sum;
    sum.append_sum(1.0F);
    attr.set_post_ops(sum);
  }
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc desc(engine, product.x, product.weight, product.out, attr);
#else
  const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(product.x, product.weight, product.out), attr,
                                          engine);
#endif
  product.matmul = dnnl::matmul(desc);
  return product;
}

// oneDNN asks OpenMP how many threads to use, both when it makes a primitive and when it runs one.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : before_(omp_get_max_threads()) { omp_set_num_threads(threads); }
  ~ThreadCount() { omp_set_num_threads(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

bool has_plain_rows(const Tensor& t) { return t.stride(1) == 1 && t.stride(0) >= t.size(1); }

// What the product is added to: bias, what `out` held, or both.
void prepare_sum(Context& ctx, const Problem& p, const Tensor& sum) {
  const Tensor bias = bias_as_f32(ctx, p.bias);
  parallel_for(ctx, sum.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      float* row = sum.data<float>() + r * sum.stride(0);
      if (p.accumulate && sum.raw() != p.out.raw()) sum.select(0, r).copy_from(p.out.select(0, r));
      if (!bias) continue;
      const float* b = bias.data<float>();
      for (std::int64_t o = 0; o < sum.size(1); ++o) row[o] = p.accumulate ? row[o] + b[o] : b[o];
    }
  });
}

// sum = x W^T, or += where `add`.
void multiply(Context& ctx, const Tensor& x, const Tensor& weight, const Tensor& sum, bool add) {
  try {
    const ThreadCount threads(ctx.threads());
    Cache& cache = cache_of(ctx);
    const Key key{.sizes = {x.size(0), x.size(1), sum.size(1)},
                  .strides = {x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), sum.stride(0)},
                  .dtype = x.dtype(),
                  .add = add};
    auto found = cache.products.find(key);
    if (found == cache.products.end()) {
      if (cache.products.size() >= kMaxProducts) cache.products.clear();
      found = cache.products.emplace(key, make_product(cache.engine, key)).first;
    }
    const Product& product = found->second;
    product.matmul.execute(cache.stream,
                           {{DNNL_ARG_SRC, dnnl::memory(product.x, cache.engine, x.raw())},
                            {DNNL_ARG_WEIGHTS, dnnl::memory(product.weight, cache.engine, weight.raw())},
                            {DNNL_ARG_DST, dnnl::memory(product.out, cache.engine, sum.raw())}});
    cache.stream.wait();
  } catch (const dnnl::error& e) {
    fail(e.status == dnnl_out_of_memory ? ErrorKind::out_of_memory : ErrorKind::invalid_argument,
         "[linear] oneDNN ", onednn_version(), " failed on ", x.shape(), " by ", weight.shape(), ": ",
         e.what());
  }
}

}  // namespace

void onednn(Context& ctx, const Problem& p) {
  const Tensor x = operand(ctx, p.x, p.weight.dtype());
  const bool direct = p.out.dtype() == DType::f32 && has_plain_rows(p.out);
  const Tensor sum = direct ? p.out : ctx.empty(p.out.shape());
  const bool add = p.accumulate || p.bias.defined();
  if (add) prepare_sum(ctx, p, sum);

  if (p.x.size(1) > 0) {
    multiply(ctx, x, p.weight, sum, add);
  } else if (!add) {
    sum.fill(0.0);  // oneDNN divides by the shared size
  }
  if (!direct) p.out.copy_from(sum);
}

}  // namespace krait::linear_detail
