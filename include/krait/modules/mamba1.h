// The Mamba-1 block's mixer (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State
// Spaces", section 3.4), and FalconMamba's variant of it.
#pragma once

#include <cstdint>
#include <optional>

#include "krait/modules/mixer.h"
#include "krait/ops/selective_scan.h"

namespace krait {

struct Mamba1Config {
  std::int64_t d_model = 0;
  std::int64_t d_state = 16;
  std::int64_t d_conv = 4;
  std::int64_t d_inner = 0;  // 0: expand * d_model
  double expand = 2;
  std::int64_t dt_rank = 0;  // 0: "auto", ceil(d_model / 16)
  double dt_min = 0.001;
  double dt_max = 0.1;
  bool dt_init_random = true;  // else constant
  double dt_scale = 1.0;
  double dt_init_floor = 1e-4;
  bool conv_bias = true;
  bool bias = false;
  std::optional<double> mixer_rms_eps;  // FalconMamba: weightless RMSNorms over dt, B and C
};

class Mamba1 final : public Mixer {
 public:
  // Fills in d_inner and dt_rank; throws where a size is not positive.
  explicit Mamba1(const Mamba1Config& config);

  Tensor forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer, Tape* tape = nullptr,
                 Tensor* sum = nullptr) const override;
  Tensor step(Context& ctx, const StepInput& input, const Batch& batch, int layer) const override;
  Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer, Tape& tape) const override;
  bool describe(DecodeModel& model, DecodeLayer& layer) const override;
  [[nodiscard]] LayerStateShape state_shape() const override;
  void visit(const std::string& prefix, const ParameterVisitor& visitor) override;
  void initialize(Rng& rng) override;
  void prepare(Context& ctx) override;
  [[nodiscard]] std::string_view kind() const override { return "Mamba1"; }

  [[nodiscard]] const Mamba1Config& config() const { return config_; }

 private:
  // What x_proj gives: columns of one matrix, (T, dt_rank), (T, d_state) and (T, d_state).
  struct ScanInputs {
    Tensor dt;
    Tensor B;
    Tensor C;
  };
  [[nodiscard]] ScanInputs split(const Tensor& dt_B_C) const;
  [[nodiscard]] Tensor delta_of(Context& ctx, const Tensor& dt) const;
  [[nodiscard]] SelectiveScanArgs scan_args(const Batch& batch, const Tensor& x, const Tensor& delta,
                                            const ScanInputs& inputs, const Tensor& z,
                                            const Tensor& initial_state) const;

  Mamba1Config config_;
  LinearLayer in_proj_;   // (2 d_inner, d_model): x and z
  ConvLayer conv1d_;      // (d_inner, 1, d_conv)
  LinearLayer x_proj_;    // (dt_rank + 2 d_state, d_inner): dt, B and C
  LinearLayer dt_proj_;   // (d_inner, dt_rank); its bias is the scan's delta_bias
  Tensor A_log_;          // (d_inner, d_state)
  Tensor D_;              // (d_inner)
  LinearLayer out_proj_;  // (d_model, d_inner)
  Tensor A_;              // -exp(A_log)
  Tensor dA_log_;
  Tensor dD_;
};

}  // namespace krait
