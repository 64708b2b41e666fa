#include "train/optimizer_state.h"

#include <algorithm>
#include <regex>
#include <set>
#include <utility>

#include "krait/core/error.h"

namespace krait {
namespace {

void copy_named(const Context& ctx, const io::TensorMap& from, const std::string& key, const Tensor& to,
                const std::string& name, std::set<std::string>& used) {
  const auto found = from.find(key);
  require(found != from.end(), name, ": tensor ", key, " is missing, expected shape ", to.shape());
  require(found->second.shape() == to.shape(), name, ": tensor ", key, " has shape ", found->second.shape(),
          ", expected ", to.shape());
  require(found->second.dtype() == DType::f32, name, ": tensor ", key, " has dtype ", found->second.dtype(),
          ", expected f32");
  ctx.copy(found->second, to);
  used.insert(key);
}

}  // namespace

OptimizerState::OptimizerState(Context& ctx, LanguageModel& model, const TrainSettings& settings)
    : ctx_(ctx), model_(model), settings_(settings) {
  std::vector<std::regex> no_decay;
  for (const std::string& pattern : settings.no_decay) no_decay.emplace_back(pattern);
  model_.own_parameters(ctx);
  model_.zero_gradients(ctx);
  model_.visit([&](const Parameter& p) {
    if (!p.gradient) return;
    require(p.tensor.dtype() == DType::f32, "parameter ", p.name, " has dtype ", p.tensor.dtype(),
            ", expected f32 to train it");
    AdamWTensor tensor{.parameter = p.tensor,
                       .gradient = p.gradient,
                       .m = ctx.zeros(p.shape),
                       .v = ctx.zeros(p.shape),
                       .decay = std::none_of(no_decay.begin(), no_decay.end(), [&](const std::regex& regex) {
                         return std::regex_search(p.name, regex);
                       })};
    if (p.kind == ParameterKind::matrix && settings.dtype != DType::f32) {
      p.tensor = ctx.to(p.tensor, settings.dtype);
      tensor.compute = p.tensor;
    }
    if (settings.ema > 0.0)
      averages_.push_back({.average = ctx.clone(tensor.parameter), .parameter = tensor.parameter});
    names_.push_back(p.name);
    gradients_.push_back(tensor.gradient);
    tensors_.push_back(std::move(tensor));
  });
  model_.prepare(ctx_);
}

double OptimizerState::gradient_norm() const { return global_norm(ctx_, gradients_); }

void OptimizerState::update(std::int64_t update, double lr, double gradient_scale) {
  adamw(ctx_, {.tensors = tensors_,
               .step = update,
               .lr = lr,
               .beta1 = settings_.betas[0],
               .beta2 = settings_.betas[1],
               .eps = settings_.eps,
               .weight_decay = settings_.weight_decay,
               .gradient_scale = gradient_scale});
  if (!averages_.empty()) {
    // The first weights are random: a young average forgets faster.
    const auto n = static_cast<double>(update);
    update_average(ctx_, averages_, std::min(settings_.ema, (1.0 + n) / (10.0 + n)));
  }
  model_.prepare(ctx_);
}

io::TensorMap OptimizerState::weights() const {
  io::TensorMap map;
  for (std::size_t i = 0; i < names_.size(); ++i) map.emplace(names_[i], ctx_.to_host(tensors_[i].parameter));
  return map;
}

io::TensorMap OptimizerState::average() const {
  io::TensorMap map;
  for (std::size_t i = 0; i < averages_.size(); ++i)
    map.emplace(names_[i], ctx_.to_host(averages_[i].average));
  return map;
}

io::TensorMap OptimizerState::moments() const {
  io::TensorMap map;
  for (std::size_t i = 0; i < names_.size(); ++i) {
    map.emplace("m." + names_[i], ctx_.to_host(tensors_[i].m));
    map.emplace("v." + names_[i], ctx_.to_host(tensors_[i].v));
    if (!averages_.empty()) map.emplace("average." + names_[i], ctx_.to_host(averages_[i].average));
  }
  return map;
}

void OptimizerState::load(const io::TensorMap& weights, const io::TensorMap& moments,
                          const std::string& name) {
  std::set<std::string> used;
  for (std::size_t i = 0; i < names_.size(); ++i) {
    copy_named(ctx_, weights, names_[i], tensors_[i].parameter, name, used);
    copy_named(ctx_, moments, "m." + names_[i], tensors_[i].m, name, used);
    copy_named(ctx_, moments, "v." + names_[i], tensors_[i].v, name, used);
    if (!averages_.empty())
      copy_named(ctx_, moments, "average." + names_[i], averages_[i].average, name, used);
    if (tensors_[i].compute) ctx_.copy(tensors_[i].parameter, tensors_[i].compute);
  }
  for (const auto& [key, tensor] : weights)
    require(used.contains(key), name, ": unexpected tensor ", key, " of shape ", tensor.shape(),
            ": the model has no such parameter");
  model_.prepare(ctx_);
}

std::int64_t OptimizerState::parameters() const {
  std::int64_t count = 0;
  for (const AdamWTensor& tensor : tensors_) count += tensor.parameter.numel();
  return count;
}

std::int64_t OptimizerState::decayed_parameters() const {
  std::int64_t count = 0;
  for (const AdamWTensor& tensor : tensors_) count += tensor.decay ? tensor.parameter.numel() : 0;
  return count;
}

WeightsForEvaluation::WeightsForEvaluation(OptimizerState& state, Which which)
    : ctx_(state.ctx_), model_(state.model_) {
  std::size_t next = 0;
  model_.visit([&](const Parameter& p) {
    if (next == state.names_.size() || state.names_[next] != p.name) {
      others_.emplace_back();
      return;
    }
    others_.push_back(which == Which::master ? state.tensors_[next].parameter
                                             : state.averages_[next].average);
    ++next;
  });
  swap();
}

WeightsForEvaluation::~WeightsForEvaluation() { swap(); }

void WeightsForEvaluation::swap() {
  std::size_t next = 0;
  model_.visit([&](const Parameter& p) {
    Tensor& other = others_[next++];
    if (other) std::swap(p.tensor, other);
  });
  model_.prepare(ctx_);
}

}  // namespace krait
