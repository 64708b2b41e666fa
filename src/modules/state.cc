#include "krait/modules/state.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <istream>
#include <ostream>
#include <sstream>

#include "core/crc32.h"
#include "krait/core/error.h"

namespace krait {
namespace {

constexpr std::string_view kMagic = "KRAITST2";

// Numbers of images, which outlast those of DType.
constexpr std::array kDTypes = {DType::f32, DType::bf16, DType::f16};

std::uint32_t checksum(std::string_view bytes) { return crc32(std::as_bytes(std::span(bytes))); }

template <typename T>
void put(std::ostream& out, const T& value) {
  out.write(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <typename T>
T take(std::istream& in, const std::string& name) {
  T value{};
  in.read(reinterpret_cast<char*>(&value), sizeof(T));
  if (!in) fail(ErrorKind::invalid_argument, name, ": the state image ends early");
  return value;
}

void put_tensor(std::ostream& out, const Tensor& t) {
  const Tensor flat = t.contiguous();  // on the host
  out.write(static_cast<const char*>(flat.raw()), static_cast<std::streamsize>(flat.nbytes()));
}

Tensor take_tensor(std::istream& in, const Dims& shape, const std::string& name, DType dtype = DType::f32) {
  Tensor t = Tensor::empty(shape, dtype);
  in.read(static_cast<char*>(t.raw()), static_cast<std::streamsize>(t.nbytes()));
  if (!in) fail(ErrorKind::invalid_argument, name, ": the state image ends early");
  return t;
}

Dims with_rows(std::int64_t rows, const Dims& shape) {
  Dims all = shape;
  all.insert(0, rows);
  return all;
}

// Channels contiguous: kernels put their lanes over channels.
Tensor make_conv(const Memory& memory, std::int64_t rows, const Dims& shape) {
  return memory.zeros({rows, shape[1], shape[0]}).transpose(1, 2);
}

void copy_rows(const Memory& memory, const Tensor& from, const Tensor& to) {
  memory.copy(from, to.slice(0, 0, from.size(0)));
}

}  // namespace

std::shared_ptr<StatePool> StatePool::create(std::vector<LayerStateShape> layers, std::uint64_t fingerprint,
                                             std::int64_t capacity, const Memory& memory, DType ssm_dtype) {
  require(std::find(kDTypes.begin(), kDTypes.end(), ssm_dtype) != kDTypes.end(), "states of dtype ",
          ssm_dtype, ", expected f32, bf16 or f16");
  std::shared_ptr<StatePool> pool(new StatePool);
  pool->memory_ = memory;
  pool->ssm_dtype_ = ssm_dtype;
  pool->fingerprint_ = fingerprint;
  for (auto& shape : layers)
    pool->layers_.push_back({.shape = std::move(shape), .conv = {}, .ssm = {}, .kv = {}});
  pool->reserve(std::max<std::int64_t>(capacity, 1));
  return pool;
}

void StatePool::reserve(std::int64_t capacity) {
  // Everything is allocated before anything is replaced, so that running out of memory changes nothing.
  std::vector<Layer> grown = layers_;
  for (auto& layer : grown) {
    if (!layer.shape.conv.empty()) {
      Tensor conv = make_conv(memory_, capacity, layer.shape.conv);
      if (layer.conv) copy_rows(memory_, layer.conv, conv);
      layer.conv = conv;
    }
    if (!layer.shape.ssm.empty()) {
      Tensor ssm = memory_.zeros(with_rows(capacity, layer.shape.ssm), ssm_dtype_);
      if (layer.ssm) copy_rows(memory_, layer.ssm, ssm);
      layer.ssm = ssm;
    }
    if (!layer.shape.kv.empty()) layer.kv.resize(static_cast<std::size_t>(capacity));
  }
  positions_.resize(static_cast<std::size_t>(capacity), 0);
  const bool zeros = std::none_of(layers_.begin(), layers_.end(),
                                  [](const Layer& layer) { return layer.shape.ssm_initial.defined(); });
  untouched_.resize(static_cast<std::size_t>(capacity), zeros);
  layers_ = std::move(grown);
  for (std::int64_t row = capacity - 1; row >= capacity_; --row) free_.push_back(row);
  capacity_ = capacity;
}

std::int64_t StatePool::acquire() {
  if (free_.empty()) reserve(capacity_ * 2);
  // The lowest free row, so that the rows of a batch tend to be consecutive.
  const auto lowest = std::min_element(free_.begin(), free_.end());
  const std::int64_t row = *lowest;
  free_.erase(lowest);
  // Filling the parts of all layers one by one takes longer than a step does.
  if (!untouched_[static_cast<std::size_t>(row)]) reset(row);
  untouched_[static_cast<std::size_t>(row)] = false;
  return row;
}

void StatePool::release(std::int64_t row) {
  for (auto& layer : layers_)
    if (!layer.kv.empty()) layer.kv[static_cast<std::size_t>(row)] = {};
  free_.push_back(row);
}

void StatePool::reset(std::int64_t row) {
  for (auto& layer : layers_) {
    if (layer.conv) memory_.fill(layer.conv.select(0, row), 0.0);
    if (layer.ssm) {
      if (layer.shape.ssm_initial)
        memory_.copy(layer.shape.ssm_initial, layer.ssm.select(0, row));
      else
        memory_.fill(layer.ssm.select(0, row), 0.0);
    }
    if (!layer.kv.empty()) layer.kv[static_cast<std::size_t>(row)] = {};
  }
  positions_[static_cast<std::size_t>(row)] = 0;
}

void StatePool::copy_row(std::int64_t from, std::int64_t to) {
  if (from == to) return;
  for (auto& layer : layers_) {
    if (layer.conv) memory_.copy(layer.conv.select(0, from), layer.conv.select(0, to));
    if (layer.ssm) memory_.copy(layer.ssm.select(0, from), layer.ssm.select(0, to));
    if (!layer.kv.empty()) {
      const Tensor& cache = layer.kv[static_cast<std::size_t>(from)];
      layer.kv[static_cast<std::size_t>(to)] = cache ? memory_.clone(cache) : Tensor();
    }
  }
  positions_[static_cast<std::size_t>(to)] = position(from);
}

Tensor StatePool::kv(int layer, std::int64_t row, std::int64_t length) {
  constexpr std::int64_t kFirst = 64;
  Layer& l = layers_[index(layer)];
  Tensor& cache = l.kv[static_cast<std::size_t>(row)];
  const std::int64_t held = cache ? cache.size(0) : 0;
  if (held < length) {
    Tensor grown = memory_.empty(with_rows(std::max({kFirst, 2 * held, length}), l.shape.kv));
    const std::int64_t used = std::min(held, position(row));
    if (used > 0) memory_.copy(cache.slice(0, 0, used), grown.slice(0, 0, used));
    cache = grown;
  }
  return cache.slice(0, 0, length);
}

const void* StatePool::address() const {
  for (const Layer& layer : layers_)
    if (const Tensor& t = layer.ssm ? layer.ssm : layer.conv) return t.raw();
  return nullptr;
}

std::int64_t StatePool::position(std::int64_t row) const { return positions_[static_cast<std::size_t>(row)]; }

void StatePool::set_position(std::int64_t row, std::int64_t position) {
  positions_[static_cast<std::size_t>(row)] = position;
}

std::size_t StatePool::fixed_bytes() const {
  std::size_t bytes = 0;
  for (const auto& layer : layers_) {
    if (!layer.shape.conv.empty())
      bytes += static_cast<std::size_t>(numel_of(layer.shape.conv)) * sizeof(float);
    if (!layer.shape.ssm.empty())
      bytes += static_cast<std::size_t>(numel_of(layer.shape.ssm)) * size_of(ssm_dtype_);
  }
  return bytes;
}

std::size_t StatePool::bytes_per_token() const {
  std::size_t bytes = 0;
  for (const auto& layer : layers_)
    if (!layer.shape.kv.empty()) bytes += static_cast<std::size_t>(numel_of(layer.shape.kv)) * sizeof(float);
  return bytes;
}

void StatePool::save_row(std::int64_t row, std::ostream& out) const {
  const std::int64_t length = position(row);
  put(out, fingerprint_);
  put(out, length);
  put(out,
      static_cast<std::uint64_t>(std::find(kDTypes.begin(), kDTypes.end(), ssm_dtype_) - kDTypes.begin()));
  for (const auto& layer : layers_) {
    if (layer.conv) put_tensor(out, memory_.to_host(layer.conv.select(0, row)));
    if (layer.ssm) put_tensor(out, memory_.to_host(layer.ssm.select(0, row)));
    if (!layer.kv.empty() && length > 0)
      put_tensor(out, memory_.to_host(layer.kv[static_cast<std::size_t>(row)].slice(0, 0, length)));
  }
}

void StatePool::load_row(std::int64_t row, std::istream& in, const std::string& name) {
  const auto fingerprint = take<std::uint64_t>(in, name);
  require(fingerprint == fingerprint_, name, ": the state belongs to a model with fingerprint ", fingerprint,
          ", this model has ", fingerprint_);
  const auto length = take<std::int64_t>(in, name);
  require(length >= 0 && length < (std::int64_t{1} << 48), name, ": position ", length, " in a state image");
  const auto dtype = take<std::uint64_t>(in, name);
  require(dtype < kDTypes.size(), name, ": dtype ", dtype, " in a state image, expected less than ",
          kDTypes.size());
  std::vector<Tensor> conv;
  std::vector<Tensor> ssm;
  std::vector<Tensor> kv;
  for (const auto& layer : layers_) {
    conv.push_back(layer.conv ? take_tensor(in, layer.shape.conv, name) : Tensor());
    ssm.push_back(layer.ssm ? take_tensor(in, layer.shape.ssm, name, kDTypes[dtype]) : Tensor());
    kv.push_back(!layer.kv.empty() && length > 0 ? take_tensor(in, with_rows(length, layer.shape.kv), name)
                                                 : Tensor());
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    if (conv[i]) memory_.copy(conv[i], layers_[i].conv.select(0, row));
    if (ssm[i]) memory_.copy(ssm[i], layers_[i].ssm.select(0, row));
    if (!layers_[i].kv.empty()) layers_[i].kv[static_cast<std::size_t>(row)] = memory_.to_device(kv[i]);
  }
  set_position(row, length);
}

State::State(std::shared_ptr<StatePool> pool) : pool_(std::move(pool)), row_(pool_->acquire()) {}

State::~State() {
  if (pool_) pool_->release(row_);
}

State::State(State&& other) noexcept : pool_(std::move(other.pool_)), row_(other.row_) {}

State& State::operator=(State&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(row_, other.row_);
  return *this;
}

State State::fork() const {
  State copy(pool_);
  pool_->copy_row(row_, copy.row_);
  return copy;
}

void State::rollback(const State& earlier) {
  require(earlier.pool_ == pool_, "rollback to a state of another pool");
  pool_->copy_row(earlier.row_, row_);
}

void State::reset() { pool_->reset(row_); }

void State::save(std::ostream& out) const {
  std::ostringstream body;
  pool_->save_row(row_, body);
  const std::string bytes = std::move(body).str();
  out.write(kMagic.data(), static_cast<std::streamsize>(kMagic.size()));
  put(out, static_cast<std::uint64_t>(bytes.size()));
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  put(out, checksum(bytes));
  out.flush();
  if (!out) fail(ErrorKind::io, "writing a state failed");
}

void State::load(std::istream& in, const std::string& name) {
  std::string magic(kMagic.size(), '\0');
  in.read(magic.data(), static_cast<std::streamsize>(magic.size()));
  require(in && magic == kMagic, name, ": not a state image of this version, expected one that begins with ",
          kMagic);
  const auto size = take<std::uint64_t>(in, name);
  std::string bytes;
  // Read piece by piece: a wrong size must not allocate more than the image holds.
  for (std::uint64_t left = size; left > 0;) {
    const std::size_t piece = std::min<std::uint64_t>(left, std::uint64_t{1} << 20);
    const std::size_t at = bytes.size();
    bytes.resize(at + piece);
    in.read(bytes.data() + at, static_cast<std::streamsize>(piece));
    if (!in) fail(ErrorKind::invalid_argument, name, ": the state image ends early");
    left -= piece;
  }
  const auto stored = take<std::uint32_t>(in, name);
  require(stored == checksum(bytes), name, ": the state image is damaged (its checksum differs)");
  const std::size_t total = bytes.size();
  std::istringstream body(std::move(bytes));
  // The lengths inside are bounded by the image: fixed parts, then keys and values for each token.
  std::int64_t length = 0;
  require(total >= 24, name, ": the state image ends early");
  body.seekg(8);
  length = take<std::int64_t>(body, name);
  const std::size_t per_token = pool_->bytes_per_token();
  require(length >= 0 && (per_token == 0 || static_cast<std::uint64_t>(length) <= total / per_token), name,
          ": position ", length, " in a state image of ", total, " bytes");
  body.seekg(0);
  pool_->load_row(row_, body, name);
}

std::size_t State::nbytes() const {
  return pool_->fixed_bytes() + pool_->bytes_per_token() * static_cast<std::size_t>(position());
}

}  // namespace krait
