// Philox4x32-10 with a block in each lane; the same bits as krait::philox4x32.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/dropout/cpu/bits_simd.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <cstring>

#include "krait/core/random.h"
#include "ops/dropout/bits.h"

HWY_BEFORE_NAMESPACE();
namespace krait::dropout_detail::HWY_NAMESPACE {
namespace {

#if HWY_TARGET == HWY_SCALAR

// Lanes of one element cannot form wide products.
void random_bits_simd(std::uint64_t seed, std::uint64_t stream, std::uint64_t block, std::int64_t blocks,
                      std::uint16_t* bits) {
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::uint64_t place = block + static_cast<std::uint64_t>(i);
    const auto words =
        philox4x32({static_cast<std::uint32_t>(place), static_cast<std::uint32_t>(place >> 32U),
                    static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32U)},
                   {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
    std::memcpy(bits + i * kElementsPerBlock, words.data(), sizeof(words));
  }
}

#else

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<std::uint32_t>;
using V = hn::Vec<D>;

// The upper halves of the products of each lane with `factor`; `lower` gets the lower ones.
HWY_INLINE V multiply_high(V a, V factor, V& lower) {
  const D d;
  const hn::Repartition<std::uint64_t, D> d64;
  const auto even = hn::MulEven(a, factor);
  const V odd_lanes = hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(d64, a)));
  const auto odd = hn::MulEven(odd_lanes, factor);
  lower = hn::Mul(a, factor);
  const V high_of_even = hn::BitCast(d, hn::ShiftRight<32>(even));
  return hn::OddEven(hn::BitCast(d, odd), high_of_even);
}

void random_bits_simd(std::uint64_t seed, std::uint64_t stream, std::uint64_t block, std::int64_t blocks,
                      std::uint16_t* bits) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const V mul0 = hn::Set(d, 0xD2511F53U);
  const V mul1 = hn::Set(d, 0xCD9E8D57U);
  const V weyl0 = hn::Set(d, 0x9E3779B9U);
  const V weyl1 = hn::Set(d, 0xBB67AE85U);
  for (std::int64_t i = 0; i < blocks; i += lanes) {
    const std::uint64_t first = block + static_cast<std::uint64_t>(i);
    const V low = hn::Add(hn::Set(d, static_cast<std::uint32_t>(first)), hn::Iota(d, 0U));
    // Lanes that passed 2^32 carry into the upper half of the counter.
    const auto carried = hn::Lt(low, hn::Set(d, static_cast<std::uint32_t>(first)));
    const V high = hn::Set(d, static_cast<std::uint32_t>(first >> 32U));
    V c0 = low;
    V c1 = hn::IfThenElse(carried, hn::Add(high, hn::Set(d, 1U)), high);
    V c2 = hn::Set(d, static_cast<std::uint32_t>(stream));
    V c3 = hn::Set(d, static_cast<std::uint32_t>(stream >> 32U));
    V k0 = hn::Set(d, static_cast<std::uint32_t>(seed));
    V k1 = hn::Set(d, static_cast<std::uint32_t>(seed >> 32U));
    for (int round = 0; round < 10; ++round) {
      V low0;
      V low1;
      const V high0 = multiply_high(c0, mul0, low0);
      const V high1 = multiply_high(c2, mul1, low1);
      c0 = hn::Xor(hn::Xor(high1, c1), k0);
      c1 = low1;
      c2 = hn::Xor(hn::Xor(high0, c3), k1);
      c3 = low0;
      k0 = hn::Add(k0, weyl0);
      k1 = hn::Add(k1, weyl1);
    }
    // Interleaved, the words lie block by block. Bits are the halves of the words on any little-endian
    // machine.
    hn::StoreInterleaved4(c0, c1, c2, c3, d, reinterpret_cast<std::uint32_t*>(bits + i * kElementsPerBlock));
  }
}

#endif

}  // namespace
}  // namespace krait::dropout_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::dropout_detail {

HWY_EXPORT(random_bits_simd);

void random_bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t block, std::int64_t blocks,
                 std::uint16_t* bits) {
  HWY_DYNAMIC_DISPATCH(random_bits_simd)(seed, stream, block, blocks, bits);
}

}  // namespace krait::dropout_detail
#endif
