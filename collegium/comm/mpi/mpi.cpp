// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/mpi/mpi.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <thread>

#include "collegium/comm/bytes.h"
#include "collegium/comm/launcher.h"
#include "collegium/comm/mpi/engine.h"
#include "collegium/comm/reduce.h"

namespace collegium::comm {

namespace {

// A tag holds the group's context id and, below it, the number of the call or the user's tag. A group has two
// contexts: one for collectives, one for messages. Numbers may wrap around: far fewer calls than that are
// under way at once, and messages of one pair and tag arrive in order.
constexpr int kTagBits = 12;
constexpr std::uint64_t kTagMask = (1U << kTagBits) - 1U;
constexpr int kCollective = 0;
constexpr int kMessage = 1;

// What other ranks' contributions to a reduction take at most, over all ranks: longer tensors are reduced in
// parts, which hold whole elements of every dtype.
constexpr std::int64_t kMostScratchBytes = std::int64_t{32} << 20;
constexpr std::int64_t kPartAlignment = 16;

// all_to_all: every rank sends its pieces for rank r to rank r. Self-copies included, unless rows stay.
void exchange_pieces(MpiOperation& operation, int tag) {
  const Call& call = operation.call();
  const int size = operation.group().size();
  const int self = operation.group().rank;
  const std::int64_t row_bytes = call.row_bytes();
  for (int step = 1; step < size; ++step) {
    const int source = (self + size - step) % size;
    operation.recv_pieces(bytes_of(call.output), pieces_from(call, source), row_bytes, source, tag);
  }
  for (int step = 1; step < size; ++step) {
    const int target = (self + step) % size;
    operation.send_pieces(bytes_of(call.input), pieces_to(call, target), row_bytes, target, tag);
  }
  const std::vector<Piece> sources = pieces_to(call, self);
  const std::vector<Piece> places = pieces_from(call, self);
  for (std::size_t i = 0; i < std::min(sources.size(), places.size()); ++i) {
    copy_bytes(bytes_of(call.output) + places[i].begin * row_bytes,
               bytes_of(call.input) + sources[i].begin * row_bytes,
               std::min(sources[i].rows, places[i].rows) * row_bytes);
  }
}

// Every rank sends the same block to all others; empty ones where nothing before has made sure that all
// answer.
void spread(MpiOperation& operation, const char* block, std::int64_t block_bytes, char* output,
            const std::vector<std::int64_t>& recv_bytes, int tag, bool even_empty) {
  const int self = operation.group().rank;
  std::int64_t offset = 0;
  for (int rank = 0; rank < operation.group().size(); ++rank) {
    const std::int64_t bytes = recv_bytes[static_cast<std::size_t>(rank)];
    if (rank == self) {
      if (output + offset != block) copy_bytes(output + offset, block, bytes);
    } else {
      operation.recv(output + offset, bytes, rank, tag, even_empty);
      operation.send(block, block_bytes, rank, tag, even_empty);
    }
    offset += bytes;
  }
}

std::vector<std::int64_t> times(const std::vector<std::int64_t>& rows, std::int64_t bytes) {
  std::vector<std::int64_t> result;
  for (const std::int64_t count : rows) result.push_back(count * bytes);
  return result;
}

std::int64_t longest_of(const std::vector<std::int64_t>& slice_bytes) {
  return *std::max_element(slice_bytes.begin(), slice_bytes.end());
}

// Every rank's slice of all inputs, which that rank reduces, in rank order, part by part.
struct Reduction {
  std::vector<std::int64_t> slice_bytes;  // of each rank; they follow one another in the input
  char* output = nullptr;                 // where this rank's slice goes
  at::Tensor parts;                       // uint8 [rank, bytes]: what the others hold of the part under way
  int tag = 0;

  std::int64_t part_bytes(int rank, std::int64_t begin) const {
    return std::clamp<std::int64_t>(slice_bytes[static_cast<std::size_t>(rank)] - begin, 0, parts.size(1));
  }

  // Where parts follow one another, ranks that come with tensors of other lengths would see it only by
  // waiting for a last one: so they first say how much they will send. Lands in the memory of the parts.
  void announce(MpiOperation& operation) const {
    for (int rank = 0; rank < operation.group().size(); ++rank) {
      if (rank == operation.group().rank) continue;
      constexpr std::int64_t kBytes = sizeof(std::int64_t);
      operation.recv(bytes_of(parts) + rank * parts.size(1), kBytes, rank, tag);
      operation.send(&slice_bytes[static_cast<std::size_t>(rank)], kBytes, rank, tag);
    }
  }

  void check_announced(const MpiOperation& operation) const {
    const int self = operation.group().rank;
    const std::int64_t expected = slice_bytes[static_cast<std::size_t>(self)];
    for (int rank = 0; rank < operation.group().size(); ++rank) {
      std::int64_t bytes = 0;
      std::memcpy(&bytes, bytes_of(parts) + rank * parts.size(1), sizeof(bytes));
      if (rank == self || bytes == expected) continue;
      const std::array<int, 1> peer = {rank};
      throw CommError(fmt::format("{}: {} sends {} bytes where {} are expected", operation.name(),
                                  describe_ranks(operation.group(), peer), bytes, expected));
    }
  }

  const char* part_of_input(const Call& call, int rank, std::int64_t begin) const {
    const auto slices = slice_bytes.begin();
    const std::int64_t slice = std::accumulate(slices, slices + rank, std::int64_t{0});
    return bytes_of(call.input) + slice + std::min(begin, slices[rank]);
  }

  // Empty parts are sent too: so every rank names a rank that does not answer, not only those that need its
  // numbers, while the others name these.
  void exchange(MpiOperation& operation, std::int64_t begin) const {
    const int size = operation.group().size();
    const int self = operation.group().rank;
    for (int step = 1; step < size; ++step) {
      const int source = (self + size - step) % size;
      operation.recv(bytes_of(parts) + source * parts.size(1), part_bytes(self, begin), source, tag, true);
    }
    for (int step = 1; step < size; ++step) {
      const int target = (self + step) % size;
      operation.send(part_of_input(operation.call(), target, begin), part_bytes(target, begin), target, tag,
                     true);
    }
  }

  void reduce(const Call& call, int self, std::int64_t begin) const {
    std::vector<const void*> inputs;
    for (int rank = 0; rank < parts.size(0); ++rank) {
      const char* theirs = bytes_of(parts) + rank * parts.size(1);
      inputs.push_back(rank == self ? part_of_input(call, self, begin) : theirs);
    }
    const std::vector<void*> outputs = {output + begin};
    const std::int64_t elements =
        part_bytes(self, begin) / static_cast<std::int64_t>(c10::elementSize(call.dtype));
    if (elements > 0) reduce_elements(inputs, outputs, elements, call.dtype, call.reduce);
  }
};

void add_reduction(MpiOperation& operation, Reduction what) {
  const auto reduction = std::make_shared<const Reduction>(std::move(what));
  const std::int64_t longest = longest_of(reduction->slice_bytes);
  if (longest > reduction->parts.size(1)) {
    operation.add_stage([=](MpiOperation& op) { reduction->announce(op); });
    operation.add_stage([=](MpiOperation& op) { reduction->check_announced(op); });
  }
  std::int64_t begin = 0;
  do {
    operation.add_stage([=](MpiOperation& op) { reduction->exchange(op, begin); });
    operation.add_stage([=](MpiOperation& op) { reduction->reduce(op.call(), op.group().rank, begin); });
    begin += reduction->parts.size(1);
  } while (begin < longest);
}

// Where all_reduce cuts: slices of almost equal size.
std::vector<std::int64_t> equal_slices(const Call& call, int size) {
  std::vector<std::int64_t> bytes;
  for (int r = 0; r < size; ++r) {
    const std::int64_t elements =
        slice_begin(call.elements, size, r + 1) - slice_begin(call.elements, size, r);
    bytes.push_back(elements * call.row_bytes());
  }
  return bytes;
}

void add_all_reduce(MpiOperation& operation, const std::vector<std::int64_t>& slice_bytes,
                    const at::Tensor& parts, int first_tag, int second_tag) {
  const Call& call = operation.call();
  const auto self = static_cast<std::size_t>(operation.group().rank);
  char* own = bytes_of(call.output) +
              slice_begin(call.elements, operation.group().size(), operation.group().rank) * call.row_bytes();
  add_reduction(operation, {.slice_bytes = slice_bytes, .output = own, .parts = parts, .tag = first_tag});
  operation.add_stage([=](MpiOperation& op) {
    spread(op, own, slice_bytes[self], bytes_of(op.call().output), slice_bytes, second_tag, false);
  });
}

void add_barrier(MpiOperation& operation, int tag) {
  operation.add_stage([tag](MpiOperation& op) {
    for (int rank = 0; rank < op.group().size(); ++rank) {
      if (rank == op.group().rank) continue;
      op.recv(nullptr, 0, rank, tag, true);
      op.send(nullptr, 0, rank, tag, true);
    }
  });
}

void add_broadcast(MpiOperation& operation, int tag) {
  operation.add_stage([tag](MpiOperation& op) {
    const Call& call = op.call();
    const std::int64_t bytes = call.elements * call.row_bytes();
    if (call.peer != op.group().rank) return op.recv(bytes_of(call.output), bytes, call.peer, tag, true);
    for (int rank = 0; rank < op.group().size(); ++rank) {
      if (rank != call.peer) op.send(bytes_of(call.input), bytes, rank, tag, true);
    }
  });
}

class MpiWork final : public Work::State {
 public:
  MpiWork(std::shared_ptr<MpiEngine> engine, std::shared_ptr<MpiOperation> operation)
      : engine_(std::move(engine)), operation_(std::move(operation)) {}
  void wait() override {
    if (!waited_) engine_->wait(operation_);
    waited_ = true;
  }
  bool done() override { return waited_ || engine_->done(operation_); }
  Timeline timeline() const override { return operation_->timeline(); }

 private:
  std::shared_ptr<MpiEngine> engine_;
  std::shared_ptr<MpiOperation> operation_;
  bool waited_ = false;
};

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(std::shared_ptr<MpiEngine> engine, int context, Group group)
      : Communicator(std::move(group)), engine_(std::move(engine)), context_(context) {}

  Work start(Call call) override {
    const bool message = is_point_to_point(call.operation);
    const std::uint64_t number = message ? next_message_++ : next_call_++;
    std::string name = describe_call(call, group(), number);
    auto operation =
        std::make_shared<MpiOperation>(std::move(call), std::move(name), group(), engine_->comm());
    if (message) {
      add_message(*operation, tag(kMessage, static_cast<std::uint64_t>(operation->call().tag)));
    } else {
      add_stages(*operation, tag(kCollective, 2 * number), tag(kCollective, 2 * number + 1));
    }
    engine_->start(operation);
    return Work(std::make_shared<MpiWork>(engine_, std::move(operation)));
  }

  std::shared_ptr<Communicator> split(int color, int key, const std::string& name) override {
    Group group = agree_on_split(color, key, name);
    // All members take the first contexts that are free on every rank of the old group.
    const at::Tensor next = at::empty({1}, at::kLong);
    *next.data_ptr<std::int64_t>() = engine_->next_context();
    all_reduce(next, ReduceOp::kMax).wait();
    const auto context = static_cast<int>(*next.data_ptr<std::int64_t>());
    const int most = (engine_->most_tag() >> kTagBits) & ~1;
    if (context + 2 > most) {
      throw CommError(
          fmt::format("split '{}': {} groups were made, and this MPI's largest tag (MPI_TAG_UB), "
                      "{}, is enough for {}",
                      name, context / 2, engine_->most_tag(), most / 2));
    }
    engine_->set_next_context(context + 2);
    if (group.members.empty()) return nullptr;
    return std::make_shared<MpiCommunicator>(engine_, context, std::move(group));
  }

 private:
  int tag(int kind, std::uint64_t number) const {
    return ((context_ + kind) << kTagBits) | static_cast<int>(number & kTagMask);
  }

  static void add_message(MpiOperation& operation, int tag) {
    operation.add_stage([tag](MpiOperation& op) {
      const Call& call = op.call();
      const std::int64_t bytes = call.elements * call.row_bytes();
      if (call.operation == Operation::kSend)
        return op.send(bytes_of(call.input), bytes, call.peer, tag, true);
      op.recv(bytes_of(call.output), bytes, call.peer, tag, true);
    });
  }

  // Where other ranks' contributions to a reduction are put. Fresh memory would cost more than the reduction
  // (its pages are touched for the first time by the transfer), so it is kept, unless an operation under way
  // uses it.
  at::Tensor scratch(const std::vector<std::int64_t>& slice_bytes) {
    const std::int64_t most = kMostScratchBytes / size() / kPartAlignment * kPartAlignment;
    const std::int64_t part = std::min(longest_of(slice_bytes), most);
    const std::int64_t bytes = part * size();
    if (!scratch_.defined() || scratch_.numel() < bytes || scratch_.storage().use_count() > 1)
      scratch_ = at::empty({bytes}, at::kByte);
    return scratch_.narrow(0, 0, bytes).view({size(), part});
  }

  void add_stages(MpiOperation& operation, int first_tag, int second_tag) {
    const Call& call = operation.call();
    switch (call.operation) {
      case Operation::kAllReduce: {
        const std::vector<std::int64_t> slices = equal_slices(call, size());
        return add_all_reduce(operation, slices, scratch(slices), first_tag, second_tag);
      }
      case Operation::kReduceScatter: {
        const std::vector<std::int64_t> slices = times(call.send_rows, call.row_bytes());
        return add_reduction(operation, {.slice_bytes = slices,
                                         .output = bytes_of(call.output),
                                         .parts = scratch(slices),
                                         .tag = first_tag});
      }
      case Operation::kBroadcast:
        return add_broadcast(operation, first_tag);
      case Operation::kBarrier:
        return add_barrier(operation, first_tag);
      case Operation::kAllGather:
        return operation.add_stage([first_tag](MpiOperation& op) {
          const Call& c = op.call();
          spread(op, bytes_of(c.input), c.elements * static_cast<std::int64_t>(c10::elementSize(c.dtype)),
                 bytes_of(c.output), times(c.recv_rows, c.row_bytes()), first_tag, true);
        });
      case Operation::kAllToAll:
        return operation.add_stage([first_tag](MpiOperation& op) { exchange_pieces(op, first_tag); });
      case Operation::kSend:
      case Operation::kRecv:
        break;
    }
  }

  std::shared_ptr<MpiEngine> engine_;
  const int context_;
  at::Tensor scratch_;
  std::uint64_t next_call_ = 0;
  std::uint64_t next_message_ = 0;
};

}  // namespace

bool has_mpi() { return true; }

void run_mpi_world(const std::function<void(Communicator&)>& fn, const MpiOptions& options) {
  require_config(options.timeout.count() > 0, "time-out = {} ms: must be positive", options.timeout.count());
  const auto engine = std::make_shared<MpiEngine>(options);
  const Group group = engine->world_group();
  refuse_foreign_launcher(group.size(), find_launcher());
  const std::string own_name = fmt::format("rank {} of {}: ", group.rank, group.size());
  // Rank 0 first, so that the first to report ends the others before they do.
  const auto my_turn = [&] {
    engine->give_up();
    if (group.rank > 0) std::this_thread::sleep_for(std::chrono::milliseconds(200 + 20 * group.rank));
    return own_name;
  };
  try {
    const auto world = std::make_shared<MpiCommunicator>(engine, 0, group);
    fn(*world);
    world->barrier();
    engine->wait_for_all();
  } catch (const NoAnswer& error) {
    // Who has waited longest waits for the rank that is missing, others perhaps for those that wait for it.
    // Who is a call ahead has begun to wait at the same moment, but misses more ranks.
    engine->give_up();
    constexpr std::size_t kMost = 6;
    const std::size_t others = std::clamp<std::size_t>(error.num_missing(), 1, kMost) - 1;
    std::this_thread::sleep_for(std::chrono::milliseconds(100 * others));
    throw NoAnswer(own_name + error.what(), error.num_missing());
  } catch (const CommError& error) {
    throw CommError(my_turn() + error.what());
  } catch (const ConfigError& error) {
    throw ConfigError(my_turn() + error.what());
  } catch (const InternalError& error) {
    throw InternalError(my_turn() + error.what());
  } catch (const std::exception& error) {
    throw Error(my_turn() + error.what());
  }
}

void abort_mpi_world(int exit_code) {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized != 0 && finalized == 0) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace collegium::comm
