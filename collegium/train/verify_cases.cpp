// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/verify_cases.h"

#include <algorithm>
#include <array>
#include <set>
#include <span>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/data/made_corpus.h"

namespace collegium::train {

namespace {

using moe::DispatcherKind;

constexpr std::int64_t kVocabulary = 24;

bool groups_have_even_nodes(const std::vector<int>& nodes, int ep) {
  const auto size = static_cast<std::size_t>(ep);
  for (std::size_t begin = 0; begin < nodes.size(); begin += size) {
    if (!moe::nodes_are_even(std::span(nodes).subspan(begin, size))) return false;
  }
  return true;
}

bool groups_have_one_node(const std::vector<int>& nodes, int ep) {
  for (std::size_t rank = 0; rank < nodes.size(); ++rank) {
    if (nodes[rank] != nodes[rank - rank % static_cast<std::size_t>(ep)]) return false;
  }
  return true;
}

using Row = std::vector<std::size_t>;
/// (option a, choice, option b, choice), a < b.
using Pair = std::array<std::size_t, 4>;

std::set<Pair> pairs_of(const Row& row) {
  std::set<Pair> pairs;
  for (std::size_t a = 0; a < row.size(); ++a) {
    for (std::size_t b = a + 1; b < row.size(); ++b) pairs.insert({a, row[a], b, row[b]});
  }
  return pairs;
}

/// An option of the pairwise cases: its choices change a run.
struct Option {
  struct Choice {
    std::string name;  ///< empty: not worth a word
    std::function<void(RunConfig&)> apply;
  };
  std::vector<Choice> choices;
};

Option layout_option(const std::vector<Layout>& layouts) {
  Option option;
  for (const Layout& layout : layouts) {
    option.choices.push_back(
        {layout.name(), [layout](RunConfig& c) { c = with_layout(std::move(c), layout); }});
  }
  return option;
}

Option noise_option() {
  Option option;
  for (const auto& [name, noise] : EnumNames<moe::Noise>::names) {
    option.choices.push_back({std::string(name), [noise](RunConfig& c) {
                                c.model.moe.router.noise = noise;
                                if (noise == moe::Noise::kNoisyTopK) c.model.moe.balance.load_cv2 = 0.02;
                              }});
  }
  return option;
}

Option selection_option() {
  const auto select = [](moe::Selection selection) {
    return [selection](RunConfig& c) {
      c.model.moe.router.selection = selection;
      c.model.moe.router.allow_non_causal = true;
    };
  };
  return {{{"top_k", select(moe::Selection::kTopK)},
           {"sinkhorn", select(moe::Selection::kSinkhorn)},
           {"expert_choice", select(moe::Selection::kExpertChoice)}}};
}

Option drop_option() {
  Option option;
  for (const auto& [name, policy] : EnumNames<moe::DropPolicy>::names) {
    option.choices.push_back({fmt::format("drop {}", name),
                              [policy](RunConfig& c) { c.model.moe.capacity.drop_policy = policy; }});
  }
  return option;
}

Option weight_option() {
  using moe::Renormalize;
  const auto weights = [](Renormalize renormalize, moe::ScoreFunction score, moe::ScoreOrder order) {
    return [=](RunConfig& c) {
      c.model.moe.router.renormalize = renormalize;
      c.model.moe.router.score = score;
      c.model.moe.router.order = order;
    };
  };
  constexpr auto kSoftmax = moe::ScoreFunction::kSoftmax;
  constexpr auto kSigmoid = moe::ScoreFunction::kSigmoid;
  constexpr auto kScoreFirst = moe::ScoreOrder::kScoreFirst;
  constexpr auto kSelectFirst = moe::ScoreOrder::kSelectFirst;
  return {{{"raw softmax", weights(Renormalize::kNever, kSoftmax, kScoreFirst)},
           {"renormalised", weights(Renormalize::kBeforeDrop, kSoftmax, kScoreFirst)},
           {"renormalised after drop", weights(Renormalize::kAfterDrop, kSoftmax, kScoreFirst)},
           {"select first", weights(Renormalize::kNever, kSoftmax, kSelectFirst)},
           {"sigmoid", weights(Renormalize::kBeforeDrop, kSigmoid, kScoreFirst)}}};
}

Option shared_option() {
  Option option;
  for (const auto& [name, kind] : EnumNames<moe::SharedExpert>::names) {
    option.choices.push_back({fmt::format("shared {}", name), [kind](RunConfig& c) {
                                c.model.moe.shared_expert.kind = kind;
                                if (kind == moe::SharedExpert::kNone) c.model.moe.shared_expert.ffn_size = 0;
                              }});
  }
  return option;
}

Option loss_option() {
  const auto losses = [](moe::BalanceOptions balance) {
    return [balance](RunConfig& c) {
      const double load_cv2 = c.model.moe.balance.load_cv2;
      c.model.moe.balance = balance;
      c.model.moe.balance.load_cv2 = load_cv2;
    };
  };
  return {{{"no loss", losses({})},
           {"load_balance per sequence",
            losses({.load_balance = 0.05, .load_balance_scope = moe::LossScope::kSequence, .gshard = 0.5})},
           {"load_balance per batch", losses({.load_balance = 0.05, .switch_top1 = 0.03})},
           {"importance", losses({.importance_cv2 = 0.05, .z_loss = 0.01})},
           {"pooled", losses({.importance_cv2 = 0.05,
                              .importance_of = moe::ImportanceOf::kProbabilities,
                              .hf_pooled = 0.05})}}};
}

Option loop_option() {
  return {{{"", [](RunConfig&) {}},
           {"recomputed", [](RunConfig& c) { c.train.recompute = true; }},
           {"bias balancing", [](RunConfig& c) { c.model.moe.router.bias_balancing = true; }},
           {"documents masked", [](RunConfig& c) { c.data.mask_documents = true; }},
           {"groups of two", [](RunConfig& c) {
              c.model.moe.capacity.group_sequences = 2;
              c.batch.micro_sequences = 4;
              c.batch.global_batch = 10;
            }}}};
}

OptionCase make_case(const std::filesystem::path& folder, const std::vector<Option>& options,
                     const Row& row) {
  OptionCase made{.name = {}, .config = verification_run(folder)};
  made.config.model.moe.router.noise = moe::Noise::kNone;
  made.config.model.moe.router.bias_balancing = false;
  for (std::size_t i = 0; i < options.size(); ++i) {
    const Option::Choice& choice = options[i].choices[row[i]];
    choice.apply(made.config);
    if (choice.name.empty()) continue;
    made.name += (made.name.empty() ? "" : "; ") + choice.name;
  }
  moe::MoeOptions& moe = made.config.model.moe;
  if (!moe::chooses_largest_logits(moe)) moe.balance.load_cv2 = 0.0;
  return made;
}

}  // namespace

std::string Layout::name() const {
  if (ep == 1) return overlap ? "ep 1, overlap" : "ep 1";
  return fmt::format("ep {}, {}{}", ep, enum_name(dispatcher), overlap ? ", overlap" : "");
}

std::vector<Layout> list_layouts(const std::vector<int>& nodes, std::int64_t num_experts) {
  std::vector<Layout> layouts;
  const auto num_ranks = static_cast<int>(nodes.size());
  for (int ep = 1; ep <= num_ranks && ep <= num_experts; ++ep) {
    if (num_ranks % ep != 0) continue;
    for (const auto& [name, kind] : EnumNames<DispatcherKind>::names) {
      if (ep == 1 && kind != DispatcherKind::kUneven) continue;  // nothing travels
      if (kind == DispatcherKind::kTwoLevel && !groups_have_even_nodes(nodes, ep)) continue;
      if (kind == DispatcherKind::kSharedMemory && !groups_have_one_node(nodes, ep)) continue;
      for (const bool overlap : {false, true})
        layouts.push_back({.ep = ep, .dispatcher = kind, .overlap = overlap});
    }
  }
  return layouts;
}

RunConfig with_layout(RunConfig config, const Layout& layout) {
  config.parallel.ep = layout.ep;
  config.parallel.dispatcher.kind = layout.dispatcher;
  config.parallel.overlap = {};
  config.parallel.overlap_gradients = layout.overlap;
  if (layout.overlap) {
    constexpr double kSmallBucketMib = 0.002;  // several buckets even in a small model
    config.parallel.overlap = {.chunks = 3, .shared_expert = true, .weight_gradients = true};
    config.parallel.bucket_mib = kSmallBucketMib;
  }
  return config;
}

void write_verification_corpus(const std::filesystem::path& folder) {
  data::prepare_made_corpus(folder, data::counting_domains(kVocabulary), kVocabulary, 0.1);
}

RunConfig verification_run(const std::filesystem::path& folder) {
  RunConfig c;
  c.run_folder = (folder / "run").string();
  c.data = {.path = (folder / "data").string(), .sequence_length = 9, .mask_documents = false};
  c.batch = {.global_batch = 7, .micro_sequences = 3};
  c.train.steps = 4;
  c.train.dtype = "float64";
  c.train.seed = 3;
  c.optimizer.learning_rate = 0.01;
  c.model.family = model::Family::kCollegium;
  c.model.hidden_size = 16;
  c.model.num_layers = 3;
  c.model.num_heads = 2;
  c.model.num_kv_heads = 1;
  c.model.dense_ffn_size = 20;
  c.model.max_positions = 64;
  c.model.qk_norm = model::QkNorm::kPerHead;
  c.model.moe_layers = {true, false, true};
  moe::MoeOptions& moe = c.model.moe;
  moe.num_experts = 11;
  moe.top_k = 2;
  moe.ffn_size = 8;
  moe.router.noise = moe::Noise::kJitterInput;
  moe.router.bias_balancing = true;
  moe.capacity = {
      .drop_policy = moe::DropPolicy::kPosition, .factor = "1.1", .min_capacity = 1, .group_sequences = 1};
  moe.shared_expert = {.kind = moe::SharedExpert::kGated, .ffn_size = 6};
  moe.balance = {.load_balance = 0.05,
                 .load_balance_scope = moe::LossScope::kSequence,
                 .gshard = 0.3,
                 .switch_top1 = 0.02,
                 .importance_cv2 = 0.03,
                 .hf_pooled = 0.02,
                 .z_loss = 0.01};
  model::complete(c.model);
  return c;
}

std::vector<std::vector<std::size_t>> pairwise_rows(const std::vector<std::size_t>& sizes,
                                                    const std::function<bool(const Row&)>& valid) {
  constexpr std::uint64_t kCandidates = 60;       // of which the best is taken
  constexpr std::uint64_t kFruitlessRounds = 20;  // after which what is left cannot be had
  std::vector<Row> rows;
  std::set<Pair> covered;
  std::uint64_t drawn = 0;
  const RandomStream random(1, "pairwise");
  for (std::uint64_t fruitless = 0; fruitless < kFruitlessRounds;) {
    Row best;
    std::size_t best_new = 0;
    for (std::uint64_t candidate = 0; candidate < kCandidates; ++candidate, ++drawn) {
      Row row;
      for (std::size_t i = 0; i < sizes.size(); ++i) row.push_back(random.bits(drawn, i) % sizes[i]);
      if (!valid(row)) continue;
      const std::set<Pair> pairs = pairs_of(row);
      const auto fresh = static_cast<std::size_t>(
          std::count_if(pairs.begin(), pairs.end(), [&](const Pair& p) { return !covered.contains(p); }));
      if (fresh <= best_new) continue;
      best_new = fresh;
      best = row;
    }
    if (best_new == 0) {
      ++fruitless;
      continue;
    }
    fruitless = 0;
    covered.merge(pairs_of(best));
    rows.push_back(std::move(best));
  }
  return rows;
}

std::vector<OptionCase> pairwise_cases(const std::filesystem::path& folder,
                                       const std::vector<Layout>& layouts) {
  const std::vector<Option> options = {layout_option(layouts), noise_option(),  selection_option(),
                                       drop_option(),          weight_option(), shared_option(),
                                       loss_option(),          loop_option()};
  std::vector<std::size_t> sizes;
  sizes.reserve(options.size());
  for (const Option& option : options) sizes.push_back(option.choices.size());
  const auto valid = [&](const Row& row) {
    try {
      const OptionCase made = make_case(folder, options, row);
      moe::validate(made.config.model.moe, "model.moe", /*causal=*/true, /*training=*/true);
      return true;
    } catch (const ConfigError&) {
      return false;  // options that may not stand together
    }
  };
  std::vector<OptionCase> cases;
  for (const Row& row : pairwise_rows(sizes, valid)) cases.push_back(make_case(folder, options, row));
  return cases;
}

}  // namespace collegium::train
