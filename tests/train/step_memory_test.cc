#include "train/step_memory.h"

#include <gtest/gtest.h>

#include "io/scratch.h"
#include "train/tiny.h"

namespace krait {
namespace {

// Two blocks of 32 floats, and two ids for each token.
constexpr double kTokenBytes = 2 * 32 * 4 + 16;

std::string message(std::int64_t rows, std::int64_t length, std::int64_t accumulate, double memory) {
  return io::message_of(
      [&] { require_step_fits(tiny_config(), {.seq_len = length, .batch_size = rows}, accumulate, memory); });
}

TEST(StepMemory, CountsWhatIsCertain) {
  const double batch = sizeof(TrainingBatch);
  EXPECT_EQ(message(4, 10, 1, 40 * kTokenBytes + batch), "");
  EXPECT_NE(message(4, 10, 1, 40 * kTokenBytes + batch - 1), "");
  EXPECT_EQ(message(4, 10, 3, 40 * (kTokenBytes + 2 * 16) + 3 * batch), "");
  EXPECT_NE(message(4, 10, 3, 40 * (kTokenBytes + 2 * 16) + 3 * batch - 1), "");
  EXPECT_EQ(message(0, 0, 1, kTokenBytes + batch), "") << "what fixed batches have is not known yet";
}

TEST(StepMemory, NamesWhatIsTooLarge) {
  constexpr double kGib = 1024.0 * 1024.0 * 1024.0;
  EXPECT_EQ(message(8, std::int64_t{1} << 22, 1, 2 * kGib),
            "batch_size is 8: a step would need at least 8.5 GiB of memory, and this machine has 2.0 GiB");
  EXPECT_EQ(message(8, std::int64_t{1} << 22, 1, kGib),
            "seq_len is 4194304: a step would need at least 8.5 GiB of memory, and this machine has 1.0 GiB");
  EXPECT_NE(message(8, 64, std::int64_t{1} << 30, kGib).find("accumulate is 1073741824: "),
            std::string::npos);
}

TEST(StepMemory, TheMachineHasSome) { EXPECT_GT(machine_memory(), 1e6); }

}  // namespace
}  // namespace krait
