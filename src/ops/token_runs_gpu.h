// TokenRuns in the memory of a GPU, for kernels that walk runs.
#pragma once

#include <cstring>

#include "krait/core/context.h"
#include "ops/token_runs.h"

namespace krait {

struct DeviceRuns {
  const TokenRun* runs = nullptr;
  const std::int64_t* positions = nullptr;
  const StateRequest* requests = nullptr;
  const TokenRuns::Token* padding = nullptr;
  std::int64_t count = 0;          // of runs
  std::int64_t padding_count = 0;  // of padding tokens
  Tensor memory;                   // what the pointers point into; not for kernels
};

// Index tensors of sequences may be on the host or on the device; runs are cut on the host. A training batch
// of whole rows needs no index tensors, and a kernel can do without the copy (`runs` is null then): row r is
// run r, of `length` tokens from 0 on.
[[nodiscard]] inline DeviceRuns upload_runs(Context& ctx, const TokenRuns& host) {
  const std::size_t sizes[] = {
      host.runs.size() * sizeof(TokenRun), host.positions.size() * sizeof(std::int64_t),
      host.requests.size() * sizeof(StateRequest), host.padding.size() * sizeof(TokenRuns::Token)};
  const void* sources[] = {host.runs.data(), host.positions.data(), host.requests.data(),
                           host.padding.data()};
  std::size_t total = 0;
  for (const std::size_t size : sizes) total += size;
  const Tensor staged = Tensor::empty({static_cast<std::int64_t>(total)}, DType::u8);
  DeviceRuns result{.count = static_cast<std::int64_t>(host.runs.size()),
                    .padding_count = static_cast<std::int64_t>(host.padding.size()),
                    .memory = ctx.empty({static_cast<std::int64_t>(total)}, DType::u8)};
  auto* to = static_cast<std::byte*>(staged.raw());
  const auto* device = static_cast<const std::byte*>(result.memory.raw());
  const std::byte* parts[4];
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] > 0) std::memcpy(to, sources[i], sizes[i]);
    parts[i] = device;
    to += sizes[i];
    device += sizes[i];
  }
  ctx.copy(staged, result.memory);
  result.runs = reinterpret_cast<const TokenRun*>(parts[0]);
  result.positions = reinterpret_cast<const std::int64_t*>(parts[1]);
  result.requests = reinterpret_cast<const StateRequest*>(parts[2]);
  result.padding = reinterpret_cast<const TokenRuns::Token*>(parts[3]);
  return result;
}

}  // namespace krait
