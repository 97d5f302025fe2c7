// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/validation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/train/trainer.h"
#include "tests/support/tiny_run.h"

namespace collegium {
namespace {

class ValidationRun : public test::TinyRun {
 protected:
  train::RunConfig config(const std::vector<std::string>& overrides) const {
    return train::read_run_config(folder_ / "run.toml", overrides);
  }

  // Of the corpus, every token: a target or none.
  void mask_all(bool is_target) const {
    data::DatasetIndex index = data::Dataset(corpus()).index();
    const std::string mask(static_cast<std::size_t>(index.num_tokens), is_target ? '\1' : '\0');
    write_file_atomically(corpus() / "loss_mask.bin", mask);
    index.has_loss_mask = true;
    index.loss_mask_checksum = checksum_file(corpus() / "loss_mask.bin");
    write_file_atomically(corpus() / "dataset.json", write_fields(index).dump());
  }

  std::string refusal() const {
    try {
      train::require_validation(data::Dataset(corpus()), kShape, moe::MoeOptions());
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  }

  std::filesystem::path corpus() const { return folder_ / "data"; }

  static constexpr train::ValidationShape kShape{.sequence_length = 12, .max_sequences = 4};
};

TEST_F(ValidationRun, layers_are_numbered_as_in_the_model) {
  const train::Trainer trainer(config({"model.moe_layers=[false, true]", "model.dense_ffn_size=8"}));
  const auto result = train::validate_model(trainer.decoder(), trainer.dataset(), kShape, trainer.groups());
  ASSERT_EQ(result.specialization.size(), 1U);
  EXPECT_EQ(result.specialization[0].layer, 1);
  EXPECT_EQ(result.num_targets, 4 * 12);
}

TEST_F(ValidationRun, windows_without_a_target_are_refused_beforehand) {
  EXPECT_EQ(refusal(), "accepted");
  mask_all(true);
  EXPECT_EQ(refusal(), "accepted");
  mask_all(false);
  EXPECT_THAT(refusal(), testing::HasSubstr("none of the 4 sequences of 12 tokens that are evaluated"));
}

}  // namespace
}  // namespace collegium
