// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/layout.h"

#include <charconv>
#include <cmath>
#include <map>
#include <vector>

#include "collegium/base/error.h"

namespace collegium::plan {

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::size_t start = 0;
  while (start <= text.size()) {
    const std::size_t end = std::min(text.find(separator, start), text.size());
    if (end > start) parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

std::optional<std::string> bad_expert_axes(const ModelSpec& m, const Layout& l) {
  if (!m.is_moe()) {
    if (l.ep > 1 || l.etp > 1) return fmt::format("ep*etp = {}*{}: {} has no experts", l.ep, l.etp, m.name);
    return std::nullopt;
  }
  if (m.experts % l.ep != 0)
    return fmt::format("ep = {} must divide the number of experts = {}", l.ep, m.experts);
  if (m.expert_ffn % l.etp != 0)
    return fmt::format("etp = {} must divide the width of an expert = {}", l.etp, m.expert_ffn);
  const std::int64_t stage = std::int64_t{l.dp} * l.cp * l.tp;
  if (stage % (std::int64_t{l.ep} * l.etp) != 0)
    return fmt::format("ep*etp = {}*{} must divide dp*cp*tp = {}*{}*{} = {}", l.ep, l.etp, l.dp, l.cp, l.tp,
                       stage);
  return std::nullopt;
}

}  // namespace

void check_workload(const Workload& w, const std::string& prefix) {
  constexpr double kMost = 1e9;
  for (const auto& [name, value, what] :
       {std::tuple{"global-batch", w.global_batch, "sequences of an optimizer step"},
        std::tuple{"seq", w.seq_len, "positions of a sequence"}})
    require_config(value >= 1.0 && value <= kMost && value == std::floor(value),
                   "{}{} = {}: {}, a whole number from 1 to {}", prefix, name, value, what, kMost);
  require_config(std::isfinite(w.imbalance) && w.imbalance >= 1.0,
                 "{}imbalance = {}: the fullest rank has at least the mean, 1", prefix, w.imbalance);
}

double num_micro_batches(const Layout& layout, const Workload& work) {
  return std::ceil(work.global_batch / (static_cast<double>(layout.dp) * layout.micro_batch) - 1e-9);
}

std::optional<std::string> forbidden(const ModelSpec& m, const Layout& l, const Workload& w) {
  if (m.heads % l.tp != 0) return fmt::format("tp = {} must divide the number of heads = {}", l.tp, m.heads);
  if (l.tp > m.kv_heads && l.tp % m.kv_heads != 0)
    return fmt::format("tp = {} must be a multiple of the key/value heads = {} that it exceeds", l.tp,
                       m.kv_heads);
  if (l.tp <= m.kv_heads && m.kv_heads % l.tp != 0)
    return fmt::format("tp = {} must divide the number of key/value heads = {}", l.tp, m.kv_heads);
  if (m.dense_ffn % l.tp != 0)
    return fmt::format("tp = {} must divide the dense width = {}", l.tp, m.dense_ffn);
  if (m.shared_ffn % l.tp != 0)
    return fmt::format("tp = {} must divide the shared width = {}", l.tp, m.shared_ffn);
  const double pieces = 2.0 * l.cp;
  if (l.cp > 1 && std::fmod(w.seq_len, pieces) != 0.0)
    return fmt::format("2*cp = {} must divide the sequence length = {}", pieces, w.seq_len);
  const std::int64_t chunks = std::int64_t{l.pp} * l.virtual_stages;
  if (chunks > m.layers + 1)
    return fmt::format("pp*virtual stages = {}*{} = {} exceeds the {} layers", l.pp, l.virtual_stages, chunks,
                       m.layers);
  if (l.virtual_stages > 1 && l.pp < 2)
    return fmt::format("virtual stages = {}: need pp of at least 2", l.virtual_stages);
  if (l.virtual_stages > 1 && l.schedule != Schedule::kInterleaved && l.schedule != Schedule::k1F1B)
    return fmt::format("virtual stages = {}: only the interleaved schedule has them, {} has not",
                       l.virtual_stages, enum_name(l.schedule));
  if (auto reason = bad_expert_axes(m, l)) return reason;
  const double per_step = static_cast<double>(l.dp) * l.micro_batch;
  if (std::fmod(w.global_batch, per_step) != 0.0)
    return fmt::format("dp*micro batch = {}*{} = {} must divide the global batch = {}", l.dp, l.micro_batch,
                       per_step, w.global_batch);
  const double micro = num_micro_batches(l, w);
  if (l.virtual_stages > 1 && std::fmod(micro, l.pp) != 0.0)
    return fmt::format("interleaving: pp = {} must divide the {} micro-batches", l.pp, micro);
  if (l.schedule == Schedule::kDualPipe && (l.pp % 2 != 0 || std::fmod(micro, 2.0) != 0.0))
    return fmt::format("dualpipe: pp = {} and micro-batches = {} must be even", l.pp, micro);
  return std::nullopt;
}

std::string recompute_name(const Recompute& r) {
  if (r.full) return "full";
  std::string name;
  const std::pair<bool, const char*> parts[] = {
      {r.attention_core, "core_attn"}, {r.norms, "norms"},   {r.latent_up, "mla_up"},
      {r.activation, "moe_act"},       {r.dense_ffn, "mlp"}, {r.moe, "moe"},
      {r.operators, "operators"}};
  for (const auto& [set, text] : parts) {
    if (!set) continue;
    if (!name.empty()) name.push_back('+');
    name.append(text);
  }
  return name.empty() ? "none" : name;
}

Recompute parse_recompute(const std::string& text) {
  Recompute r;
  if (text.empty() || text == "none") return r;
  const std::size_t colon = text.find(':');
  const std::string parts = colon == std::string::npos ? text : text.substr(colon + 1);
  for (std::string part : split(parts, '+')) {
    std::erase_if(part, [](char c) { return c == '(' || c == ')'; });
    if (part == "full") {
      r.full = true;
    } else if (part == "core_attn" || part == "selective") {
      r.attention_core = true;
    } else if (part == "norms" || part == "layernorm" || part == "rmsnorm") {
      r.norms = true;
    } else if (part == "mla_up_proj" || part == "mla_up") {
      r.latent_up = true;
    } else if (part == "moe_act" || part == "swiglu") {
      r.activation = true;
    } else if (part == "mlp") {
      r.dense_ffn = true;
    } else if (part == "moe") {
      r.moe = true;
    } else if (part == "operators") {
      r.operators = true;
    } else if (part != "SP" && part != "none") {
      throw ConfigError(
          fmt::format("recompute = {}: part {} is not one of full, core_attn, norms, mla_up, moe_act, "
                      "mlp, moe, operators",
                      text, part));
    }
  }
  return r;
}

std::string layout_name(const Layout& l) {
  return fmt::format("tp{}.cp{}.pp{}.vp{}.dp{}.ep{}.etp{}.zero{}.mb{}.{}.{}.{}", l.tp, l.cp, l.pp,
                     l.virtual_stages, l.dp, l.ep, l.etp, static_cast<int>(l.zero), l.micro_batch,
                     recompute_name(l.recompute), enum_name(l.dispatcher), enum_name(l.schedule));
}

namespace {

// A part such as "pp4": the number behind the key, when the key is this part's.
std::optional<int> number_after(const std::string& part, std::string_view key) {
  if (part.size() <= key.size() || part.compare(0, key.size(), key) != 0) return std::nullopt;
  int value = 0;
  const char* end = part.data() + part.size();
  const auto [at, error] = std::from_chars(part.data() + key.size(), end, value);
  if (error != std::errc() || at != end) return std::nullopt;
  require_config(value >= 1 || key == "zero", "layout part {}: must be at least 1", part);
  return value;
}

template <NamedEnum E>
bool read_name(const std::string& part, E& value) {
  for (const auto& [name, candidate] : EnumNames<E>::names) {
    if (name == part) {
      value = candidate;
      return true;
    }
  }
  return false;
}

std::string_view read_number(const std::string& part, Layout& l) {
  // Longer keys first: "etp" ends in "tp".
  const std::pair<std::string_view, int*> keys[] = {
      {"etp", &l.etp},           {"ep", &l.ep}, {"tp", &l.tp},         {"cp", &l.cp}, {"pp", &l.pp},
      {"vp", &l.virtual_stages}, {"dp", &l.dp}, {"mb", &l.micro_batch}};
  for (const auto& [key, target] : keys) {
    if (const auto value = number_after(part, key)) {
      *target = *value;
      return key;
    }
  }
  if (const auto value = number_after(part, "zero")) {
    require_config(*value >= 0 && *value <= 3, "layout part {}: ZeRO stages are 0 to 3", part);
    l.zero = static_cast<Zero>(*value);
    return "zero";
  }
  return {};
}

// Puts what a part says into `l`. Returns what it is about.
std::string_view read_part(const std::string& part, Layout& l) {
  if (const std::string_view key = read_number(part, l); !key.empty()) return key;
  if (read_name(part, l.dispatcher)) return "dispatcher";
  if (read_name(part, l.schedule)) return "schedule";
  try {
    l.recompute = parse_recompute(part);
  } catch (const ConfigError&) {
    throw ConfigError(
        fmt::format("layout part {}: write parts such as tp2.pp4.dp8.ep8.zero1.mb1.full.a2a.1f1b", part));
  }
  return "recompute";
}

// Beyond these no count of ranks or chunks would fit its type.
void check_size(const Layout& l, const std::string& text) {
  const double ranks = static_cast<double>(l.tp) * l.cp * l.pp * l.dp;
  require_config(ranks <= kMostAccelerators,
                 "layout {}: tp*cp*pp*dp = {}*{}*{}*{} = {:.0f} ranks: at most {}", text, l.tp, l.cp, l.pp,
                 l.dp, ranks, kMostAccelerators);
}

}  // namespace

Layout parse_layout(const std::string& text) {
  Layout l;
  std::map<std::string_view, std::string> read;
  for (const std::string& part : split(text, '.')) {
    const auto [former, is_first] = read.emplace(read_part(part, l), part);
    require_config(is_first, "layout {}: both {} and {} say its {}", text, former->second, part,
                   former->first);
  }
  check_size(l, text);
  // With virtual stages 1F1B is the interleaved schedule.
  if (l.virtual_stages > 1 && l.schedule == Schedule::k1F1B) l.schedule = Schedule::kInterleaved;
  return l;
}

}  // namespace collegium::plan
