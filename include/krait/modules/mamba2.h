// The Mamba-2 block's mixer (Dao and Gu 2024, "Transformers are SSMs", section 7).
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "krait/modules/mixer.h"
#include "krait/ops/ssd.h"
#include "krait/ops/state_update.h"

namespace krait {

struct Mamba2Config {
  std::int64_t d_model = 0;
  std::int64_t d_state = 128;
  std::int64_t d_conv = 4;
  std::optional<double> conv_init;  // conv weights uniform in [-conv_init, conv_init]
  double expand = 2;
  std::int64_t headdim = 64;
  std::int64_t d_ssm = 0;  // 0: d_inner; smaller: the rest of d_inner is a gated MLP beside the SSM
  std::int64_t ngroups = 1;
  std::pair<double, double> A_init_range{1.0, 16.0};
  bool D_has_hdim = false;
  bool rmsnorm = true;
  bool norm_before_gate = false;
  double norm_eps = 1e-5;
  double dt_min = 0.001;
  double dt_max = 0.1;
  double dt_init_floor = 1e-4;
  DtLimit dt_limit;
  bool bias = false;
  bool conv_bias = true;
  std::int64_t chunk_size = 256;  // of checkpoints; the operator picks its own, which changes rounding only
  bool learnable_init_states = false;

  [[nodiscard]] std::int64_t d_inner() const;
};

class Mamba2 : public Mixer {
 public:
  // Fills in d_ssm; throws where sizes do not fit together.
  explicit Mamba2(const Mamba2Config& config);

  Tensor forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer, Tape* tape = nullptr,
                 Tensor* sum = nullptr) const override;
  Tensor step(Context& ctx, const StepInput& input, const Batch& batch, int layer) const override;
  Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer, Tape& tape) const override;
  bool describe(DecodeModel& model, DecodeLayer& layer) const override;
  [[nodiscard]] LayerStateShape state_shape() const override;
  void visit(const std::string& prefix, const ParameterVisitor& visitor) override;
  void initialize(Rng& rng) override;
  void prepare(Context& ctx) override;
  [[nodiscard]] std::string_view kind() const override { return "Mamba2"; }

  [[nodiscard]] const Mamba2Config& config() const { return config_; }

 private:
  [[nodiscard]] std::int64_t nheads() const { return config_.d_ssm / config_.headdim; }
  [[nodiscard]] std::int64_t d_mlp() const { return config_.d_inner() - config_.d_ssm; }

  // The columns of in_proj's output; z0 and x0 (T, d_mlp), z (T, d_ssm), xBC (T, conv channels), dt (T, H).
  struct Projected {
    Tensor z0;
    Tensor x0;
    Tensor z;
    Tensor xBC;
    Tensor dt;
  };
  // Those of the convolution's; x (T, H, P), B and C (T, G, N).
  struct Convolved {
    Tensor x;
    Tensor B;
    Tensor C;
  };
  [[nodiscard]] Projected split_projected(const Tensor& t) const;
  [[nodiscard]] Convolved split_convolved(const Tensor& t) const;
  [[nodiscard]] Tensor inner_gate(const Tensor& z) const;
  [[nodiscard]] Tensor by_head(const Tensor& D) const;
  [[nodiscard]] Tensor learnt_states(const Batch& batch) const;
  [[nodiscard]] SsdArgs ssd_args(const Batch& batch, const Projected& in, const Convolved& conv,
                                 const Tensor& initial_states) const;

  Mamba2Config config_;
  LinearLayer in_proj_;   // (2 d_mlp + 2 d_ssm + 2 ngroups d_state + nheads, d_model): z0, x0, z, x, B, C, dt
  ConvLayer conv1d_;      // (d_ssm + 2 ngroups d_state, 1, d_conv): over x, B and C
  Tensor init_states_;    // (nheads, headdim, d_state), learnable_init_states
  Tensor dt_bias_;        // (nheads)
  Tensor A_log_;          // (nheads)
  Tensor D_;              // (nheads), or (d_ssm) with D_has_hdim
  NormLayer norm_;        // (d_ssm), gated, over groups of d_ssm / ngroups
  LinearLayer out_proj_;  // (d_model, d_inner)
  Tensor A_;              // -exp(A_log)
  Tensor dA_log_;
  Tensor dD_;
  Tensor ddt_bias_;
  Tensor dinit_states_;
};

// The paper's simpler block: no d_ssm, always RMS-normed as norm(y * silu(z)), d_state 64 and headdim 128
// by default, optionally with learnt initial states.
struct Mamba2SimpleConfig {
  std::int64_t d_model = 0;
  std::int64_t d_state = 64;
  std::int64_t d_conv = 4;
  std::optional<double> conv_init;
  double expand = 2;
  std::int64_t headdim = 128;
  std::int64_t ngroups = 1;
  std::pair<double, double> A_init_range{1.0, 16.0};
  double dt_min = 0.001;
  double dt_max = 0.1;
  double dt_init_floor = 1e-4;
  DtLimit dt_limit;
  bool learnable_init_states = false;
  bool bias = false;
  bool conv_bias = true;
  std::int64_t chunk_size = 256;
};

class Mamba2Simple final : public Mamba2 {
 public:
  explicit Mamba2Simple(const Mamba2SimpleConfig& config);
  [[nodiscard]] std::string_view kind() const override { return "Mamba2Simple"; }
};

}  // namespace krait
