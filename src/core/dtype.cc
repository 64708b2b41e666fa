#include "krait/core/dtype.h"

#include <array>
#include <utility>

namespace krait {
namespace {

constexpr std::array<std::pair<DType, std::string_view>, 12> kNames{{{DType::f32, "f32"},
                                                                     {DType::f64, "f64"},
                                                                     {DType::bf16, "bf16"},
                                                                     {DType::f16, "f16"},
                                                                     {DType::i8, "i8"},
                                                                     {DType::u8, "u8"},
                                                                     {DType::i16, "i16"},
                                                                     {DType::i32, "i32"},
                                                                     {DType::i64, "i64"},
                                                                     {DType::boolean, "bool"},
                                                                     {DType::c64, "c64"},
                                                                     {DType::c128, "c128"}}};

}  // namespace

std::string_view name_of(DType dtype) {
  for (const auto& [value, name] : kNames)
    if (value == dtype) return name;
  return "unknown";
}

std::optional<DType> parse_dtype(std::string_view name) {
  for (const auto& [value, text] : kNames)
    if (text == name) return value;
  return std::nullopt;
}

f16::f16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (u >> 16) & 0x8000U;
  const std::uint32_t magnitude = u & 0x7fffffffU;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000U) {
    half = 0x7e00U | ((magnitude >> 13) & 0x3ffU);  // NaN, quiet
  } else if (magnitude >= 0x477ff000U) {
    half = 0x7c00U;  // rounds to infinity
  } else if (magnitude >= 0x38800000U) {
    const std::uint32_t rebased = magnitude - 0x38000000U;
    half = (rebased + 0xfffU + ((rebased >> 13) & 1U)) >> 13;
  } else if (magnitude >= 0x33000000U) {
    // Subnormal: shift the significand with its hidden bit into place, rounding to nearest even.
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t significand = (magnitude & 0x7fffffU) | 0x800000U;
    const std::uint32_t shift = 126U - exponent;
    const std::uint32_t kept = significand >> shift;
    const std::uint32_t rest = significand & ((1U << shift) - 1U);
    const std::uint32_t middle = 1U << (shift - 1U);
    half = kept + ((rest > middle || (rest == middle && (kept & 1U) != 0U)) ? 1U : 0U);
  }
  bits = static_cast<std::uint16_t>(sign | half);
}

f16::operator float() const {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t fraction = bits & 0x3ffU;
  if (exponent == 0x1fU) return std::bit_cast<float>(sign | 0x7f800000U | (fraction << 13));
  if (exponent != 0U) return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0U ? -magnitude : magnitude;
}

}  // namespace krait
