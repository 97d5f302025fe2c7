// SPDX-License-Identifier: Apache-2.0

// A token crosses to a node once, to the rank with the sender's index there (its gateway), and is fanned out
// within the node at most once per rank [DeepSeekV3, Sec 3.2.2]. Partial sums are added where the ways part,
// so the way home carries no more than the way out.
//
//   2 nodes of 2 ranks, experts e0 e1 | e2 e3 on node 0, e4 e5 | e6 e7 on node 1. Token a of rank 0 chose e4,
//   e5 and e7, token b chose e1 and e6:
//
//   rank 0  -- rail -->  rank 2: a (e4 e5 e7), b (e6)        a crosses once, not three times
//           -- rail -->  rank 0: b (e1)
//   rank 2  -- node -->  rank 2: a (e4 e5)
//           -- node -->  rank 3: a (e7), b (e6)
//   home:   rank 3 sends a7 and b6 to rank 2, which sends (a4 + a5) + a7 and b6 to rank 0

#include <ATen/OpMathType.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/moe/copy_exchange.h"
#include "collegium/moe/dispatcher.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

using comm::Communicator;

// Where the ranks of an expert-parallel group are. Node and index are counted within the group.
struct NodeMap {
  struct Place {
    int node = 0;
    int index = 0;
  };
  std::vector<Place> places;  // of each rank
  int num_nodes = 0;

  explicit NodeMap(const Communicator& ep) {
    std::vector<int> names;  // of the nodes, in the order of their first ranks
    std::vector<int> sizes;
    for (int rank = 0; rank < ep.size(); ++rank) {
      const auto known = std::find(names.begin(), names.end(), ep.node(rank));
      const auto node = static_cast<std::size_t>(known - names.begin());
      if (known == names.end()) {
        names.push_back(ep.node(rank));
        sizes.push_back(0);
      }
      places.push_back({.node = static_cast<int>(node), .index = sizes[node]++});
    }
    num_nodes = static_cast<int>(names.size());
    for (std::size_t node = 1; node < sizes.size(); ++node) {
      require_config(
          sizes[node] == sizes[0],
          "dispatcher kind = two_level: every node must hold as many ranks of group '{}', but node "
          "{} holds {} and node {} holds {}",
          ep.name(), names[0], sizes[0], names[node], sizes[node]);
    }
  }
};

struct TwoLevelHandle final : DispatchHandle {
  CopyPlan rail;           ///< between nodes
  CopyPlan node;           ///< within the node, of the copies that the rail brought
  ops::Permutation local;  ///< of the copies that the node brought, by local expert
};

// Rows and weights under way together.
struct Transfers {
  Exchange rows;
  Exchange weights;

  void wait() {
    rows.work.wait();
    weights.work.wait();
  }
};

// The second exchange of an arrow: starts when the first has arrived and somebody asks.
class Relay {
 public:
  explicit Relay(std::function<Transfers()> start) : start_(std::move(start)) {}

  void start() {
    if (start_) transfers_ = std::exchange(start_, nullptr)();
  }
  const Transfers& finish() {
    start();
    transfers_.wait();
    return transfers_;
  }

 private:
  std::function<Transfers()> start_;
  Transfers transfers_;
};

class TwoLevelDispatcher final : public Dispatcher {
 public:
  TwoLevelDispatcher(const ExpertPlacement& placement, CopyExchange rail, CopyExchange node,
                     const Communicator& ep, bool combine_fp32)
      : first_(placement.first(ep.rank())),
        num_local_(placement.count(ep.rank())),
        rail_(std::move(rail)),
        node_(std::move(node)),
        where_(ep.group().where),
        combine_fp32_(combine_fp32) {}

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(*where_, at_phase(request.where, "plan"));
    std::vector<CopyPlan> rail = rail_.plan(request.chunk_ids_TK);
    std::vector<at::Tensor> copy_ids;
    copy_ids.reserve(rail.size());
    for (const CopyPlan& plan : rail) copy_ids.push_back(plan.received_ids_UK);
    std::vector<CopyPlan> node = node_.plan(copy_ids);
    std::vector<std::shared_ptr<DispatchHandle>> handles;
    for (std::size_t chunk = 0; chunk < rail.size(); ++chunk) {
      auto handle = std::make_shared<TwoLevelHandle>();
      handle->where = request.where;
      handle->rail = std::move(rail[chunk]);
      handle->node = std::move(node[chunk]);
      const at::Tensor& ids_UK = handle->node.received_ids_UK;
      handle->local = ops::group_by_expert(
          at::where(ids_UK.ge(0), ids_UK - static_cast<std::int32_t>(first_), at::full_like(ids_UK, -1)),
          num_local_);
      handle->row_counts_L = handle->local.counts_E;
      handles.push_back(std::move(handle));
    }
    return handles;
  }

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<TwoLevelHandle>(handle);
    const auto relay = start_out(x_TD, weights_TK, h, "dispatch");
    return Pending<DispatchedRows>([this, h, relay]() -> DispatchedRows {
      const Transfers& second = relay->finish();
      move_on();
      const at::Tensor weights_UK = CopyExchange::arrived_weights(second.weights.received, h->node);
      return {.rows = {second.rows.received, h->local.row_token_R},
              .weights_R = rows_of_slots(weights_UK, h->local.row_slot_R)};
    });
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<TwoLevelHandle>(handle);
    const auto relay = start_return(rows_RD, {}, h, "combine");
    const at::ScalarType dtype = rows_RD.scalar_type();
    return Pending<at::Tensor>([this, h, relay, dtype] {
      const Transfers& second = relay->finish();
      move_on();
      return CopyExchange::summed_rows(second.rows.received, h->rail).to(dtype);
    });
  }

  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<TwoLevelHandle>(handle);
    const auto relay = start_out(grad_y_TD, {}, h, "combine backward");
    return Pending<ops::RowSource>([this, h, relay]() -> ops::RowSource {
      const Transfers& second = relay->finish();
      move_on();
      return {second.rows.received, h->local.row_token_R};
    });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<TwoLevelHandle>(handle);
    const auto relay = start_return(grad_rows_RD, grad_weights_R, h, "dispatch backward");
    const at::ScalarType dtype =
        grad_rows_RD.defined() ? grad_rows_RD.scalar_type() : at::ScalarType::Undefined;
    return Pending<DispatchGradients>([this, h, relay, dtype]() -> DispatchGradients {
      const Transfers& second = relay->finish();
      move_on();
      DispatchGradients gradients{
          .x_TD = {}, .weights_TK = CopyExchange::returned_weights(second.weights.received, h->rail)};
      if (second.rows.received.defined())
        gradients.x_TD = CopyExchange::summed_rows(second.rows.received, h->rail).to(dtype);
      return gradients;
    });
  }

 private:
  // The way out of rows, or of rows and their weights.
  std::shared_ptr<Relay> start_out(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<TwoLevelHandle>& h, const char* phase) {
    const comm::WhereScope scope(*where_, at_phase(h->where, phase));
    Transfers first{.rows = rail_.send_rows(x_TD, h->rail), .weights = {}};
    if (weights_TK.defined()) first.weights = rail_.send_weights(weights_TK, h->rail);
    auto relay = std::make_shared<Relay>([this, h, first, phase]() mutable {
      first.wait();
      const comm::WhereScope here(*where_, at_phase(h->where, phase));
      Transfers second{.rows = node_.send_rows(first.rows.received, h->node), .weights = {}};
      if (first.weights.received.defined()) {
        second.weights =
            node_.send_weights(CopyExchange::arrived_weights(first.weights.received, h->rail), h->node);
      }
      return second;
    });
    if (h->rail.direct) relay->start();
    return relay;
  }

  // The way home of rows, of values of rows, or of both: summed per copy, sent within the node, summed per
  // token of the rail, sent to its source.
  std::shared_ptr<Relay> start_return(const at::Tensor& rows_RD, const at::Tensor& values_R,
                                      const std::shared_ptr<TwoLevelHandle>& h, const char* phase) {
    const comm::WhereScope scope(*where_, at_phase(h->where, phase));
    Transfers first;
    if (rows_RD.defined()) {
      const at::Tensor rows = combine_fp32_ ? rows_RD.to(at::toOpMathType(rows_RD.scalar_type())) : rows_RD;
      first.rows = node_.return_rows(ops::combine_rows(rows, h->local.slot_row_TK), h->node);
    }
    if (values_R.defined()) {
      const at::Tensor values_UK = slots_of_rows(values_R, h->local.row_slot_R, h->local.slot_row_TK.sizes());
      first.weights = node_.return_weights(values_UK, h->node);
    }
    auto relay = std::make_shared<Relay>([this, h, first, phase]() mutable {
      first.wait();
      const comm::WhereScope here(*where_, at_phase(h->where, phase));
      Transfers second;
      if (first.rows.received.defined())
        second.rows = rail_.return_rows(CopyExchange::summed_rows(first.rows.received, h->node), h->rail);
      if (first.weights.received.defined()) {
        second.weights =
            rail_.return_weights(CopyExchange::returned_weights(first.weights.received, h->node), h->rail);
      }
      return second;
    });
    if (h->node.direct) relay->start();
    returning_.push_back(relay);
    return relay;
  }

  // Every wait() moves the returns under way on to the rail, so that they cross while the next chunk is
  // computed. Their first exchange stays within a node and is over by then. The ways out are not moved on:
  // theirs crosses nodes, and to wait for it before its rows are needed would undo the overlap.
  void move_on() {
    for (const std::weak_ptr<Relay>& waiting : std::exchange(returning_, {})) {
      if (const auto relay = waiting.lock()) relay->start();
    }
  }

  std::int64_t first_;
  std::int64_t num_local_;
  CopyExchange rail_;
  CopyExchange node_;
  std::shared_ptr<comm::Where> where_;
  bool combine_fp32_;
  std::vector<std::weak_ptr<Relay>> returning_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_two_level_dispatcher(const ExpertPlacement& placement,
                                                      const std::shared_ptr<Communicator>& ep,
                                                      bool combine_fp32) {
  const NodeMap map(*ep);
  const NodeMap::Place own = map.places[static_cast<std::size_t>(ep->rank())];
  std::vector<int> node_of_expert;
  std::vector<int> index_of_expert;
  for (std::int64_t expert = 0; expert < placement.num_experts; ++expert) {
    const NodeMap::Place place = map.places[static_cast<std::size_t>(placement.rank_of(expert))];
    node_of_expert.push_back(place.node);
    index_of_expert.push_back(place.node == own.node ? place.index : -1);
  }
  CopyExchange rail(ep->split(own.index, own.node, "rail"), std::move(node_of_expert));
  CopyExchange node(ep->split(own.node, own.index, "node"), std::move(index_of_expert));
  return std::make_shared<TwoLevelDispatcher>(placement, std::move(rail), std::move(node), *ep, combine_fp32);
}

}  // namespace collegium::moe
