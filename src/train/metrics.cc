#include "krait/train/metrics.h"

#include <nlohmann/json.hpp>

namespace krait {
namespace {

using Json = nlohmann::ordered_json;

// nlohmann writes null for what is not finite, and bytes that are not UTF-8 are replaced.
std::string line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

std::string json_line(const StepReport& r) {
  Json json{{"step", r.step},
            {"loss", r.loss},
            {"grad_norm", r.grad_norm},
            {"lr", r.lr},
            {"tokens", r.tokens},
            {"seconds", r.seconds},
            {"tokens_per_second", r.tokens_per_second},
            {"skipped", r.skipped}};
  return line(json);
}

std::string json_line(const EvaluationReport& r) {
  Json json{{"step", r.step}, {"val_loss", r.loss}};
  if (r.bits_per_byte) json["val_bits_per_byte"] = *r.bits_per_byte;
  if (r.average_loss) json["val_loss_average"] = *r.average_loss;
  if (r.average_bits_per_byte) json["val_bits_per_byte_average"] = *r.average_bits_per_byte;
  json["best"] = r.best;
  json["seconds"] = r.seconds;
  return line(json);
}

std::string json_line(const SampleReport& r) { return line(Json{{"step", r.step}, {"text", r.text}}); }

}  // namespace krait
