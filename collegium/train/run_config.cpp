// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/run_config.h"

#include <span>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/machine.h"
#include "collegium/base/toml.h"
#include "collegium/data/tokenizer.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/capacity.h"
#include "collegium/plan/cluster.h"
#include "collegium/train/validation.h"

namespace collegium::train {

namespace {

namespace fs = std::filesystem;

// Everything but [model], whose keys depend on where the model comes from.
template <class Fields>
void describe_sections(Fields& fields, RunConfig& c) {
  fields("run_folder", c.run_folder, "checkpoints and metrics.jsonl go here");
  fields("data", c.data, "the prepared corpus");
  fields("batch", c.batch, "an optimizer step and its micro-steps");
  fields("train", c.train, "the loop");
  fields("optimizer", c.optimizer, "AdamW");
  fields("schedule", c.schedule, "of the learning rate");
  fields("checkpoint", c.checkpoint, "what survives a crash");
  fields("validation", c.validation, "loss on held-out documents");
  fields("logging", c.logging, "what is shown");
  fields("parallel", c.parallel, "how the run is laid out over ranks; never changes what it computes");
  fields("planner", c.planner, "what the run is set beside at its end");
}

struct Sections {
  RunConfig config;
};
template <class Fields>
void describe(Fields& fields, Sections& s) {
  describe_sections(fields, s.config);
}

struct ModelSourceKeys {
  ModelOptions options;
};
template <class Fields>
void describe(Fields& fields, ModelSourceKeys& s) {
  fields("config", s.options.config, "a Hugging Face config.json (file or folder) instead of inline keys");
  fields("init", s.options.init,
         "a Hugging Face model folder to start from: continued training, fine-tuning");
  fields("freeze", s.options.freeze,
         "on-disk names of tensors that are not trained, such as *.experts.0.*; * stands for any text");
}

// "a.b=value": the value is TOML; a bare word that is no TOML value is taken as text.
void apply_override(Json& json, const std::string& text) {
  const std::size_t equals = text.find('=');
  require_config(equals != std::string::npos && equals > 0,
                 "--set {}: must be KEY=VALUE, such as train.steps=100", text);
  const std::string key = text.substr(0, equals);
  const std::string value = text.substr(equals + 1);
  Json parsed;
  try {
    parsed = parse_toml("value = " + value, "--set")["value"];
  } catch (const ConfigError&) {
    parsed = value;
  }
  Json* target = &json;
  std::size_t begin = 0;
  for (std::size_t dot = key.find('.'); dot != std::string::npos; dot = key.find('.', begin)) {
    target = &(*target)[key.substr(begin, dot - begin)];
    require_config(target->is_null() || target->is_object(), "--set {}: '{}' is not a table", text,
                   key.substr(0, dot));
    begin = dot + 1;
  }
  (*target)[key.substr(begin)] = parsed;
}

// Tables merge key by key; anything else replaces.
void merge(Json& target, const Json& source) {
  for (const auto& [key, value] : source.items()) {
    if (value.is_object() && target.contains(key) && target[key].is_object()) {
      merge(target[key], value);
    } else {
      target[key] = value;
    }
  }
}

void resolve_model(const Json& section, RunConfig& config) {
  Json inline_keys = section;
  ModelSourceKeys source;
  Json source_keys = Json::object();
  for (const char* key : {"config", "init", "freeze"}) {
    if (!inline_keys.contains(key)) continue;
    source_keys[key] = inline_keys[key];
    inline_keys.erase(key);
  }
  read_fields(source_keys, "model", source);
  config.model_source = source.options;
  config.model_source.inline_keys = inline_keys;
  require_config(source.options.config.empty() || source.options.init.empty(),
                 "model.config and model.init: give one; init brings its own config.json");
  const std::string from = source.options.config.empty() ? source.options.init : source.options.config;
  if (from.empty()) {
    read_fields(inline_keys, "model", config.model);
    model::complete(config.model);
    return;
  }
  config.model = model::read_model_config(from);
  // The sizes come from there; routing options and losses may be set for this run.
  for (const auto& [key, value] : inline_keys.items()) {
    require_config(key == "moe", "model.{}: comes from {}; only model.moe may be set beside it", key, from);
  }
  if (!inline_keys.contains("moe")) return;
  for (const char* key : {"num_experts", "top_k", "ffn_size"}) {
    require_config(!inline_keys["moe"].contains(key), "model.moe.{}: comes from {} and cannot be changed",
                   key, from);
  }
  Json merged = write_fields(config.model.moe);
  merge(merged, inline_keys["moe"]);
  read_fields(merged, "model.moe", config.model.moe);
}

// A capacity alone would be passed over without a word; who names the policy too knows what it does.
void validate_capacity(const RunConfig& c) {
  const auto is_given = [&](const char* key) {
    return c.model_source.inline_keys.contains(Json::json_pointer(fmt::format("/moe/capacity/{}", key)));
  };
  if (c.model.moe.capacity.drop_policy != moe::DropPolicy::kNone || is_given("drop_policy")) return;
  require_config(!is_given("group_sequences") || moe::tokens_interact_in_groups(c.model.moe, true),
                 "model.moe.capacity.group_sequences: nothing is dropped, and this router's tokens do not "
                 "influence each other, so there are no groups; give model.moe.capacity.drop_policy too");
  for (const char* key : {"factor", "min_capacity", "drop_in_evaluation"}) {
    require_config(!is_given(key),
                   "model.moe.capacity.{}: by default nothing is dropped, so there is no capacity; give "
                   "model.moe.capacity.drop_policy too",
                   key);
  }
}

void validate(const RunConfig& c) {
  require_config(!c.run_folder.empty(), "run_folder: name the folder of the run");
  require_config(!path_exists(c.run_folder) || is_folder(c.run_folder), "run_folder = {}: is a file",
                 c.run_folder);
  require_config(!c.data.path.empty(), "data.path: name a folder made by 'collegium prepare'");
  require_config(c.data.sequence_length >= 2, "data.sequence_length = {}: must be at least 2",
                 c.data.sequence_length);
  require_config(c.train.steps >= 1, "train.steps = {}: must be at least 1", c.train.steps);
  require_config(c.train.max_minutes >= 0.0, "train.max_minutes = {}: must not be negative",
                 c.train.max_minutes);
  require_threads(c.train.threads, "train.threads");
  model::parse_dtype(c.train.dtype, "train.dtype");
  optim::validate(c.optimizer, "optimizer");
  optim::validate(c.schedule, c.train.steps, "schedule");
  require_config(c.checkpoint.every_steps >= 0, "checkpoint.every_steps = {}: must not be negative",
                 c.checkpoint.every_steps);
  require_config(c.checkpoint.keep_last >= 0, "checkpoint.keep_last = {}: must not be negative",
                 c.checkpoint.keep_last);
  require_config(c.validation.every_steps >= 0, "validation.every_steps = {}: must not be negative",
                 c.validation.every_steps);
  require_config(c.validation.sequences >= 1, "validation.sequences = {}: must be at least 1",
                 c.validation.sequences);
  require_config(c.logging.sample_tokens >= 1, "logging.sample_tokens = {}: must be at least 1",
                 c.logging.sample_tokens);
  require_config(c.data.sequence_length <= c.model.max_positions,
                 "data.sequence_length = {}: more than model.max_positions = {}", c.data.sequence_length,
                 c.model.max_positions);
  validate_capacity(c);
  validate_batch(c);
  parallel::validate(c.parallel);
  if (!c.planner.cluster.empty()) plan::load_cluster(c.planner.cluster, "planner.cluster =");
}

}  // namespace

void validate_batch(const RunConfig& c) {
  const BatchOptions& b = c.batch;
  require_config(b.global_batch >= 1, "batch.global_batch = {}: must be at least 1", b.global_batch);
  require_config(b.micro_sequences >= 1 && b.micro_sequences <= b.global_batch,
                 "batch.micro_sequences = {}: must lie between 1 and batch.global_batch = {}",
                 b.micro_sequences, b.global_batch);
  // 2^32: a thousand times the largest steps that were ever published.
  constexpr std::int64_t kMaxStepTokens = std::int64_t{1} << 32;
  require_config(
      b.global_batch <= kMaxStepTokens / c.data.sequence_length,
      "batch.global_batch = {}: with data.sequence_length = {} a step would have more than {} tokens",
      b.global_batch, c.data.sequence_length, kMaxStepTokens);
  const std::int64_t group = c.model.moe.capacity.group_sequences;
  const bool grouped = moe::tokens_interact_in_groups(c.model.moe, /*training=*/true);
  require_config(!grouped || group >= 1, "model.moe.capacity.group_sequences = {}: must be at least 1",
                 group);
  require_config(!grouped || (b.micro_sequences % group == 0 && b.global_batch % group == 0),
                 "model.moe.capacity.group_sequences = {}: must divide batch.micro_sequences = {} and "
                 "batch.global_batch = {}",
                 group, b.micro_sequences, b.global_batch);
}

RunConfig read_run_config(const fs::path& file, const std::vector<std::string>& overrides) {
  Json json = parse_toml(read_file(file), file.string());
  for (const std::string& text : overrides) apply_override(json, text);
  require_config(json.contains("model") && json["model"].is_object(), "{}: needs a [model] table",
                 file.string());
  const Json model_section = json["model"];
  json.erase("model");
  Sections sections;
  read_fields(json, "", sections);
  RunConfig config = std::move(sections.config);
  resolve_model(model_section, config);
  validate(config);
  return config;
}

std::vector<FieldDoc> document_run_config() {
  std::vector<FieldDoc> docs = document_fields<Sections>();
  docs.push_back({"model", "", "the model: inline keys, or config, or init"});
  for (auto&& part :
       {document_fields<ModelSourceKeys>("model"), document_fields<model::ModelConfig>("model")}) {
    docs.insert(docs.end(), part.begin(), part.end());
  }
  return docs;
}

RunConfig with_tokens_of(const data::Dataset& dataset, RunConfig config) {
  if (config.model.vocab_size == 0) config.model.vocab_size = dataset.index().vocab_size;
  model::validate(config.model, /*training=*/true);
  check_vocabulary(dataset, config.model);
  if (config.model_source.init.empty() && dataset.has_tokenizer()) {
    const auto tokenizer = data::Tokenizer::load(dataset.tokenizer_file());
    const auto or_null = [](std::int64_t id) { return id >= 0 ? Json(id) : Json(); };
    config.model.source["bos_token_id"] = or_null(tokenizer.bos_id());
    config.model.source["eos_token_id"] = or_null(tokenizer.eos_id());
  }
  return config;
}

ValidationShape validation_shape(const RunConfig& config) {
  return {.sequence_length = config.data.sequence_length,
          .max_sequences = config.validation.sequences,
          .mask_documents = config.data.mask_documents};
}

Json run_config_json(const RunConfig& config, const data::Dataset& dataset) {
  Json json = write_fields(Sections{config});
  json["model"] = write_fields(config.model);
  json["model"]["init"] = config.model_source.init;
  json["model"]["freeze"] = config.model_source.freeze;
  const std::string index = write_fields(dataset.index()).dump();
  json["data"]["checksum"] = checksum(std::as_bytes(std::span(index)));
  return json;
}

std::string first_difference(const Json& ours, const Json& theirs, const std::string& path) {
  if (ours == theirs) return "";
  if (!ours.is_object() || !theirs.is_object())
    return fmt::format("{} = {}, not {}", path, ours.dump(), theirs.dump());
  Json keys = ours;
  keys.update(theirs);
  for (const auto& [key, unused] : keys.items()) {
    const std::string difference = first_difference(ours.value(key, Json()), theirs.value(key, Json()),
                                                    path.empty() ? key : path + "." + key);
    if (!difference.empty()) return difference;
  }
  return fmt::format("{}: a key is null and missing in the other", path);
}

}  // namespace collegium::train
