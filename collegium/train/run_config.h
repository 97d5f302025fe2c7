// SPDX-License-Identifier: Apache-2.0
#pragma once

// The run file: what `collegium train RUN.toml` does, every key documented where it is declared.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/data/dataset.h"
#include "collegium/model/config.h"
#include "collegium/optim/adamw.h"
#include "collegium/optim/schedule.h"
#include "collegium/parallel/options.h"
#include "collegium/train/validation.h"

namespace collegium::train {

struct DataOptions {
  std::string path;
  std::int64_t sequence_length = 512;
  bool mask_documents = false;
  bool any_tokenizer = false;
};
template <class Fields>
void describe(Fields& fields, DataOptions& o) {
  fields("path", o.path, "folder made by 'collegium prepare', relative to the working directory");
  fields("sequence_length", o.sequence_length, "tokens per sequence (S)");
  fields("mask_documents", o.mask_documents, "attention stays within a document");
  fields("any_tokenizer", o.any_tokenizer,
         "accept tokens that another tokenizer made than that of model.init");
}

struct ModelOptions {
  std::string config;
  std::string init;
  std::vector<std::string> freeze;
  Json inline_keys = Json::object();  ///< everything else of [model]: keys of ModelConfig
};

struct BatchOptions {
  std::int64_t global_batch = 8;
  std::int64_t micro_sequences = 8;
};
template <class Fields>
void describe(Fields& fields, BatchOptions& o) {
  fields("global_batch", o.global_batch, "sequences of an optimizer step");
  fields("micro_sequences", o.micro_sequences,
         "sequences of a micro-step, over all ranks; gradients accumulate over micro-steps");
}

struct LoopOptions {
  std::int64_t steps = 100;
  double max_minutes = 0.0;
  std::string dtype = "bfloat16";
  std::uint64_t seed = 1;
  bool recompute = false;
  std::int64_t threads = 0;
};
template <class Fields>
void describe(Fields& fields, LoopOptions& o) {
  fields("steps", o.steps, "optimizer steps of the whole run");
  fields("max_minutes", o.max_minutes,
         "end after this time as after the last step (the learning rate follows the steps, not the time); 0 "
         "= no "
         "limit");
  fields("dtype", o.dtype, "compute dtype: bfloat16 (fp32 masters), float32 or float64");
  fields("seed", o.seed, "of weights, noise and data order");
  fields("recompute", o.recompute, "recompute every block's activations in the backward pass");
  fields("threads", o.threads, "OpenMP threads of a rank; 0 = OMP_NUM_THREADS, else its share of the cores");
}

struct CheckpointOptions {
  std::int64_t every_steps = 0;
  std::int64_t keep_last = 2;
};
template <class Fields>
void describe(Fields& fields, CheckpointOptions& o) {
  fields("every_steps", o.every_steps,
         "write a checkpoint every this many steps, and at the end; 0 = at the end only");
  fields("keep_last", o.keep_last, "older checkpoints than this many are removed; 0 = keep all");
}

struct ValidationOptions {
  std::int64_t every_steps = 0;
  std::int64_t sequences = 64;
};
template <class Fields>
void describe(Fields& fields, ValidationOptions& o) {
  fields("every_steps", o.every_steps, "validate every this many steps, and at the end; 0 = at the end only");
  fields("sequences", o.sequences, "at most this many sequences, spread evenly over the validation split");
}

struct LoggingOptions {
  std::string sample_prompt;
  std::int64_t sample_tokens = 96;
};
template <class Fields>
void describe(Fields& fields, LoggingOptions& o) {
  fields("sample_prompt", o.sample_prompt, "text that the trained model continues at the end; empty = none");
  fields("sample_tokens", o.sample_tokens, "length of that sample");
}

struct PlannerOptions {
  std::string cluster;
};
template <class Fields>
void describe(Fields& fields, PlannerOptions& o) {
  fields(
      "cluster", o.cluster,
      "cluster, by name or as a file of 'bench cluster --write', whose predicted step time is set beside the "
      "measured one (not in float64); empty = bytes and memory only");
}

struct RunConfig {
  std::string run_folder;
  DataOptions data;
  ModelOptions model_source;
  model::ModelConfig model;  ///< resolved from model_source
  optim::AdamWOptions optimizer;
  optim::ScheduleOptions schedule;
  BatchOptions batch;
  LoopOptions train;
  CheckpointOptions checkpoint;
  ValidationOptions validation;
  LoggingOptions logging;
  parallel::ParallelOptions parallel;
  PlannerOptions planner;
};

/// What     Reads a TOML file, applies `--set a.b=value` overrides, resolves the model and checks every
///          rule, before anything is allocated or written.
/// Throws   ConfigError: TOML syntax (file:line:column), unknown keys (with the nearest), and every rule
///          (field, value, rule).
RunConfig read_run_config(const std::filesystem::path& file, const std::vector<std::string>& overrides);

/// What     Checks what a step and its micro-steps are made of.
/// Throws   ConfigError (field, value, rule).
void validate_batch(const RunConfig& config);

/// Path, default and documentation of every key, in the order of the file.
std::vector<FieldDoc> document_run_config();

/// What     The run with what it takes from its data: the vocabulary's size, where the run file gives none,
///          and the tokens that begin and end a new model's texts (one that starts from another has its own).
/// Throws   ConfigError: more tokens than the model has, or a model that cannot be trained.
RunConfig with_tokens_of(const data::Dataset& dataset, RunConfig config);

/// What     What the run's validation looks at.
ValidationShape validation_shape(const RunConfig& config);

/// What     The whole configuration as JSON, every key present, with a checksum of the data's description,
///          which has those of its tokens and tokenizer: what a checkpoint keeps and a resumed run is
///          compared with.
Json run_config_json(const RunConfig& config, const data::Dataset& dataset);

/// What     The first key in which two configurations (run_config_json) differ, as "train.seed = 3, not 4";
///          empty when they are equal.
std::string first_difference(const Json& ours, const Json& theirs, const std::string& path = "");

}  // namespace collegium::train
