// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/validate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "collegium/base/error.h"

namespace collegium::plan {
namespace {

using testing::HasSubstr;

constexpr const char* kHeader =
    "name,params_b,layers,hidden,ffn_hidden,heads,kv_heads,experts,topk,moe_ffn_hidden,shared_experts,vocab,"
    "seq_len,"
    "global_batch,micro_batch,gpu,num_gpus,tp,pp,vpp,dp,ep,etp,cp,zero,recompute,precision,metric,value,unit,"
    "source,"
    "read_or_memory\n";
// The 22B point of the sequence-parallelism paper: 1.42 s with full recomputation.
constexpr const char* kRow =
    "22B,22,48,6144,24576,64,64,,,,,51200,2048,4,4,A100-80GB,8,8,1,1,1,,,,0,full,fp16,iteration_time,1.42,s,"
    "calculon-ai/calculon tab5,read\n";

TEST(Validate, judges_a_row_and_refuses_gaps_with_the_reason) {
  const std::string gap =
      "gap,,48,6144,,64,,,,,,51200,2048,,4,A100-80GB,8,8,1,1,1,,,,0,full,fp16,iteration_time,1.4,s,\"a, "
      "b\",read\n";
  const std::string odd =
      "odd,,48,6144,,64,,,,,,51200,2048,4,4,A100-80GB,8,8,1,1,7,,,,0,full,fp16,iteration_time,1.4,s,x,read\n";
  const Validation v = validate(std::string(kHeader) + kRow + gap + odd, "test.csv");
  ASSERT_EQ(v.judged.size(), 1U);
  EXPECT_LT(std::abs(v.judged.front().error()), 0.08);
  ASSERT_EQ(v.refused.size(), 2U);
  EXPECT_EQ(v.refused[0].reason, "dp = 7 contradicts num_gpus/(tp*pp*cp) = 8/8 = 1");
  EXPECT_EQ(v.refused[1].reason, "global_batch is missing");
  EXPECT_THAT(format_validation(v, true), HasSubstr("line 3"));
}

// Each file is read by itself: an end without a newline joins nothing, and lines are those of the file.
TEST(Validate, files_of_a_folder_stay_apart) {
  const std::filesystem::path folder = std::filesystem::path(testing::TempDir()) / "published";
  std::filesystem::remove_all(folder);
  const auto write = [&](const char* name, const std::string& text) {
    std::filesystem::create_directories(folder / name);
    std::ofstream(folder / name / "runs.csv") << text;
  };
  const std::string header(kHeader);
  const std::string open_row(kRow, std::string(kRow).size() - 1);
  write("a", header + open_row);
  write("b", header.substr(0, header.size() - 1));
  write("c", "\xEF\xBB\xBF" + header + kRow + "odd,few\n");
  const Validation v = validate_path(folder.string());
  ASSERT_EQ(v.judged.size(), 2U);
  EXPECT_EQ(v.judged.back().run->place.text(), "c/runs.csv line 2");
  ASSERT_EQ(v.refused.size(), 1U);
  EXPECT_EQ(v.refused.front().places.front().text(), "c/runs.csv line 3");
  EXPECT_THAT(format_validation(v, true), HasSubstr("1 rows (c/runs.csv line 3): 2 fields"));
  write("d", "name,metric,value\n");
  try {
    validate_path(folder.string());
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("d/runs.csv: its columns differ from those of"));
  }
  std::filesystem::remove_all(folder);
  write("a", header);
  EXPECT_THROW(validate_path(folder.string()), ConfigError);
  std::filesystem::remove_all(folder);
}

TEST(Validate, malformed_files_are_errors) {
  EXPECT_THROW(validate("", "test.csv"), ConfigError);
  EXPECT_THROW(validate(kHeader, "test.csv"), ConfigError);
  EXPECT_THROW(validate("name,metric\nx,oom\n", "test.csv"), ConfigError);
  EXPECT_THROW(validate("metric,value,metric\noom,1,oom\n", "test.csv"), ConfigError);
  const Validation few = validate(std::string(kHeader) + "too,few\n" + kRow, "test.csv");
  EXPECT_EQ(few.judged.size(), 1U);
  EXPECT_EQ(few.refused.front().reason, "2 fields, but the header has 32 columns");
  const Validation v =
      validate(std::string(kHeader) +
                   "x,,forty,6144,,64,,,,,,51200,2048,4,4,A100-80GB,8,8,1,1,1,,,,0,full,fp16,"
                   "iteration_time,nan,s,x,read\n",
               "test.csv");
  ASSERT_EQ(v.refused.size(), 1U);
  EXPECT_THAT(v.refused.front().reason, HasSubstr("value = nan: must be a number"));
}

// Whatever stands in a field, the row is predicted or refused with a reason.
TEST(Validate, no_value_of_any_column_is_too_odd) {
  const std::string header(kHeader);
  const std::string row(kRow);
  std::vector<std::string> fields;
  for (std::size_t at = 0; at < row.size(); at = row.find_first_of(",\n", at) + 1)
    fields.push_back(row.substr(at, row.find_first_of(",\n", at) - at));
  std::string csv = header;
  std::size_t rows = 0;
  for (std::size_t i = 0; i < fields.size(); ++i) {
    for (const char* odd :
         {"", "nan", "inf", "-1", "0", "1e300", "99999999999", "3.5", "abc", "1e-300", " ", "0x10"}) {
      for (std::size_t j = 0; j < fields.size(); ++j)
        csv.append(j == 0 ? "" : ",").append(i == j ? std::string(odd) : fields[j]);
      csv.append("\n");
      ++rows;
    }
  }
  const Validation v = validate(csv, "odd.csv");
  std::size_t refused = 0;
  for (const RefusedRows& r : v.refused) refused += r.places.size();
  EXPECT_EQ(v.runs.size() + refused, rows);
  for (const Judged& judged : v.judged)
    EXPECT_TRUE(std::isfinite(judged.predicted)) << judged.run->place.line;
}

TEST(Validate, unknown_software_and_models_are_predicted) {
  const std::string rest = "64,2,2,,16,,,,1,,bf16,";
  const std::string csv =
      std::string(kHeader) + "new-13B,,40,5120,13824,40,40,,,,,32000,4096,512,1,NVIDIA H100 80GB HBM3," +
      rest + "tokens_per_s_per_gpu,3000,tok/s,lab/stack@1 README,read\n" +
      "new-13B,,40,5120,13824,40,40,,,,,,4096,512,1,h200," + rest +
      "iteration_time,10000,ms,lab/stack@1 x,read\n" +
      "new-moe,,28,2048,10944,16,16,64,6,1408,2,102400,4096,512,1,A100-SXM4-80GB,64,2,2,,16,8,,,1,,bf16," +
      "mfu,0.4,,lab/other@1 x,read\n";
  const Validation v = validate(csv, "new.csv");
  EXPECT_TRUE(v.refused.empty());
  ASSERT_EQ(v.judged.size(), 3U);
  for (const Judged& judged : v.judged)
    EXPECT_LT(std::abs(std::log(judged.predicted / judged.measured)), 0.7);
}

TEST(Validate, hardware_flops_of_a_gpt_follow_the_published_formula) {
  const ModelSpec model = published_run(read_csv(std::string(kHeader) + kRow, "test.csv").front()).model;
  const Workload work{.seq_len = 2048, .global_batch = 4};
  const Layout layout{.recompute = {.full = true}};
  const double h = 6144;
  const double formula = 96.0 * 4 * 2048 * 48 * h * h * (1.0 + 2048 / (6 * h) + 51200 / (16 * 48 * h));
  // Biases and norms are not in the formula.
  EXPECT_NEAR(hardware_flops(model, layout, work) / formula, 1.0, 1e-3);
}

TEST(Validate, constants_are_judged_on_the_other_half) {
  std::string csv = kHeader;
  for (int batch = 8; batch <= 160; batch += 8)
    csv += fmt::format(
        "7b,,32,4096,,32,,,,,,51200,2048,{},1,A100-80GB,8,8,1,1,1,,,,0,full,fp16,iteration_time,{},s,lab@1 "
        "x,read\n",
        batch, 0.9 * batch / 8);
  const Validation v = validate(csv, "test.csv");
  ASSERT_EQ(v.constants.size(), 1U);
  ASSERT_EQ(v.errors.size(), 2U);
  EXPECT_LT(v.errors.back().median, 0.1);
}

const ErrorRow& row_of(const Validation& v, const std::string& metric, const std::string& source) {
  for (const ErrorRow& row : v.errors) {
    if (row.metric == metric && row.source.find(source) != std::string::npos) return row;
  }
  throw InternalError(fmt::format("no row {} of {}", metric, source));
}

// What the planner must keep on the published runs of validation/; step times are judged on rows that no
// constant saw.
TEST(Validate, published_runs_are_met) {
  const Validation v = validate_path(COLLEGIUM_SOURCE_DIR "/validation");
  EXPECT_LE(row_of(v, "static memory", "all sources").median, 0.03);
  EXPECT_LE(row_of(v, "static memory", "all sources").percentile90, 0.05);
  EXPECT_LE(row_of(v, "static memory < 10 GiB", "all sources").median, 0.05);
  EXPECT_LE(row_of(v, "peak memory", "all sources").median, 0.06);
  EXPECT_LE(row_of(v, "identity", "all sources").median, 0.01);
  EXPECT_LE(row_of(v, "step time", "all sources").median, 0.06);
  EXPECT_LE(row_of(v, "step time", "all sources").percentile90, 0.20);
  EXPECT_LE(row_of(v, "step time", "calculon").mean, 0.0365);
  bool bloom = false;
  for (const Ranking& ranking : v.rankings) {
    if (ranking.set.find("bloom") == std::string::npos) continue;
    bloom = true;
    EXPECT_GE(ranking.kendall_tau_distinct, 0.8);
    EXPECT_LE(ranking.regret, 0.05);
  }
  EXPECT_TRUE(bloom);
  std::size_t contradicted = 0;
  for (const FitVerdict& verdict : v.verdicts) {
    contradicted += verdict.contradicted_by.empty() ? 0 : 1;
    EXPECT_TRUE(verdict.ran == verdict.predicted_to_fit || !verdict.contradicted_by.empty())
        << verdict.run->name;
  }
  EXPECT_EQ(contradicted, 2U);
  EXPECT_THAT(format_validation(v, false), HasSubstr("ran under the same layout"));
}

}  // namespace
}  // namespace collegium::plan
