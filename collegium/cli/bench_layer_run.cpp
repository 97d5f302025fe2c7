// SPDX-License-Identifier: Apache-2.0
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "collegium/base/error.h"
#include "collegium/base/machine.h"
#include "collegium/base/units.h"
#include "collegium/cli/bench_floor.h"
#include "collegium/cli/bench_layer.h"
#include "collegium/cli/progress.h"
#include "collegium/model/tensor_io.h"
#include "collegium/moe/layer.h"
#include "collegium/parallel/groups.h"

namespace collegium::cli {

namespace {

constexpr std::int64_t kLayerWarmUps = 2;
constexpr std::int64_t kLeastLayerRuns = 3;

moe::MoeOptions moe_options(const LayerBenchOptions& o) {
  moe::MoeOptions moe;
  moe.num_experts = o.experts;
  moe.top_k = o.top_k;
  moe.ffn_size = o.ffn;
  // A renormalised single weight is 1, whatever the router says: it would get no gradient.
  if (o.top_k == 1) moe.router.renormalize = moe::Renormalize::kNever;
  if (o.routing == BenchRouting::kForced && o.skew == moe::Skew::kBalanced)
    moe.router.selection = moe::Selection::kForcedBalance;
  return moe;
}

// The routing of one run, of the whole expert-parallel group, and what follows from it.
struct RoutingFacts {
  std::vector<at::Tensor> ids_TK;          ///< of each rank
  std::vector<std::int64_t> row_counts_L;  ///< rows of this rank's experts
  std::int64_t rows = 0;                   ///< of this rank's experts
};

class LayerBench {
 public:
  LayerBench(const LayerBenchOptions& options, const std::shared_ptr<comm::Communicator>& world)
      : options_(options),
        world_(world),
        moe_(moe_options(options)),
        groups_(parallel::make_groups(world, options.parallel, moe_)),
        transport_(parallel::make_transport(groups_, options.parallel)),
        dtype_(model::parse_dtype(options.dtype, "--dtype")) {
    place_tokens();
    require_memory();
    make_tensors();
  }

  LayerBenchResult measure() {
    result_.ranks = world_->size();
    result_.ep = groups_.ep->size();
    result_.dispatcher = groups_.dispatcher;
    result_.threads_per_rank = at::get_num_threads();
    result_.gemm_peak_flops_per_s = gemm_peak_of_all_ranks(*world_, dtype_);
    const double once_s = warm_up();
    result_.runs = agree_on_runs(*world_, once_s, options_.seconds, kLeastLayerRuns);
    Progress progress;
    for (std::int64_t run = 0; run < result_.runs; ++run) {
      if (world_->rank() == 0) progress.show(fmt::format("run {} of {}", run + 1, result_.runs));
      one_run(kLayerWarmUps + run);
    }
    progress.finish();
    summarize();
    return result_;
  }

 private:
  void place_tokens() {
    const auto shares =
        moe::skewed_shares(options_.routing == BenchRouting::kForced ? options_.skew : moe::Skew::kBalanced,
                           options_.tokens, world_->size());
    const auto rank = shares.begin() + world_->rank();
    first_token_ = std::accumulate(shares.begin(), rank, std::int64_t{0});
    num_tokens_ = *rank;
    shape_ = {.num_experts = options_.experts, .top_k = options_.top_k, .num_ranks = groups_.ep->size()};
  }

  // At least what is there while a layer runs: inputs, weights and their gradients, and rows between the
  // products.
  void require_memory() const {
    const auto tokens = static_cast<double>(num_tokens_);
    const auto hidden = static_cast<double>(options_.hidden);
    const auto ffn = static_cast<double>(options_.ffn);
    const auto local = static_cast<double>(groups_.placement.count(groups_.ep->rank()));
    const double values = 4.0 * tokens * hidden + 2.0 * 3.0 * local * hidden * ffn +
                          tokens * static_cast<double>(options_.top_k) * (hidden + 3.0 * ffn);
    const double bytes = values * static_cast<double>(c10::elementSize(dtype_));
    require_config(
        bytes <= machine_memory_bytes(),
        "bench layer: rank {} needs at least {} for {} tokens x {} and {} experts of width {}; this "
        "machine has {}",
        world_->rank(), format_bytes(bytes), num_tokens_, options_.hidden, local, options_.ffn,
        format_bytes(machine_memory_bytes()));
  }

  void make_tensors() {
    constexpr double kScale = 0.02;
    const auto generator = at::detail::createCPUGenerator(static_cast<std::uint64_t>(world_->rank()) + 1);
    const auto random = [&](at::IntArrayRef sizes, double scale) {
      return at::randn(sizes, generator, at::kFloat).mul_(scale).to(dtype_);
    };
    const std::int64_t local = groups_.placement.count(groups_.ep->rank());
    x_TD_ = random({num_tokens_, options_.hidden}, 1.0).requires_grad_();
    grad_y_TD_ = random({num_tokens_, options_.hidden}, 1.0);
    weights_.router.gate_ED = random({options_.experts, options_.hidden}, kScale).requires_grad_();
    weights_.gate_up_LGD = random({local, 2 * options_.ffn, options_.hidden}, kScale).requires_grad_();
    weights_.down_LDF = random({local, options_.hidden, options_.ffn}, kScale).requires_grad_();
  }

  std::shared_ptr<moe::LayerRun> prepare(std::int64_t step) {
    auto run = std::make_shared<moe::LayerRun>();
    run->context = {.num_sequences = 1,
                    .sequence_length = num_tokens_,
                    .first_sequence = num_tokens_ > 0 ? first_token_ / num_tokens_ : 0,
                    .seed = 1,
                    .step = step,
                    .layer = 0,
                    .training = true,
                    .padding_T = {}};
    if (options_.routing == BenchRouting::kRandom) {
      run->replayed_ids_TK = moe::random_ids_TK(shape_, step, first_token_, num_tokens_);
    } else if (options_.routing == BenchRouting::kForced && options_.skew != moe::Skew::kBalanced) {
      run->replayed_ids_TK = moe::skewed_ids_TK(options_.skew, shape_, step, first_token_, num_tokens_);
    }
    run->stage_times = &stages_;
    return run;
  }

  double time_layer(const std::shared_ptr<moe::LayerRun>& run) {
    for (at::Tensor* leaf : {&x_TD_, &weights_.router.gate_ED, &weights_.gate_up_LGD, &weights_.down_LDF})
      leaf->mutable_grad() = at::Tensor();
    world_->barrier();
    groups_.ledger->clear();
    const auto start = BenchClock::now();
    at::Tensor y_TD = moe::moe_layer(moe_, weights_, transport_, x_TD_, run);
    y_TD.backward(grad_y_TD_);
    return seconds_since(start);
  }

  double warm_up() {
    const auto start = BenchClock::now();
    for (std::int64_t step = 0; step < kLayerWarmUps; ++step) one_run(step);
    const double once_s = seconds_since(start) / static_cast<double>(kLayerWarmUps);
    seconds_.clear();
    inside_.clear();
    across_.clear();
    stages_.clear();
    overlap_ = {};
    all_to_all_ = {};
    return once_s;
  }

  void one_run(std::int64_t step) {
    const auto run = prepare(step);
    seconds_.push_back(time_layer(run));
    add(groups_.ledger->overlap(), overlap_);
    add(groups_.ledger->overlap(comm::Operation::kAllToAll), all_to_all_);
    result_.counted = counted_bytes(*groups_.ledger);
    const comm::LedgerEntry plan =
        groups_.ledger->sum([](const comm::LedgerKey& key) { return key.phase == "plan"; });
    result_.plan = {.within_nodes = plan.bytes_within_nodes, .between_nodes = plan.bytes_between_nodes};
    const RoutingFacts facts = gather_routing(run->routing.expert_ids_TK);
    check_bytes(facts);
    time_floor(facts);
  }

  static void add(const comm::Overlap& of_run, comm::Overlap& sum) {
    sum.communicating_s += of_run.communicating_s;
    sum.hidden_s += of_run.hidden_s;
  }

  RoutingFacts gather_routing(const at::Tensor& ids_TK) {
    comm::Communicator& ep = *groups_.ep;
    const at::Tensor own = at::empty({1}, at::kLong);
    *own.mutable_data_ptr<std::int64_t>() = num_tokens_;
    const at::Tensor counts = at::empty({ep.size()}, at::kLong);
    ep.all_gather(own, counts).wait();
    const auto* count = counts.const_data_ptr<std::int64_t>();
    const std::vector<std::int64_t> rows(count, count + ep.size());
    const std::int64_t total = std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
    const at::Tensor all = at::empty({total, options_.top_k}, at::kInt);
    ep.all_gather(ids_TK.contiguous(), all, rows).wait();
    RoutingFacts facts;
    facts.row_counts_L.assign(static_cast<std::size_t>(groups_.placement.count(ep.rank())), 0);
    std::int64_t begin = 0;
    for (const std::int64_t tokens : rows) {
      facts.ids_TK.push_back(all.narrow(0, begin, tokens));
      begin += tokens;
    }
    const std::int64_t first = groups_.placement.first(ep.rank());
    const auto* id = all.const_data_ptr<std::int32_t>();
    for (std::int64_t slot = 0; slot < all.numel(); ++slot) {
      const std::int64_t expert = id[slot] - first;
      if (expert < 0 || expert >= static_cast<std::int64_t>(facts.row_counts_L.size())) continue;
      ++facts.row_counts_L[static_cast<std::size_t>(expert)];
      ++facts.rows;
    }
    return facts;
  }

  TrafficShape traffic_shape() const {
    const auto width = static_cast<std::int64_t>(c10::elementSize(dtype_));
    const auto wide = static_cast<std::int64_t>(c10::elementSize(at::toOpMathType(dtype_)));
    const moe::DispatcherOptions& dispatcher = groups_.dispatcher;
    const bool sums_are_wide = dispatcher.combine_fp32 && has_partial_sums(dispatcher.kind);
    return {.dispatcher = dispatcher,
            .chunks = options_.parallel.overlap.chunks,
            .num_experts = options_.experts,
            .row_bytes = options_.hidden * width,
            .sum_bytes = options_.hidden * (sums_are_wide ? wide : width),
            .weight_bytes = wide,
            .members = groups_.ep->group().members};
  }

  void check_bytes(const RoutingFacts& facts) {
    const TrafficShape shape = traffic_shape();
    result_.expected = expected_bytes(shape, facts.ids_TK)[static_cast<std::size_t>(groups_.ep->rank())];
    for (std::size_t arrow = 0; arrow < kArrows.size(); ++arrow) {
      const ArrowBytes& counted = result_.counted[arrow];
      const ArrowBytes& expected = result_.expected[arrow];
      if (counted == expected) continue;
      throw Error(fmt::format(
          "{}: sent {} bytes within and {} between nodes, but this routing takes {} and {}", kArrows[arrow],
          counted.within_nodes, counted.between_nodes, expected.within_nodes, expected.between_nodes));
    }
    result_.remote_copies = remote_copies(shape, facts.ids_TK);
  }

  void time_floor(const RoutingFacts& facts) {
    rows_ = facts.rows;
    if (facts.row_counts_L != floor_counts_) {
      floor_ = std::make_unique<GemmFloor>(facts.row_counts_L, options_.hidden, options_.ffn, dtype_);
      floor_counts_ = facts.row_counts_L;
      floor_->inside();
      floor_->across();
    }
    world_->barrier();
    inside_.push_back(floor_->inside());
    world_->barrier();
    across_.push_back(floor_->across());
  }

  void summarize() {
    constexpr double kFlopsPerRow = 18.0;  // three matrices, three products each, two operations
    result_.seconds = spread_of(max_over_ranks(*world_, seconds_));
    const Spread inside = spread_of(max_over_ranks(*world_, inside_));
    const Spread across = spread_of(max_over_ranks(*world_, across_));
    result_.floor_across = across.min < inside.min;
    result_.floor_seconds = result_.floor_across ? across : inside;
    result_.flops = kFlopsPerRow * static_cast<double>(options_.tokens * options_.top_k) *
                    static_cast<double>(options_.hidden * options_.ffn);
    std::vector<double> sums = {overlap_.communicating_s, overlap_.hidden_s, all_to_all_.communicating_s,
                                all_to_all_.hidden_s};
    for (const auto& [stage, name] : moe::kStageNames) sums.push_back(stages_.seconds(stage));
    sums = sum_over_ranks(*world_, sums);
    const double parts = static_cast<double>(world_->size()) * static_cast<double>(result_.runs);
    for (double& sum : sums) sum /= parts;
    result_.communication_s = sums[0];
    result_.communication_hidden_s = sums[1];
    result_.all_to_all_s = sums[2];
    result_.all_to_all_hidden_s = sums[3];
    std::copy(sums.begin() + 4, sums.end(), result_.stage_seconds.begin());
    const auto rows = static_cast<double>(rows_);
    result_.rows_max_over_mean = max_over_ranks(*world_, {rows})[0] * static_cast<double>(world_->size()) /
                                 sum_over_ranks(*world_, {rows})[0];
    summarize_traffic();
  }

  void summarize_traffic() {
    std::set<int> nodes;
    for (const comm::Member& member : groups_.ep->group().members) nodes.insert(member.node);
    result_.nodes = static_cast<int>(nodes.size());
    result_.expected_remote_copies = static_cast<double>(options_.tokens) *
                                     expected_remote_copies(options_.experts, options_.top_k, result_.nodes);
    std::vector<double> values = {groups_.ep->rank() == 0 ? static_cast<double>(result_.remote_copies) : 0.0};
    const auto each = [&](const auto& visit) {
      visit(result_.plan);
      for (std::size_t arrow = 0; arrow < kArrows.size(); ++arrow) {
        visit(result_.counted[arrow]);
        visit(result_.expected[arrow]);
      }
    };
    each([&](const ArrowBytes& bytes) {
      values.push_back(static_cast<double>(bytes.within_nodes));
      values.push_back(static_cast<double>(bytes.between_nodes));
    });
    values = sum_over_ranks(*world_, values);
    auto next = values.begin();
    result_.remote_copies = std::llround(*next++);
    each([&](ArrowBytes& bytes) {
      bytes.within_nodes = std::llround(*next++);
      bytes.between_nodes = std::llround(*next++);
    });
  }

  const LayerBenchOptions& options_;
  std::shared_ptr<comm::Communicator> world_;
  moe::MoeOptions moe_;
  parallel::Groups groups_;
  moe::ExpertTransport transport_;
  at::ScalarType dtype_;
  moe::SkewShape shape_;
  std::int64_t first_token_ = 0;
  std::int64_t num_tokens_ = 0;
  at::Tensor x_TD_;
  at::Tensor grad_y_TD_;
  moe::MoeWeights weights_;
  std::unique_ptr<GemmFloor> floor_;
  std::vector<std::int64_t> floor_counts_;
  std::int64_t rows_ = 0;
  std::vector<double> seconds_;
  std::vector<double> inside_;
  std::vector<double> across_;
  moe::StageTimes stages_;
  comm::Overlap overlap_;
  comm::Overlap all_to_all_;
  LayerBenchResult result_;
};

}  // namespace

LayerBenchResult run_layer_bench(const LayerBenchOptions& options,
                                 const std::shared_ptr<comm::Communicator>& world) {
  return LayerBench(options, world).measure();
}

}  // namespace collegium::cli
