// Batches: threads, order, concurrent callers, fork, and floating-point modes of the caller.
#include <sys/wait.h>
#include <unistd.h>

#include <cfenv>
#include <thread>

#include "check.h"
#include "sampler/batch.h"
#include "sampler_rows.h"

using namespace twinjet::sampler;

namespace {

struct Batch {
  std::vector<rows::Row> rows;
  std::vector<RowInput> inputs;

  explicit Batch(uint64_t stream, size_t size) : rows(size) {
    std::mt19937_64 random = test::Random(stream);
    for (rows::Row& row : rows) {
      const auto shape = static_cast<rows::Shape>(random() % static_cast<uint64_t>(rows::Shape::kCount));
      rows::FillRow(random, shape, 1 + rows::Below(random, 3000), &row);
      row.input.num_logprobs = -1;
      inputs.push_back(row.input);
    }
  }

  std::vector<int32_t> Draw(BatchSampler& sampler) const {
    std::vector<RowOutput> outputs(inputs.size());
    sampler.Draw(inputs, outputs);
    std::vector<int32_t> tokens;
    for (const RowOutput& output : outputs) tokens.push_back(output.token_id);
    return tokens;
  }

  std::vector<int32_t> DrawAlone() const {
    std::vector<int32_t> tokens;
    for (const RowInput& input : inputs) {
      RowOutput output;
      ReferenceDrawRow(input, &output);
      tokens.push_back(output.token_id);
    }
    return tokens;
  }
};

}  // namespace

TEST(threads_do_not_matter) {
  for (int num_threads : {1, 2, 3, 8}) {
    BatchSampler sampler(*DefaultKernels(), num_threads);
    for (uint64_t stream = 0; stream < 40; ++stream) {
      const Batch batch(stream, 1 + stream * 3);
      CHECK(batch.Draw(sampler) == batch.DrawAlone());
    }
  }
}

TEST(callers_may_be_concurrent) {
  BatchSampler sampler(*DefaultKernels(), 2);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> callers;
  for (size_t t = 0; t < wrong.size(); ++t) {
    callers.emplace_back([&, t] {
      for (uint64_t stream = 0; stream < 10; ++stream) {
        const Batch batch(100 * t + stream, 20);
        if (batch.Draw(sampler) != batch.DrawAlone()) ++wrong[t];
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

#if !defined(__SANITIZE_THREAD__)
TEST(a_forked_child_samples_too) {
  BatchSampler sampler(*DefaultKernels(), 3);
  const Batch batch(7, 64);
  const std::vector<int32_t> expected = batch.Draw(sampler);
  const pid_t child = fork();
  if (child == 0) _exit(batch.Draw(sampler) == expected ? 0 : 1);
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

TEST(rounding_mode_of_the_caller_does_not_matter) {
  BatchSampler sampler(*DefaultKernels(), 1);
  const Batch batch(9, 100);
  const std::vector<int32_t> expected = batch.Draw(sampler);
  std::fesetround(FE_UPWARD);
  const std::vector<int32_t> upward = batch.Draw(sampler);
  std::fesetround(FE_TONEAREST);
  CHECK(upward == expected);
}
