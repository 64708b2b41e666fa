#include "ops/ssd/cuda/segments.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace krait::ssd_detail {
namespace {

// Row r is run r, of all its tokens, and nothing is asked for on the way.
bool rows_are_whole(const TokenRuns& runs, std::int64_t length) {
  if (!runs.requests.empty() || !runs.padding.empty() || !runs.positions.empty()) return false;
  for (std::size_t r = 0; r < runs.runs.size(); ++r) {
    const TokenRun& run = runs.runs[r];
    const auto row = static_cast<std::int64_t>(r);
    if (run.row != row || run.sequence != row || !run.first || !run.last || run.count != length) return false;
  }
  return true;
}

}  // namespace

Segments cut_into_segments(Context& ctx, const TokenRuns& runs, std::int64_t length, std::int64_t tokens,
                           Tensor& memory) {
  Segments result{.runs = static_cast<std::int64_t>(runs.runs.size()),
                  .tokens = tokens,
                  .length = length,
                  .padding_count = static_cast<std::int64_t>(runs.padding.size())};
  const auto pieces_of = [&](std::int64_t count) {
    return std::max<std::int64_t>((count + tokens - 1) / tokens, 1);
  };
  if (rows_are_whole(runs, length)) {
    result.per_run = pieces_of(length);
    result.count = result.runs * result.per_run;
    result.reverse = !runs.runs.empty() && runs.runs[0].step < 0;
    return result;
  }

  std::vector<Segment> segments;
  std::vector<StateRequest> requests;
  std::vector<std::int64_t> first_of_run;
  for (const TokenRun& run : runs.runs) {
    first_of_run.push_back(static_cast<std::int64_t>(segments.size()));
    const std::int64_t pieces = pieces_of(run.count);
    result.per_run = std::max(result.per_run, pieces);
    std::size_t request = run.requests_begin;
    for (std::int64_t k = 0; k < pieces; ++k) {
      const std::int64_t begin = k * tokens;
      Segment s{.run = static_cast<std::int64_t>(first_of_run.size()) - 1,
                .begin = begin,
                .row = run.row,
                .sequence = run.sequence,
                .start = run.start + begin * run.step,
                .step = run.step,
                .listed = run.listed < 0 ? -1 : run.listed + begin,
                .count = std::min(tokens, run.count - begin),
                .requests_begin = static_cast<std::int64_t>(requests.size()),
                .run_begins = k == 0,
                .run_ends = k == pieces - 1,
                .initial = k == 0 && run.first,
                .final = k == pieces - 1 && run.last};
      for (; request < run.requests_end && runs.requests[request].count <= begin + s.count; ++request) {
        StateRequest wanted = runs.requests[request];
        wanted.run = static_cast<std::int64_t>(segments.size());
        wanted.count -= begin;
        requests.push_back(wanted);
      }
      s.requests_end = static_cast<std::int64_t>(requests.size());
      segments.push_back(s);
    }
  }
  first_of_run.push_back(static_cast<std::int64_t>(segments.size()));
  result.count = static_cast<std::int64_t>(segments.size());

  const std::size_t sizes[] = {segments.size() * sizeof(Segment), requests.size() * sizeof(StateRequest),
                               runs.positions.size() * sizeof(std::int64_t),
                               first_of_run.size() * sizeof(std::int64_t),
                               runs.padding.size() * sizeof(TokenRuns::Token)};
  const void* sources[] = {segments.data(), requests.data(), runs.positions.data(), first_of_run.data(),
                           runs.padding.data()};
  std::int64_t total = 0;
  for (const std::size_t size : sizes) total += static_cast<std::int64_t>(size);
  const Tensor staged = Tensor::empty({total}, DType::u8);
  memory = ctx.empty({total}, DType::u8);
  const auto* device = static_cast<const std::byte*>(memory.raw());
  const std::byte* parts[5];
  std::size_t at = 0;
  for (int i = 0; i < 5; ++i) {
    if (sizes[i] > 0) std::memcpy(static_cast<std::byte*>(staged.raw()) + at, sources[i], sizes[i]);
    parts[i] = device + at;
    at += sizes[i];
  }
  ctx.copy(staged, memory);
  result.listed = reinterpret_cast<const Segment*>(parts[0]);
  result.requests = reinterpret_cast<const StateRequest*>(parts[1]);
  result.positions = reinterpret_cast<const std::int64_t*>(parts[2]);
  result.first_of_run = reinterpret_cast<const std::int64_t*>(parts[3]);
  result.padding = reinterpret_cast<const TokenRuns::Token*>(parts[4]);
  return result;
}

}  // namespace krait::ssd_detail
