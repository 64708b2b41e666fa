#include "train/run_record.h"

#include <vector>

namespace krait {
namespace {

constexpr const char* kMetrics = "metrics.jsonl";
constexpr const char* kSamples = "samples.jsonl";
constexpr const char* kEvents = "tensorboard";

}  // namespace

RunRecord::RunRecord(const RunDirectory& directory, const TrainOptions& options, std::int64_t step)
    : options_(options),
      metrics_(directory / kMetrics),
      samples_(directory / kSamples),
      events_(directory / kEvents) {
  events_.start_at(step + 1);
}

void RunRecord::add(const StepReport& report) {
  metrics_.add(json_line(report));
  const EventFileWriter::Scalar scalars[] = {{"train/loss", report.loss},
                                             {"train/grad_norm", report.grad_norm},
                                             {"train/lr", report.lr},
                                             {"train/tokens", static_cast<double>(report.tokens)},
                                             {"train/tokens_per_second", report.tokens_per_second},
                                             {"train/skipped", static_cast<double>(report.skipped)}};
  events_.add_scalars(report.step, scalars);
  if (options_.on_log) options_.on_log(report);
}

void RunRecord::add(const EvaluationReport& report) {
  metrics_.add(json_line(report));
  std::vector<EventFileWriter::Scalar> scalars{{"val/loss", report.loss}};
  if (report.bits_per_byte) scalars.push_back({"val/bits_per_byte", *report.bits_per_byte});
  if (report.average_loss) scalars.push_back({"val/loss_average", *report.average_loss});
  if (report.average_bits_per_byte)
    scalars.push_back({"val/bits_per_byte_average", *report.average_bits_per_byte});
  events_.add_scalars(report.step, scalars);
  if (options_.on_evaluation) options_.on_evaluation(report);
}

void RunRecord::add(const SampleReport& report) {
  LineFile(samples_).add(json_line(report));
  events_.add_text(report.step, "sample", report.text);
  if (options_.on_sample) options_.on_sample(report);
}

void RunRecord::filter(const RunDirectory& directory, const std::function<bool(std::string_view)>& keep) {
  filter_lines(directory / kMetrics, keep);
  filter_lines(directory / kSamples, keep);
}

}  // namespace krait
