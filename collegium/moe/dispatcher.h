// SPDX-License-Identifier: Apache-2.0
#pragma once

// A dispatcher brings rows to the ranks and places where their experts compute, and results back. It owns
// permutation and communication. The gradient of dispatch is combine and the reverse, with the same handle.
//
// Every arrow is split in two: the call starts it, Pending::wait() gives its result, and what runs in between
// runs while rows travel. All ranks of the group make the same calls and waits in the same order, tokens or
// not.

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/comm/communicator.h"
#include "collegium/moe/placement.h"
#include "collegium/ops/row_source.h"

namespace collegium::moe {

/// A result under way; wait() is called once.
template <typename T>
class [[nodiscard]] Pending {
 public:
  explicit Pending(std::function<T()> finish) : finish_(std::move(finish)) {}
  T wait() {
    // What the closure keeps alive goes with it: a caller may hold on to a Pending whose result it has.
    const auto finish = std::move(finish_);
    return finish();
  }

 private:
  std::function<T()> finish_;
};

/// What one dispatch of one chunk of tokens knows and combine, and both backward passes, need again. Each
/// dispatcher derives its own.
struct DispatchHandle {
  virtual ~DispatchHandle() = default;
  at::Tensor row_counts_L;  ///< int64 on the CPU: rows per local expert, in row order
  comm::Where where;        ///< step and layer, for the ledger and for errors
};

/// What a layer asks of plan().
struct DispatchRequest {
  std::span<const at::Tensor> chunk_ids_TK;  ///< int32, -1 = no expert; one tensor per chunk of tokens
  /// Most rows that a capacity leaves this rank for one expert; -1 = dropless. Padding goes up to here.
  std::int64_t capacity_rows = -1;
  comm::Where where;
};

struct DispatchedRows {
  /// Compute dtype, grouped by local expert; within one in (source rank, token) order, for two_level in
  /// (source's index in its node, source's node, token) order. Received rows lie where the network put them;
  /// a row that several experts of this rank take lies there once.
  ops::RowSource rows;
  at::Tensor weights_R;  ///< router dtype, the weight that travels with its row
};

struct DispatchGradients {
  at::Tensor x_TD;        ///< undefined when the rows' gradients are
  at::Tensor weights_TK;  ///< router dtype; zero at slots without a row
};

class Dispatcher {
 public:
  virtual ~Dispatcher() = default;

  /// What     Where every slot of every chunk goes: the only exchange of counts, for all chunks at once.
  /// Comm     a few integers per peer and chunk; waits for the group.
  virtual std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) = 0;

  /// x_TD [T, D] and weights_TK of a chunk -> rows of this rank's experts.
  virtual Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                           const std::shared_ptr<DispatchHandle>& handle) = 0;
  /// What     Memory for the rows that the next combine() or dispatch_backward() of this handle is given.
  ///          Those may lie anywhere; what lies here need not be copied.
  /// Shape    [R, width of `like`], of its dtype, not initialised.
  virtual at::Tensor result_rows(const at::Tensor& like, const std::shared_ptr<DispatchHandle>& handle);
  /// Rows -> y_TD, a plain sum per token (fp32 or wider inside a rank); a token without rows gets zero.
  virtual Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                                      const std::shared_ptr<DispatchHandle>& handle) = 0;
  /// Gradient of combine: the rows' gradients from the tokens'.
  virtual Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                                   const std::shared_ptr<DispatchHandle>& handle) = 0;
  /// Gradient of dispatch: tokens' gradients and their weights' from the rows'. `grad_rows_RD` may be
  /// undefined (on all ranks): the tokens' gradient is then not wanted.
  virtual Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                                       const at::Tensor& grad_weights_R,
                                                       const std::shared_ptr<DispatchHandle>& handle) = 0;
};

enum class DispatcherKind {
  kUneven,       ///< all_to_all of exactly the routed rows
  kPadded,       ///< all_to_all of blocks padded with zeros to the capacity or the largest count [GShard]
  kAllgather,    ///< all ranks get all tokens; reduce_scatter of partial sums
  kTwoLevel,     ///< a token crosses to a node once and is fanned out there [DeepSeekV3, Sec 3.2.2]
  kSharedMemory  ///< ranks of one node read each other's rows where they lie; nothing travels
};

struct DispatcherOptions {
  DispatcherKind kind = DispatcherKind::kUneven;
  bool combine_fp32 = false;  ///< two_level, allgather: partial sums travel in fp32
};

/// What runs while rows travel.
struct OverlapOptions {
  std::int64_t chunks = 1;
  bool shared_expert = false;
  bool weight_gradients = false;
};
template <class Fields>
void describe(Fields& fields, OverlapOptions& o) {
  fields("chunks", o.chunks, "tokens are cut into this many chunks; one travels while another is computed");
  fields("shared_expert", o.shared_expert, "the shared expert runs during the dispatch");
  fields("weight_gradients", o.weight_gradients,
         "the experts' weight gradients run during the backward dispatch");
}

/// How a layer reaches its experts.
struct ExpertTransport {
  std::shared_ptr<Dispatcher> dispatcher;
  OverlapOptions overlap;
};

/// What     Whether every node holds as many ranks as every other.
/// Shape    nodes: of every rank.
bool nodes_are_even(std::span<const int> nodes);

/// What     The dispatcher of one rank that holds every expert: rows are read where the tokens are, no
///          communication.
std::shared_ptr<Dispatcher> make_local_dispatcher(std::int64_t num_experts);

/// What     A dispatcher over the ranks of an expert-parallel group, one file each.
/// Comm     two_level and shared_memory are collective: one splits the group into nodes and rails, the other
///          tries whether its ranks share memory.
/// Throws   ConfigError: two_level needs the same number of ranks on every node, shared_memory all on one.
std::shared_ptr<Dispatcher> make_dispatcher(const DispatcherOptions& options, std::int64_t num_experts,
                                            const std::shared_ptr<comm::Communicator>& ep);
std::shared_ptr<Dispatcher> make_uneven_dispatcher(const ExpertPlacement& placement,
                                                   std::shared_ptr<comm::Communicator> ep);
std::shared_ptr<Dispatcher> make_padded_dispatcher(const ExpertPlacement& placement,
                                                   std::shared_ptr<comm::Communicator> ep);
std::shared_ptr<Dispatcher> make_allgather_dispatcher(const ExpertPlacement& placement,
                                                      std::shared_ptr<comm::Communicator> ep,
                                                      bool combine_fp32);
std::shared_ptr<Dispatcher> make_two_level_dispatcher(const ExpertPlacement& placement,
                                                      const std::shared_ptr<comm::Communicator>& ep,
                                                      bool combine_fp32);
std::shared_ptr<Dispatcher> make_shared_memory_dispatcher(const ExpertPlacement& placement,
                                                          std::shared_ptr<comm::Communicator> ep);

}  // namespace collegium::moe

namespace collegium {
template <>
struct EnumNames<moe::DispatcherKind> {
  static constexpr std::pair<std::string_view, moe::DispatcherKind> names[] = {
      {"uneven", moe::DispatcherKind::kUneven},
      {"padded", moe::DispatcherKind::kPadded},
      {"allgather", moe::DispatcherKind::kAllgather},
      {"two_level", moe::DispatcherKind::kTwoLevel},
      {"shared_memory", moe::DispatcherKind::kSharedMemory}};
};
}  // namespace collegium
