#include "ops/selective_scan/cuda/pieces.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace krait::scan {
namespace {

// Runs and their requests, cut.
struct Cut {
  std::vector<Piece> pieces;
  std::vector<StateRequest> requests;
};

Cut cut(const TokenRuns& runs, std::int64_t length) {
  Cut result;
  std::int64_t checkpoint = 0;
  for (const TokenRun& run : runs.runs) {
    const std::int64_t parts = std::max<std::int64_t>((run.count + length - 1) / length, 1);
    std::size_t request = run.requests_begin;
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t from = part * length;
      Piece p = {.row = run.row,
                 .sequence = run.sequence,
                 .start = run.start + from * run.step,
                 .step = run.step,
                 .listed = run.listed < 0 ? -1 : run.listed + from,
                 .count = std::min(length, run.count - from),
                 .part = part,
                 .checkpoint = checkpoint + from / kCheckpointSteps,
                 .requests_begin = std::ssize(result.requests),
                 .first = run.first && part == 0,
                 .last = run.last && part + 1 == parts,
                 .last_of_run = part + 1 == parts};
      for (; request < run.requests_end && runs.requests[request].count <= from + p.count; ++request) {
        result.requests.push_back(runs.requests[request]);
        result.requests.back().count -= from;
      }
      p.requests_end = std::ssize(result.requests);
      result.pieces.push_back(p);
    }
    checkpoint += count_checkpoints(run.count);
  }
  return result;
}

}  // namespace

UploadedPieces upload_pieces(Context& ctx, const Problem& problem, std::int64_t length) {
  UploadedPieces result;
  Pieces& pieces = result.pieces;
  const TokenRuns& runs = problem.runs;
  pieces.length = length;
  pieces.tokens = problem.u.size(2);
  pieces.reverse = problem.reverse;
  if (problem.whole_rows && runs.requests.empty()) {
    pieces.parts = std::max<std::int64_t>((pieces.tokens + length - 1) / length, 1);
    pieces.count = problem.u.size(0) * pieces.parts;
    return result;
  }
  const Cut host = cut(runs, length);
  const std::size_t bytes[] = {host.pieces.size() * sizeof(Piece),
                               runs.positions.size() * sizeof(std::int64_t),
                               host.requests.size() * sizeof(StateRequest)};
  const auto total = static_cast<std::int64_t>(bytes[0] + bytes[1] + bytes[2]);
  const Tensor staged = Tensor::empty({total}, DType::u8);
  auto* to = static_cast<std::byte*>(staged.raw());
  if (bytes[0] > 0) std::memcpy(to, host.pieces.data(), bytes[0]);
  if (bytes[1] > 0) std::memcpy(to + bytes[0], runs.positions.data(), bytes[1]);
  if (bytes[2] > 0) std::memcpy(to + bytes[0] + bytes[1], host.requests.data(), bytes[2]);
  result.memory = ctx.to_device(staged);
  const auto* device = static_cast<const std::byte*>(result.memory.raw());
  pieces.list = reinterpret_cast<const Piece*>(device);
  pieces.positions = reinterpret_cast<const std::int64_t*>(device + bytes[0]);
  pieces.requests = reinterpret_cast<const StateRequest*>(device + bytes[0] + bytes[1]);
  pieces.count = std::ssize(host.pieces);
  return result;
}

}  // namespace krait::scan
