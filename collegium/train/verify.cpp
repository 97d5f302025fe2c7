// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/verify.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"
#include "collegium/data/dataset.h"
#include "collegium/model/tensor_io.h"
#include "collegium/train/machine_folder.h"
#include "collegium/train/verify_cases.h"

namespace collegium::train {

namespace {

namespace fs = std::filesystem;

std::vector<int> nodes_of(const comm::Communicator& world) {
  std::vector<int> nodes;
  nodes.reserve(static_cast<std::size_t>(world.size()));
  for (int rank = 0; rank < world.size(); ++rank) nodes.push_back(world.node(rank));
  return nodes;
}

class Verification {
 public:
  Verification(const VerifyRequest& request, const std::shared_ptr<comm::Communicator>& world)
      : request_(request), world_(world), folder_(world, "collegium-verify", write_verification_corpus) {}

  bool run() {
    RunConfig config = request_.config.value_or(verification_run(folder_.path()));
    const std::vector<int> nodes = nodes_of(*world_);
    const std::vector<Layout> layouts = list_layouts(nodes, config.model.moe.num_experts);
    const std::string own_dtype = request_.config ? config.train.dtype : "bfloat16";
    config.train.dtype = "float64";
    steps_ = request_.steps;
    run_layouts("layouts", config, layouts, kExactBound);
    if (!request_.config) run_options(layouts);
    if (own_dtype != "float64") {
      config.train.dtype = own_dtype;
      steps_ = 1;  // the first update already differs: see weights_within_reach()
      const at::ScalarType dtype = model::parse_dtype(own_dtype, "train.dtype");
      const double bound = low_precision_bound(dtype, config.model.num_layers);
      run_layouts(own_dtype, config, layouts, bound, /*replay=*/true);
    }
    const at::Tensor failures = at::scalar_tensor(num_failed_, at::kLong);
    world_->broadcast(failures, 0).wait();
    return failures.item<std::int64_t>() == 0;
  }

 private:
  // On rank 0; the others wait for it at their next collective.
  Snapshot reference(const RunConfig& config, const fs::path& record) const {
    if (world_->rank() != 0) return {};
    RunConfig alone = with_layout(config, {});
    return take_snapshot(alone, comm::single_rank_world(), steps_, {.record = record, .replay = {}});
  }

  // The same step in float64, where the experts are those that low precision chose.
  LeastNorms rounding_of(const Snapshot& expected, RunConfig config, const fs::path& routing,
                         double bound) const {
    if (world_->rank() != 0) return {};
    config = with_layout(config, {});
    config.train.dtype = "float64";
    const RoutingFiles files{.record = {}, .replay = routing};
    return least_norms_of(expected, take_snapshot(config, comm::single_rank_world(), steps_, files), bound);
  }

  void run_layouts(const std::string& section, const RunConfig& config, const std::vector<Layout>& layouts,
                   double bound, bool replay = false) {
    constexpr const char* kRouting = "routing";
    const fs::path routing = replay ? folder_.path() / kRouting : fs::path();
    Snapshot expected = reference(config, routing);
    if (replay) expected.least_norms = rounding_of(expected, config, routing, bound);
    replay ? folder_.share(kRouting) : world_->barrier();
    for (std::size_t i = 0; i < layouts.size(); ++i) {
      // The last layout of every ep is run twice.
      const bool rerun = i + 1 == layouts.size() || layouts[i + 1].ep != layouts[i].ep;
      const RunConfig laid_out = with_layout(config, layouts[i]);
      compare_one(section, layouts[i].name(), laid_out, expected, bound, routing, rerun);
    }
  }

  void run_options(const std::vector<Layout>& layouts) {
    // Copies of all experts, and the widest expert parallelism with every dispatcher, all overlapped.
    std::vector<Layout> chosen;
    for (const Layout& layout : layouts) {
      if (layout.overlap && (layout.ep == 1 || layout.ep == layouts.back().ep)) chosen.push_back(layout);
    }
    for (const OptionCase& option : pairwise_cases(folder_.path(), chosen)) {
      const Snapshot expected = reference(option.config, {});
      world_->barrier();
      compare_one("options", option.name, option.config, expected, kExactBound, {}, /*rerun=*/false);
    }
  }

  void compare_one(const std::string& section, const std::string& name, const RunConfig& config,
                   const Snapshot& expected, double bound, const fs::path& routing, bool rerun) {
    const RoutingFiles files{.record = {}, .replay = routing};
    const Snapshot ours = take_snapshot(config, world_, steps_, files);
    std::optional<Snapshot> again;
    if (rerun) again = take_snapshot(config, world_, steps_, files);
    if (world_->rank() != 0) return;
    VerifyRow row{.section = section,
                  .layout = name,
                  .difference = compare(ours, expected),
                  .bound = bound,
                  .ranks_agree = ours.ranks_agree,
                  .rerun_identical = !again || bit_identical(ours, *again)};
    const bool exact = config.train.dtype == "float64";
    const bool parameters =
        exact ? row.difference.parameter <= bound : weights_within_reach(config, ours, expected);
    row.passed = row.difference.loss <= bound && row.difference.gradient <= bound &&
                 row.difference.norm <= bound && parameters && row.ranks_agree && row.rerun_identical;
    if (!row.passed) ++num_failed_;
    if (request_.on_row) request_.on_row(row);
  }

  // In low precision a tiny gradient may have either sign, and Adam's first steps are as long as the rate,
  // whatever the gradient's size: two runs stay within twice the sum of rates in every element.
  bool weights_within_reach(const RunConfig& config, const Snapshot& ours, const Snapshot& expected) const {
    const double reach = 2.0 * config.optimizer.learning_rate * static_cast<double>(steps_) *
                         (1.0 + config.optimizer.weight_decay);
    for (const auto& [name, tensor] : expected.parameters) {
      const double largest = (ours.parameters.at(name) - tensor).abs().max().item<double>();
      if (!(largest <= reach)) return false;
    }
    return true;
  }

  const VerifyRequest& request_;
  std::shared_ptr<comm::Communicator> world_;
  MachineFolder folder_;
  std::int64_t steps_ = 0;  ///< of the comparison under way
  std::int64_t num_failed_ = 0;
};

}  // namespace

Json row_json(const VerifyRow& row) {
  return {{"section", row.section},
          {"layout", row.layout},
          {"loss", row.difference.loss},
          {"gradient", row.difference.gradient},
          {"worst_gradient", row.difference.worst_gradient},
          {"parameter", row.difference.parameter},
          {"worst_parameter", row.difference.worst_parameter},
          {"norm", row.difference.norm},
          {"bound", row.bound},
          {"ranks_agree", row.ranks_agree},
          {"rerun_identical", row.rerun_identical},
          {"passed", row.passed}};
}

double low_precision_bound(at::ScalarType dtype, std::int64_t num_layers) {
  const double epsilon = dtype == at::kBFloat16 ? std::ldexp(1.0, -8) : std::ldexp(1.0, -24);
  constexpr double kPerLayer = 30.0;
  constexpr double kHead = 4.0;
  return 4.0 * epsilon * std::sqrt(kPerLayer * static_cast<double>(num_layers) + kHead);
}

bool verify(const VerifyRequest& request, const std::shared_ptr<comm::Communicator>& world) {
  return Verification(request, world).run();
}

}  // namespace collegium::train
