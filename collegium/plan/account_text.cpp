// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/plan/account.h"

namespace collegium::plan {

namespace {

std::string billions(std::int64_t value) {
  return fmt::format("{:.2f} B", static_cast<double>(value) * 1e-9);
}

std::string in_giga_flop(double flops) { return fmt::format("{:.4g} GFLOP", flops * 1e-9); }

// Why figures in circulation differ from the exact ones: what they leave out, computed for this model.
std::string quoted_figures(const ModelSpec& m, const Account& a) {
  if (!m.is_moe()) return "";
  const std::int64_t embedding = m.vocab * m.hidden;
  const std::int64_t tenths = a.active / 100'000'000;
  std::string text = "Why other figures are quoted for this model:\n";
  text += fmt::format("  {:>9}  active, exact; {:.1f} B rounded, {:.1f} B truncated after one digit\n",
                      billions(a.active), static_cast<double>(a.active) * 1e-9,
                      static_cast<double>(tenths) / 10.0);
  text += fmt::format("  {:>9}  active without the input embedding, of which a token reads one row\n",
                      billions(a.active_without_embedding));
  std::int64_t norms = 0;
  std::int64_t routers = 0;
  for (const AccountLine& line : a.lines) {
    if (line.component == "norms") norms = line.total;
    if (line.component == "routers") routers = line.total;
  }
  const std::int64_t router_of_one_layer = routers / m.num_moe_layers();
  text += fmt::format(
      "  {:>17}  total when the router is counted once instead of in each of {} layers and norms are "
      "left out (exact: {})\n",
      format_integer(a.total - routers + router_of_one_layer - norms), m.num_moe_layers(),
      format_integer(a.total));
  if (!m.tied_embeddings)
    text +=
        fmt::format("  {:>17}  parameters each of embedding and head; some figures count one of the two\n",
                    format_integer(embedding));
  const std::int64_t naive = m.experts * a.active;
  text += fmt::format("  {:>9}  \"{} x active\" would be wrong: everything but the experts is shared\n",
                      billions(naive), m.experts);
  return text;
}

}  // namespace

std::string format_integer(std::int64_t value) {
  const std::string digits = fmt::format("{}", value < 0 ? -value : value);
  std::string text = value < 0 ? "-" : "";
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text.push_back(',');
    text.push_back(digits[i]);
  }
  return text;
}

std::string format_account(const ModelSpec& m, const Account& a, double seq_len) {
  std::string text = fmt::format("{} ({}): parameters\n  {:<16}{:>20}{:>20}   formula\n", m.name, m.family,
                                 "component", "total", "active per token");
  for (const AccountLine& line : a.lines)
    text += fmt::format("  {:<16}{:>20}{:>20}   {}\n", line.component, format_integer(line.total),
                        format_integer(line.active), line.formula);
  text += fmt::format("  {:<16}{:>20}{:>20}   {} total, {} active; {} without the input embedding\n", "sum",
                      format_integer(a.total), format_integer(a.active), billions(a.total),
                      billions(a.active), format_integer(a.active_without_embedding));
  text += fmt::format("  {:<16}{:>20}{:>20}   every token passes through these\n", "shared",
                      format_integer(a.shared), format_integer(a.shared));
  if (a.selection_bias > 0)
    text += fmt::format("  {:<16}{:>20}{:>20}   a buffer, not in the sum\n", "selection bias",
                        format_integer(a.selection_bias), "");
  if (a.mtp > 0)
    text += fmt::format("  {:<16}{:>20}{:>20}   multi-token prediction, not in the sum\n", "MTP layers",
                        format_integer(a.mtp), "");
  const LayerWeights last = layer_weights(m, m.layers - 1);
  text += fmt::format("One layer (the last): {} parameters: attention {}", format_integer(last.total()),
                      format_integer(last.attention()));
  if (last.experts > 0)
    text += fmt::format(", router {}, {} experts of {}", format_integer(last.router), last.experts,
                        format_integer(last.expert));
  if (last.dense() > 0) text += fmt::format(", dense or shared network {}", format_integer(last.dense()));
  text += fmt::format(", norms {}\n", format_integer(last.norms));
  const TokenFlops f = forward_flops_per_token(m, seq_len);
  text += fmt::format(
      "FLOPs of a token at {} positions, forward (causal mask halves the scores):\n  projections {}, scores "
      "{}, "
      "dense {}, experts {}, routers {}, head {}{}; sum {}; training {} (x3)\n",
      seq_len, in_giga_flop(f.attention_projections), in_giga_flop(f.attention_scores),
      in_giga_flop(f.dense_ffn), in_giga_flop(f.experts), in_giga_flop(f.router), in_giga_flop(f.head),
      f.mtp > 0.0 ? ", multi-token prediction " + in_giga_flop(f.mtp) : "", in_giga_flop(f.total()),
      in_giga_flop(3.0 * f.total()));
  text += fmt::format("A token's hidden vector: {} x 2 bytes = {} in bfloat16\n", m.hidden,
                      format_bytes(2.0 * static_cast<double>(m.hidden)));
  return text + quoted_figures(m, a);
}

Json account_json(const ModelSpec& m, const Account& a, double seq_len) {
  Json lines = Json::array();
  for (const AccountLine& line : a.lines)
    lines.push_back({{"component", line.component},
                     {"formula", line.formula},
                     {"total", line.total},
                     {"active", line.active}});
  const TokenFlops f = forward_flops_per_token(m, seq_len);
  return {{"model", m.name},
          {"family", m.family},
          {"components", lines},
          {"total", a.total},
          {"active", a.active},
          {"active_without_input_embedding", a.active_without_embedding},
          {"shared", a.shared},
          {"routed_experts", a.routed},
          {"selection_bias", a.selection_bias},
          {"mtp", a.mtp},
          {"seq_len", seq_len},
          {"forward_flops_per_token", f.total()},
          {"forward_flops_per_token_without_mtp", f.total() - f.mtp},
          {"training_flops_per_token", 3.0 * f.total()},
          {"token_bytes_bf16", 2 * m.hidden}};
}

}  // namespace collegium::plan
