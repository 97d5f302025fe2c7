// SPDX-License-Identifier: Apache-2.0
#include <fmt/ranges.h>

#include <algorithm>

#include "collegium/mesh/mesh.h"
#include "collegium/plan/traffic.h"

namespace collegium::plan {

namespace {

using mesh::Axis;

constexpr int kMostNodesDrawn = 8;
constexpr std::size_t kMostMembers = 12;

std::string members(const std::vector<int>& ranks) {
  if (ranks.size() <= kMostMembers) return fmt::format("{}", fmt::join(ranks, " "));
  const std::vector<int> head(ranks.begin(), ranks.begin() + static_cast<std::ptrdiff_t>(kMostMembers) - 2);
  return fmt::format("{} ... {}", fmt::join(head, " "), ranks.back());
}

std::string draw_nodes(const mesh::Mesh& mesh, const Layout& l, const Cluster& c) {
  std::string text =
      fmt::format("Ranks on machines of {} ({}): pp.dp.cp.tp", c.node_size, c.accelerator.name);
  const bool experts = l.ep * l.etp > 1;
  if (experts) text += " / edp.ep.etp";
  text += '\n';
  const int nodes = (mesh.size() + c.node_size - 1) / c.node_size;
  for (int node = 0; node < std::min(nodes, kMostNodesDrawn); ++node) {
    text += fmt::format("  machine {:>3} |", node);
    for (int i = 0; i < c.node_size && node * c.node_size + i < mesh.size(); ++i) {
      const mesh::Coordinates at = mesh.coordinates(node * c.node_size + i);
      text += fmt::format(" {}.{}.{}.{}", at.pp, at.dp, at.cp, at.tp);
      if (experts) text += fmt::format("/{}.{}.{}", at.edp, at.ep, at.etp);
      text += " |";
    }
    text += '\n';
  }
  if (nodes > kMostNodesDrawn) text += fmt::format("  ... {} more machines\n", nodes - kMostNodesDrawn);
  return text;
}

std::string draw_groups(const mesh::Mesh& mesh) {
  std::string text = "Groups of rank 0\n";
  const auto add = [&](const char* name, std::initializer_list<Axis> axes, const char* use) {
    const std::vector<int> group = mesh.group(axes, 0);
    if (group.size() > 1)
      text += fmt::format("  {:<8}{:>6} ranks: {:<48} {}\n", name, group.size(), members(group), use);
  };
  add("tp", {Axis::kTp}, "share each layer's dense matrices");
  add("cp", {Axis::kCp}, "share each sequence");
  add("pp", {Axis::kPp}, "share the layers");
  add("dp, cp", {Axis::kDp, Axis::kCp}, "sum gradients of the dense part");
  add("etp", {Axis::kEtp}, "share each expert's matrices");
  add("ep", {Axis::kEp}, "share the experts: dispatch and combine");
  add("edp", {Axis::kEdp}, "sum gradients of experts");
  return text;
}

}  // namespace

std::string explain_layout(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c,
                           const Stack& s) {
  const mesh::Mesh mesh({.pp = l.pp, .dp = l.dp, .cp = l.cp, .tp = l.tp, .ep = l.ep, .etp = l.etp});
  std::string text =
      fmt::format("{} on {} x {}: {}\n", m.name, l.world(), c.accelerator.name, layout_name(l));
  text += draw_nodes(mesh, l, c);
  text += draw_groups(mesh);
  if (m.is_moe())
    text += fmt::format(
        "Experts {} to {} of every MoE layer live on rank 0; each expert has {} copies over {}\n", 0,
        m.experts / l.ep - 1, l.expert_replicas(), l.stage_copies() > 1 ? "edp and pp" : "edp");
  text += format_traffic(step_traffic(m, l, w, c, s));
  if (l.ep > 1) {
    text += "The expert exchange's share of the step, by how it is done (nothing hidden unless it says so)\n";
    for (const ExchangeShare& share : exchange_shares(m, l, w, c, s))
      text +=
          fmt::format("  {:<54}{:>6.1f} % of {:.4g} s\n", share.variant, 100.0 * share.share, share.step_s);
  }
  return text;
}

namespace {

constexpr double kPublishedShareLeast = 0.444;
constexpr double kPublishedShareMost = 0.684;

struct ModelShares {
  std::string kind;
  std::string model;
  std::int64_t top_k = 0;
  std::int64_t experts = 0;
  int ranks = 0;
  std::vector<ExchangeShare> variants;
};

std::vector<ModelShares> shares_of_models(const Cluster& cluster, double seq_len) {
  std::vector<ModelShares> all;
  for (const auto& [kind, name] :
       {std::pair{"coarse", "gpt-oss-20b"}, std::pair{"fine-grained", "deepseek-v2-lite"}}) {
    const ModelSpec model = load_model(name);
    for (const int ranks : {2, 32}) {
      const Layout layout = parse_layout(fmt::format("dp{}.ep{}", ranks, ranks));
      const Workload work{.seq_len = seq_len, .global_batch = static_cast<double>(ranks)};
      all.push_back({.kind = kind,
                     .model = name,
                     .top_k = model.top_k,
                     .experts = model.experts,
                     .ranks = ranks,
                     .variants = exchange_shares(model, layout, work, cluster, Stack{})});
    }
  }
  return all;
}

}  // namespace

std::string format_exchange_shares(const Cluster& cluster, double seq_len) {
  std::string text = fmt::format(
      "Expert exchange's share of the step on {} ({} per fast domain), one sequence of {} per rank, nothing "
      "hidden "
      "unless it says so\n",
      cluster.accelerator.name, cluster.fast_domain, seq_len);
  for (const ModelShares& m : shares_of_models(cluster, seq_len)) {
    text +=
        fmt::format("{} experts ({}, {} of {}), {} ranks\n", m.kind, m.model, m.top_k, m.experts, m.ranks);
    for (const ExchangeShare& share : m.variants)
      text +=
          fmt::format("  {:<54}{:>6.1f} % of {:.4g} s\n", share.variant, 100.0 * share.share, share.step_s);
  }
  return text + fmt::format("Published for 32 accelerators: {:.1f} to {:.1f} % of the iteration time\n",
                            100.0 * kPublishedShareLeast, 100.0 * kPublishedShareMost);
}

Json exchange_shares_json(const Cluster& cluster, double seq_len) {
  Json models = Json::array();
  for (const ModelShares& m : shares_of_models(cluster, seq_len)) {
    Json variants = Json::array();
    for (const ExchangeShare& share : m.variants)
      variants.push_back({{"variant", share.variant}, {"share", share.share}, {"step_s", share.step_s}});
    models.push_back({{"kind", m.kind},
                      {"model", m.model},
                      {"top_k", m.top_k},
                      {"experts", m.experts},
                      {"ranks", m.ranks},
                      {"variants", variants}});
  }
  return {{"cluster", cluster.name},
          {"sequence_length", seq_len},
          {"models", models},
          {"published_share_of_32", {kPublishedShareLeast, kPublishedShareMost}}};
}

}  // namespace collegium::plan
