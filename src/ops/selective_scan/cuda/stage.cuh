// How a block of the fast kernels brings its tensors to and from shared memory. A tile is kTile tokens of
// kChannels channels of a group; kMovers threads bring it, kWalkers walk it. In the forward these are the
// halves of a block and work at the same time: the movers write what the tile before gave and prepare the
// next one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/elements.cuh"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/tiles.cuh"

namespace krait::scan {

inline constexpr int kWalkers = 128;  // threads
inline constexpr int kMovers = 128;

// Tiles of a piece, one after the other. They end at the latest where a multiple of kTile or a wanted state
// is.
struct TileCursor {
  std::int64_t begin = 0;
  std::int64_t request = 0;  // the first one of a state after `begin` tokens or more that has not been met
  int count = 0;             // 0: behind the last tile

  __device__ TileCursor(const Pieces& pieces, const Piece& piece, bool with_requests)
      : request(with_requests ? piece.requests_begin : piece.requests_end) {
    settle(pieces, piece);
  }
  __device__ void advance(const Pieces& pieces, const Piece& piece) {
    begin += count;
    settle(pieces, piece);
  }

 private:
  __device__ void settle(const Pieces& pieces, const Piece& piece) {
    while (request < piece.requests_end && pieces.requests[request].count <= begin) ++request;
    std::int64_t end = begin - begin % kTile + kTile;
    end = end < piece.count ? end : piece.count;
    if (request < piece.requests_end) {
      const std::int64_t at = pieces.requests[request].count;
      end = at < end ? at : end;
    }
    count = static_cast<int>(end - begin);
  }
};

// The elements (token, channel) of a tile that one of kThreads has: kRounds times kTogether of them side by
// side, along channels or along time.
template <int kChannels, bool kByChannel, int kThreads = kMovers>
struct MoverShare {
  static constexpr int kAll = kTile * kChannels / kThreads;
  static constexpr int kTogether = kAll < 8 ? kAll : 8;
  static constexpr int kRounds = kAll / kTogether;
  static constexpr int kSlots = kThreads * kTogether / kChannels;  // of a round along channels
  static constexpr int kAcross = kThreads * kTogether / kTile;     // channels of a round along time

  int slot = 0;  // of the first round
  int channel = 0;

  // Has addresses that depend on these made anew: kept from tile to tile, they would cost registers that a
  // walk needs.
  __device__ __forceinline__ void forget() {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(slot), "+r"(channel));
#endif
  }

  __device__ explicit MoverShare(int mover) {
    if constexpr (kByChannel) {
      slot = mover / (kChannels / kTogether);
      channel = mover % (kChannels / kTogether) * kTogether;
    } else {
      // Two neighbours fill a sector of 16-bit elements; the others take other channels, for which shared
      // memory has other banks.
      slot = (mover % 2 + mover / (2 * kAcross) * 2) * kTogether;
      channel = mover / 2 % kAcross;
    }
  }
  __device__ __forceinline__ int slot_of(int round, int e) const {
    return kByChannel ? slot + round * kSlots : slot + e;
  }
  __device__ __forceinline__ int channel_of(int round, int e) const {
    return kByChannel ? channel + e : channel + round * kAcross;
  }
};

// Where a mover finds its elements of a tensor (B, D, L), or puts them.
template <int kChannels, bool kByChannel, int kThreads = kMovers>
struct Track {
  using Moves = MoverShare<kChannels, kByChannel, kThreads>;
  static constexpr int kTogether = Moves::kTogether;
  using Elements = cuda::Bits<kTogether>;

  const cuda::AnyView<3>& view;
  const Moves& moves;
  std::int64_t base;

  __device__ Track(const cuda::AnyView<3>& tensor, const Moves& share, const Piece& piece, std::int64_t first)
      : view(tensor),
        moves(share),
        base(piece.row * view.stride[0] + (first + moves.channel) * view.stride[1]) {}

  // True where the elements of every whole tile lie side by side and aligned (or the tensor is absent).
  __device__ bool packed(const Piece& piece, int channels) const {
    if (view.data == nullptr) return true;
    const std::int64_t bytes = cuda::is_narrow(view.dtype) ? 2 : 4;
    const std::int64_t together = kTogether * bytes < 16 ? kTogether * bytes : 16;
    const auto even = [&](std::int64_t elements) { return elements * bytes % together == 0; };
    const std::int64_t low = piece.step > 0 ? piece.start : piece.start - (kTile - 1);
    return piece.listed < 0 && channels == kChannels && view.stride[kByChannel ? 1 : 2] == 1 &&
           even(view.stride[kByChannel ? 2 : 1]) && (kByChannel || even(low)) &&
           (reinterpret_cast<std::uintptr_t>(view.data) + base * bytes) % together == 0;
  }
  // Of a whole tile, towards the second-level cache.
  __device__ __forceinline__ void prefetch(const Tile32& tile, int round) const {
#if defined(__CUDA_ARCH__)
    if (view.data == nullptr) return;
    const auto* from =
        static_cast<const char*>(view.data) + place(tile, round) * (cuda::is_narrow(view.dtype) ? 2 : 4);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
  }

  // Of any tile; what is not there reads as 0.
  __device__ __forceinline__ void load(const Tile32& tile, int round, int channels, Elements& to) const {
    load_span(view.data, view.dtype, span(tile, round, channels), to);
  }
  __device__ __forceinline__ void store(const Tile32& tile, int round, int channels,
                                        const float (&from)[kTogether]) const {
    store_span(view.data, view.dtype, span(tile, round, channels), from);
  }

 private:
  __device__ __forceinline__ std::int64_t place(const Tile32& tile, int round) const {
    return kByChannel ? base + (tile.low + moves.slot_of(round, 0)) * view.stride[2]
                      : base + round * Moves::kAcross * view.stride[1] + tile.low + moves.slot;
  }
  __device__ __forceinline__ ElementSpan span(const Tile32& tile, int round, int channels) const {
    constexpr unsigned kAll = (1U << kTogether) - 1;
    if constexpr (kByChannel) {
      const int slot = moves.slot_of(round, 0);
      const int there = channels - moves.channel;
      if (tile.valid<1>(slot) == 0 || there <= 0) return {};
      return {base + tile.position(slot) * view.stride[2], view.stride[1], nullptr,
              there >= kTogether ? kAll : (1U << there) - 1};
    } else {
      ElementSpan result = tile.along_time<kTogether>(
          moves.slot, base + round * Moves::kAcross * view.stride[1], view.stride[2]);
      if (moves.channel_of(round, 0) >= channels) result.valid = 0;
      return result;
    }
  }
};

// f(T()) of the type of 16 bits.
template <typename F>
__device__ __forceinline__ void with_narrow(DType dtype, F&& f) {
  if (dtype == DType::bf16)
    f(__nv_bfloat16());
  else
    f(__half());
}

// The same of whole tiles whose elements have 16 bits and lie side by side and aligned (Track::packed): an
// address that moves along with the tiles.
template <int kChannels, bool kByChannel, int kThreads = kMovers>
struct NarrowTrack {
  using Moves = MoverShare<kChannels, kByChannel, kThreads>;
  static constexpr int kTogether = Moves::kTogether;

  char* at = nullptr;  // of the first round, of the tile that begins where the piece does
  int token_bytes = 0;
  int round_bytes = 0;

  NarrowTrack() = default;
  __device__ NarrowTrack(const cuda::AnyView<3>& view, const Moves& moves, const Piece& piece,
                         std::int64_t first) {
    if (view.data == nullptr) return;
    const std::int64_t low = piece.step > 0 ? piece.start : piece.start - (kTile - 1);
    at = static_cast<char*>(view.data) +
         2 * (piece.row * view.stride[0] + (first + moves.channel) * view.stride[1] +
              (low + moves.slot) * view.stride[2]);
    token_bytes = static_cast<int>(2 * piece.step * view.stride[2]);
    round_bytes =
        static_cast<int>(2 * (kByChannel ? Moves::kSlots * view.stride[2] : Moves::kAcross * view.stride[1]));
  }
  // Of the tile whose slot 0 is at position `low`; `base` is the offset of the piece's row and first channel.
  __device__ __forceinline__ NarrowTrack(const cuda::AnyView<3>& view, const Moves& moves, std::int64_t base,
                                         int low)
      : at(static_cast<char*>(view.data) +
           2 * (base + wide(low + moves.slot, view.stride[2]) + wide(moves.channel, view.stride[1]))),
        round_bytes(2 * (kByChannel ? Moves::kSlots * static_cast<int>(view.stride[2])
                                    : Moves::kAcross * static_cast<int>(view.stride[1]))) {}
  // Both of 32 bits.
  __device__ __forceinline__ static std::int64_t wide(int count, std::int64_t stride) {
    return std::int64_t{count} * static_cast<int>(stride);
  }
  // True where steps have 32 bits.
  __device__ static bool fits(const cuda::AnyView<3>& view) {
    constexpr std::int64_t kMost = 1 << 24;
    return view.stride[2] < kMost && view.stride[2] > -kMost && view.stride[1] < kMost &&
           view.stride[1] > -kMost;
  }
  __device__ __forceinline__ void advance(int tokens) { at += std::int64_t{tokens} * token_bytes; }
  __device__ __forceinline__ void load(int round, cuda::NarrowBits<kTogether>& to) const {
    to.load_packed(at + round * std::int64_t{round_bytes}, 0);
  }
  template <typename T>
  __device__ __forceinline__ void store(int round, const float (&from)[kTogether]) const {
    scan::store_packed(reinterpret_cast<T*>(at + round * std::int64_t{round_bytes}), from);
  }
};

// B and C of a tile in shared memory as f32: row r holds kStates of B, then as many of C. With kOrders, each
// of them so many times: copy p has state n at place n ^ p. kTwined: two of B, then the same two of C.
template <int kStates, int kOrders = 1, bool kTwined = false>
struct Factors {
  static_assert(!kTwined || kOrders == 1);
  static constexpr int kOne = kStates * kOrders;  // floats of B or of C in a row
  static constexpr int kRow = 2 * kOne + 4;       // rows of several tokens then begin in different banks
  static constexpr int kFloats = kTile * kRow;
  static constexpr int kTogether = 8;
  static constexpr int kSpans = kTile * kStates / kTogether;  // of each
  static constexpr int kRounds = (2 * kSpans + kMovers - 1) / kMovers;
  using Elements = cuda::Bits<kTogether>;

  const cuda::AnyView<4>& B;
  const cuda::AnyView<4>& C;
  std::int64_t row;
  std::int64_t group;
  int d_state;

  struct Place {
    bool is_c;
    bool along_states;
    int slot;
    int n;
  };
  __device__ __forceinline__ Place place(int mover, int round) const {
    const int i = mover + round * kMovers;
    const bool is_c = i >= kSpans;
    const bool along_states = (is_c ? C.stride[2] : B.stride[2]) == 1;
    const int j = is_c ? i - kSpans : i;
    if (along_states) return {is_c, true, j / (kStates / kTogether), j % (kStates / kTogether) * kTogether};
    return {is_c, false, j % (kTile / kTogether) * kTogether, j / (kTile / kTogether)};
  }
  __device__ __forceinline__ static bool there(int mover, int round) {
    return 2 * kSpans % kMovers == 0 || mover + round * kMovers < 2 * kSpans;
  }
  __device__ __forceinline__ void load(const Tile32& tile, int mover, int round, Elements& to) const {
    if (!there(mover, round)) return;
    const Place at = place(mover, round);
    const cuda::AnyView<4>& view = at.is_c ? C : B;
    const std::int64_t base = row * view.stride[0] + group * view.stride[1];
    ElementSpan span;
    if (!at.along_states) {
      span = tile.along_time<kTogether>(at.slot, base + at.n * view.stride[2], view.stride[3]);
      if (at.n >= d_state) span.valid = 0;
    } else if (tile.valid<1>(at.slot) != 0 && at.n < d_state) {
      const int left = d_state - at.n;
      span = {base + at.n + tile.position(at.slot) * view.stride[3], 1, nullptr,
              left >= kTogether ? 255U : (1U << left) - 1};
    }
    load_span(view.data, view.dtype, span, to);
  }
  __device__ __forceinline__ void store(const Tile32& tile, int mover, int round, const Elements& from,
                                        float* shared) const {
    if (!there(mover, round)) return;
    const Place at = place(mover, round);
    float values[kTogether];
    from.to_floats(at.is_c ? C.dtype : B.dtype, values);
    put(tile, at, values, shared);
  }

  // True where B and C have one type, of kBytes bytes, and the elements of every whole tile lie side by side
  // and aligned.
  template <int kBytes = 2>
  __device__ bool packed(const Piece& piece) const {
    bool result = piece.listed < 0 && d_state == kStates && cuda::is_narrow(B.dtype) == (kBytes == 2) &&
                  B.dtype == C.dtype;
    const std::int64_t low = piece.step > 0 ? piece.start : piece.start - (kTile - 1);
    for (const cuda::AnyView<4>* view : {&B, &C}) {
      const bool along_states = view->stride[2] == 1;
      const std::int64_t base = row * view->stride[0] + group * view->stride[1];
      const std::int64_t apart = view->stride[along_states ? 3 : 2];
      result = result && (along_states || view->stride[3] == 1) && apart % kTogether == 0 &&
               apart < 1 << 24 && apart > -(1 << 24) && (along_states || low % kTogether == 0) &&
               (reinterpret_cast<std::uintptr_t>(view->data) + base * kBytes) % 16 == 0;
    }
    return result;
  }
  // What a mover has of B and C then, where kRounds is 1.
  template <int kBytes>
  struct Packed {
    const char* from = nullptr;  // of the tile that begins where the piece does
    int token_bytes = 0;
    std::conditional_t<kBytes == 2, cuda::NarrowBits<kTogether>, cuda::Bits<kTogether>> bits;

    __device__ __forceinline__ void advance(int tokens) { from += std::int64_t{tokens} * token_bytes; }
    // Of the tile that begins `tokens` behind the piece's beginning.
    __device__ __forceinline__ void load(std::int64_t tokens = 0) {
      if (from == nullptr) return;
      if constexpr (kBytes == 2)
        bits.load_packed(from + tokens * token_bytes, 0);
      else
        bits.load_packed(from + tokens * token_bytes, DType::f32, 0);
    }
  };
  using Narrow = Packed<2>;
  template <int kBytes = 2>
  __device__ Packed<kBytes> first(const Piece& piece, int mover) const {
    Packed<kBytes> result;
    if (!there(mover, 0)) return result;
    const Place at = place(mover, 0);
    const cuda::AnyView<4>& view = at.is_c ? C : B;
    const std::int64_t low = piece.step > 0 ? piece.start : piece.start - (kTile - 1);
    result.from = static_cast<const char*>(view.data) +
                  kBytes * (row * view.stride[0] + group * view.stride[1] + at.n * view.stride[2] +
                            (low + at.slot) * view.stride[3]);
    result.token_bytes = static_cast<int>(kBytes * piece.step * view.stride[3]);
    return result;
  }
  template <typename T>
  __device__ __forceinline__ void store(const Tile32& tile, int mover, const Packed<sizeof(T)>& from,
                                        float* shared) const {
    if (!there(mover, 0)) return;
    float values[kTogether];
    if constexpr (sizeof(T) == 2)
      from.bits.template to_floats<T>(values);
    else
      from.bits.to_floats(DType::f32, values);
    put(tile, place(mover, 0), values, shared);
  }

 private:
  __device__ __forceinline__ void put(const Tile32& tile, const Place& at, const float (&values)[kTogether],
                                      float* shared) const {
    static_assert(kOrders <= 4);
    if constexpr (kTwined) {
      float* const to = shared + (at.is_c ? 2 : 0);
      if (at.along_states) {
        auto* const quads = reinterpret_cast<float4*>(to + tile.row(at.slot) * kRow + 2 * at.n);
#pragma unroll
        for (int q = 0; q < kTogether / 2; ++q)
          *reinterpret_cast<float2*>(quads + q) = make_float2(values[2 * q], values[2 * q + 1]);
      } else {
#pragma unroll
        for (int e = 0; e < kTogether; ++e)
          to[tile.row(at.slot + e) * kRow + 4 * (at.n / 2) + at.n % 2] = values[e];
      }
      return;
    }
    float* const to = shared + (at.is_c ? kOne : 0);
    if (at.along_states) {
#pragma unroll
      for (int p = 0; p < kOrders; ++p) {
        float4* const quads = reinterpret_cast<float4*>(to + tile.row(at.slot) * kRow + p * kStates + at.n);
        quads[0] = make_float4(values[p], values[1 ^ p], values[2 ^ p], values[3 ^ p]);
        quads[1] = make_float4(values[4 ^ p], values[5 ^ p], values[6 ^ p], values[7 ^ p]);
      }
    } else {
#pragma unroll
      for (int p = 0; p < kOrders; ++p)
#pragma unroll
        for (int e = 0; e < kTogether; ++e)
          to[tile.row(at.slot + e) * kRow + p * kStates + (at.n ^ p)] = values[e];
    }
  }
};

// The shares of work of a block: kLanes lanes, a team, have kPerTeam channels, and kStates states each.
template <int kLanes_, int kStates_, int kPerTeam_>
struct Teams {
  static constexpr int kLanes = kLanes_;
  static constexpr int kStates = kStates_;
  static constexpr int kPerTeam = kPerTeam_;
  static constexpr int kAll = kLanes * kStates;  // states of a channel
  static constexpr int kChannels = kWalkers / kLanes * kPerTeam;
};

// A piece and the channels of it that a block takes.
template <typename S>
struct Item {
  std::int64_t piece_index;
  Piece piece;
  std::int64_t group;
  std::int64_t block;  // of channels in the group
  std::int64_t first;  // channel
  int channels;

  __device__ static std::int64_t blocks(const Inputs<float>& in) {
    return (in.channels / in.groups + S::kChannels - 1) / S::kChannels;
  }
  __device__ static std::int64_t count(const Inputs<float>& in, const Pieces& pieces) {
    return pieces.count * in.groups * blocks(in);
  }
  __device__ Item(const Inputs<float>& in, const Pieces& pieces, std::int64_t i)
      : piece_index(i / (in.groups * blocks(in))),
        piece(pieces.at(piece_index)),
        group(i / blocks(in) % in.groups),
        block(i % blocks(in)) {
    const std::int64_t in_group = in.channels / in.groups;
    first = group * in_group + block * S::kChannels;
    const std::int64_t left = in_group - block * S::kChannels;
    channels = left < S::kChannels ? static_cast<int>(left) : S::kChannels;
  }
};

// Of kSteps tokens of kPerTeam channels, v[.][i] of channel i ^ (lane % kPerTeam): in v[.][0] sums of channel
// lane % kPerTeam over as many lanes as there are channels.
template <typename S, int kSteps>
__device__ __forceinline__ void sum_over_channels(float (&v)[kSteps][S::kPerTeam]) {
  // What a lane needs of its partner stands at the same place there, as the order of channels differs.
#pragma unroll
  for (int half = S::kPerTeam / 2; half > 0; half /= 2)
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < half; ++i) v[s][i] += __shfl_xor_sync(0xffffffffU, v[s][i + half], half);
}

// The same, and then over all lanes of a team: put(step, sum) in one lane at least, of channel lane %
// kPerTeam.
template <typename S, int kSteps, typename F>
__device__ __forceinline__ void sum_over_team(float (&v)[kSteps][S::kPerTeam], F&& put) {
  constexpr int kPerTeam = S::kPerTeam;
  sum_over_channels<S>(v);
  int count = kSteps;
  int first = 0;
  bool alone = true;
#pragma unroll
  for (int bit = S::kLanes / 2; bit >= kPerTeam; bit /= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
    if (count > 1) {
      count /= 2;
#pragma unroll
      for (int s = 0; s < count; ++s) {
        const float sent = upper ? v[s][0] : v[s + count][0];
        const float kept = upper ? v[s + count][0] : v[s][0];
        v[s][0] = kept + __shfl_xor_sync(0xffffffffU, sent, bit);
      }
      first += upper ? count : 0;
    } else {
      v[0][0] += __shfl_xor_sync(0xffffffffU, v[0][0], bit);
      alone = alone && !upper;
    }
  }
  if (alone)
#pragma unroll
    for (int s = 0; s < count; ++s) put(first + s, v[s][0]);
}

}  // namespace krait::scan
