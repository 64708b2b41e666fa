#include "krait/ops/state_update.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "core/build.h"
#include "krait/core/error.h"
#include "ops/overlap.h"
#include "ops/state_update/update.h"
#include "ops/token_runs.h"

namespace krait {
namespace update {
namespace {

void check_shape(std::string_view name, const Tensor& tensor, const Dims& expected, std::string_view why) {
  require(tensor.shape() == expected, "[state_update] ", name, " has shape ", tensor.shape(), ", expected ",
          expected, ": ", why);
}

// The dimension `dim` of D channels in two: (G, D / G).
Tensor split_channels(const Tensor& t, int dim, std::int64_t groups) {
  Dims shape = t.shape();
  Dims strides = t.strides();
  const std::int64_t each = shape[dim] / groups;
  shape[dim] = each;
  shape.insert(dim, groups);
  strides.insert(dim, each * strides[dim]);
  return t.as_strided(shape, strides, 0);
}

// Collects the views of one problem; `per_head` tells a state (R, H, P, N) from one (R, D, N).
class Validation {
 public:
  Validation(Context& ctx, const StateUpdateArgs& args) : ctx_(ctx), args_(args) {}

  Problem run() {
    check_tensors();
    read_sizes();
    read_groups();
    p_.state = channels(args_.state, 1);
    p_.x = channels(with_tokens(args_.x), 2);
    p_.dt = read_dt();
    p_.A = read_a();
    p_.B = read_factor("B", args_.B);
    p_.C = read_factor("C", args_.C);
    p_.D = read_channel_values("D", args_.D);
    p_.dt_bias = read_channel_values("dt_bias", args_.dt_bias);
    if (args_.z) {
      check_shape("z", args_.z, args_.x.shape(), "as x");
      p_.z = channels(with_tokens(args_.z), 2);
    }
    read_rows();
    p_.dt_softplus = args_.dt_softplus;
    p_.dt_limit = args_.dt_limit;
    require(args_.dt_limit.low <= args_.dt_limit.high, "[state_update] dt_limit is (", args_.dt_limit.low,
            ", ", args_.dt_limit.high, "), expected low <= high");
    read_out();
    return p_;
  }
  [[nodiscard]] const Tensor& out() const { return out_; }
  [[nodiscard]] bool in_double() const { return in_double_; }

 private:
  void check_tensors() {
    const std::array<std::pair<std::string_view, const Tensor*>, 10> tensors = {{
        {"state", &args_.state},
        {"x", &args_.x},
        {"dt", &args_.dt},
        {"A", &args_.A},
        {"B", &args_.B},
        {"C", &args_.C},
        {"D", &args_.D},
        {"z", &args_.z},
        {"dt_bias", &args_.dt_bias},
        {"out", &args_.out},
    }};
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto& [name, tensor] = tensors[i];
      if (i < 6) require(tensor->defined(), "[state_update] ", name, " is absent");
      if (!*tensor) continue;
      require(is_float(tensor->dtype()), "[state_update] ", name, " has dtype ", tensor->dtype(),
              ", expected f32, bf16, f16 or f64");
      require(tensor->device() == ctx_.device(), "[state_update] ", name, " is on device ",
              name_of(tensor->device()), ", expected ", name_of(ctx_.device()));
      if (tensor->dtype() == DType::f64) in_double_ = true;
    }
  }

  void read_sizes() {
    const Tensor& state = args_.state;
    require(state.ndim() == 3 || state.ndim() == 4, "[state_update] state has shape ", state.shape(),
            ", expected (R, D, N) or (R, H, P, N)");
    require_own_elements("state_update", "state", state);
    per_head_ = state.ndim() == 4;
    const int plain = per_head_ ? 3 : 2;
    const Tensor& x = args_.x;
    require(x.ndim() == plain || x.ndim() == plain + 1, "[state_update] x has shape ", x.shape(),
            ", expected ", per_head_ ? "(B, H, P) or (B, T, H, P)" : "(B, D) or (B, T, D)");
    has_tokens_ = x.ndim() == plain + 1;
    batch_ = x.size(0);
    p_.tokens = has_tokens_ ? x.size(1) : 1;
    p_.d_state = state.size(-1);
    Dims expected = sequence_shape();
    for (int i = 1; i + 1 < state.ndim(); ++i) expected.push_back(state.size(i));
    check_shape("x", x, expected, "the state's channels");
  }

  // (B) or (B, T): the leading sizes of x, dt, B and C.
  [[nodiscard]] Dims sequence_shape() const { return has_tokens_ ? Dims{batch_, p_.tokens} : Dims{batch_}; }

  [[nodiscard]] Tensor with_tokens(const Tensor& t) const { return has_tokens_ ? t : t.unsqueeze(1); }

  // (..., D, ...) as (..., G, D / G, ...); with heads the tensor is that way already.
  [[nodiscard]] Tensor channels(const Tensor& t, int dim) const {
    return per_head_ ? t : split_channels(t, dim, p_.groups);
  }

  std::int64_t groups_of(std::string_view name, const Tensor& factor) const {
    const int plain = has_tokens_ ? 3 : 2;
    require(factor.ndim() == plain || factor.ndim() == plain + 1, "[state_update] ", name, " has shape ",
            factor.shape(), ", expected ", has_tokens_ ? "(B, T, N) or (B, T, G, N)" : "(B, N) or (B, G, N)");
    return factor.ndim() == plain ? 1 : factor.size(-2);
  }

  void read_groups() {
    const std::int64_t of_b = groups_of("B", args_.B);
    const std::int64_t of_c = groups_of("C", args_.C);
    require(of_b == of_c || of_b == 1 || of_c == 1, "[state_update] B has ", of_b, " groups and C has ", of_c,
            ", expected the same number");
    p_.groups = std::max(of_b, of_c);
    const std::int64_t divided = args_.state.size(1);
    require(p_.groups > 0 && divided % p_.groups == 0, "[state_update] B and C have ", p_.groups,
            " groups, which do not divide the ", divided, per_head_ ? " heads" : " channels");
    p_.heads = per_head_ ? divided : p_.groups;
    p_.headdim = per_head_ ? args_.state.size(2) : divided / p_.groups;
  }

  Tensor read_factor(std::string_view name, const Tensor& factor) const {
    const int plain = has_tokens_ ? 3 : 2;
    Dims expected = sequence_shape();
    if (factor.ndim() > plain) expected.push_back(factor.size(-2));
    expected.push_back(p_.d_state);
    check_shape(name, factor, expected, has_tokens_ ? "(B, T[, G], N)" : "(B[, G], N)");
    const Tensor grouped = factor.ndim() > plain ? factor : factor.unsqueeze(plain - 1);
    return with_tokens(grouped).expand({batch_, p_.tokens, p_.groups, p_.d_state});
  }

  Tensor read_dt() const {
    const Tensor& dt = args_.dt;
    if (per_head_ && dt.ndim() == args_.x.ndim() - 1) {
      Dims expected = sequence_shape();
      expected.push_back(p_.heads);
      check_shape("dt", dt, expected, "one value per head");
      return with_tokens(dt).unsqueeze(3).expand({batch_, p_.tokens, p_.heads, p_.headdim});
    }
    check_shape("dt", dt, args_.x.shape(), per_head_ ? "as x, or without P" : "as x");
    return channels(with_tokens(dt), 2);
  }

  Tensor read_a() const {
    const Tensor& A = args_.A;
    const Dims whole = {p_.heads, p_.headdim, p_.d_state};
    if (!per_head_) {
      check_shape("A", A, {args_.state.size(1), p_.d_state}, "(D, N)");
      return channels(A, 0);
    }
    if (A.ndim() == 1) {
      check_shape("A", A, {p_.heads}, "one value per head");
      return A.unsqueeze(1).unsqueeze(2).expand(whole);
    }
    check_shape("A", A, whole, "(H) or (H, P, N)");
    return A;
  }

  // D or dt_bias as (H, P).
  Tensor read_channel_values(std::string_view name, const Tensor& t) const {
    if (!t) return t;
    if (!per_head_) {
      check_shape(name, t, {args_.state.size(1)}, "one value per channel");
      return channels(t, 0);
    }
    if (t.ndim() == 1) {
      check_shape(name, t, {p_.heads}, "one value per head");
      return t.unsqueeze(1).expand({p_.heads, p_.headdim});
    }
    check_shape(name, t, {p_.heads, p_.headdim}, "(H) or (H, P)");
    return t;
  }

  void check_indices(const Tensor& indices) const {
    require_index_dtype("state_update", "state_batch_indices", indices);
    check_shape("state_batch_indices", indices, {batch_}, "one index per entry of x");
    require(indices.device() == ctx_.device(), "[state_update] state_batch_indices is on device ",
            name_of(indices.device()), ", expected ", name_of(ctx_.device()));
  }

  void read_rows() {
    const std::int64_t available = args_.state.size(0);
    const Tensor& indices = args_.state_batch_indices;
    if (!indices)
      require(available == batch_, "[state_update] state has ", available, " rows, expected ", batch_,
              ": one for each entry of x");
    else
      check_indices(indices);
    if (ctx_.on_gpu()) {
      p_.indices = indices;  // its values are not looked at here: that would wait for the device
      return;
    }
    for (std::int64_t b = 0; b < batch_; ++b) p_.rows.push_back(indices ? index_at(indices, b) : b);
    for (std::int64_t b = 0; b < batch_; ++b)
      require(p_.rows[static_cast<std::size_t>(b)] < available, "[state_update] state_batch_indices[", b,
              "] is ", p_.rows[static_cast<std::size_t>(b)], ", expected less than ", available,
              ", the rows of state");
    std::vector<std::int64_t> sorted = p_.rows;
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end(),
                                          [](std::int64_t a, std::int64_t b) { return a == b && a >= 0; });
    require(twice == sorted.end(), "[state_update] state_batch_indices names row ",
            twice == sorted.end() ? 0 : *twice, " twice, expected distinct rows");
  }

  void read_out() {
    if (args_.out) {
      check_shape("out", args_.out, args_.x.shape(), "as x");
      require(args_.out.dtype() == args_.x.dtype(), "[state_update] out has dtype ", args_.out.dtype(),
              ", expected ", args_.x.dtype(), ", as x");
    }
    out_ = args_.out ? args_.out : ctx_.empty(args_.x.shape(), args_.x.dtype());
    p_.out = channels(with_tokens(out_), 2);
  }

  Context& ctx_;
  const StateUpdateArgs& args_;
  Problem p_;
  Tensor out_;
  std::int64_t batch_ = 0;
  bool per_head_ = false;
  bool has_tokens_ = false;
  bool in_double_ = false;
};

}  // namespace

StateUpdatePath choose_path(StateUpdatePath requested, bool double_precision, bool prefer_reference) {
  if (requested != StateUpdatePath::automatic) return requested;
  return double_precision || prefer_reference ? StateUpdatePath::reference : StateUpdatePath::simd;
}

int choose_threads(std::int64_t elements, bool exponentials, int available) {
  // About ten microseconds of work for one thread.
  const std::int64_t small = exponentials ? 20'000 : 50'000;
  return elements < small ? 1 : available;
}

}  // namespace update

Tensor state_update(Context& ctx, const StateUpdateArgs& args) {
  update::Validation validation(ctx, args);
  const update::Problem problem = validation.run();
  const bool in_double = validation.in_double();
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      require(args.path == StateUpdatePath::automatic && !ctx.reference(),
              "[state_update] a path of the CPU is asked for on ", name_of(ctx.device()),
              ", expected automatic");
      require(!in_double, "[state_update] a GPU computes in f32, expected f32, bf16 and f16 tensors");
      update::run_cuda(ctx, problem);
      ctx.set_backend("state_update", "cuda");
      return validation.out();
    }
  }
  const StateUpdatePath path = update::choose_path(args.path, in_double, ctx.reference());
  if (path == StateUpdatePath::reference) {
    update::run_reference(problem, in_double);
    ctx.set_backend("state_update", "reference");
  } else {
    require(!in_double, "[state_update] the path simd has no f64, expected f32, bf16 and f16 tensors");
    update::run_simd(ctx, problem);
    ctx.set_backend("state_update", concat("simd (", simd_target(), ")"));
  }
  return validation.out();
}

}  // namespace krait
