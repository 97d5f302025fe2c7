// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/mpi/engine.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <set>

#include "collegium/base/machine.h"
#include "collegium/comm/launcher.h"

namespace collegium::comm {

namespace {

// MPI counts bytes of one message in an int.
constexpr std::int64_t kMaxMessageBytes = std::int64_t{1} << 30;
// A wait looks without pause for as long as a small message takes within a machine, then leaves the core to
// others.
constexpr std::chrono::microseconds kSpin{30};
constexpr std::chrono::milliseconds kYield{1};
constexpr std::chrono::microseconds kNap{50};

// Pieces at least this long on average travel as a message each, shorter ones together in a scattered one.
// Measured between 2 processes of one machine, against one contiguous message and a copy after it (ms):
//                        contiguous, copy   a message each   scattered
//    32 pieces of 256 KiB       2.56             2.11           2.00
//     4 pieces of 512 KiB       0.22             0.17           0.45
//    32 pieces of  32 KiB       0.12             0.15           0.16
//    32 pieces of   8 KiB       0.03             0.08           0.04
constexpr std::int64_t kLongPieceBytes = std::int64_t{64} * 1024;

std::string mpi_text(int code) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  return {text.data(), static_cast<std::size_t>(length)};
}

void check(int code, std::string_view what) {
  if (code != MPI_SUCCESS) throw CommError(fmt::format("{}: {}", what, mpi_text(code)));
}

// Whether the ranks of a machine are more than the cores that any of them may run on.
bool are_more_than_cores(MPI_Comm machine, const std::vector<int>& own_cores) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  for (const int core : own_cores) CPU_SET(static_cast<std::size_t>(core), &cores);
  if (own_cores.empty()) {
    for (int core = 0; core < machine_cores(); ++core) CPU_SET(static_cast<std::size_t>(core), &cores);
  }
  check(MPI_Allreduce(MPI_IN_PLACE, &cores, sizeof(cores), MPI_BYTE, MPI_BOR, machine), "MPI_Allreduce");
  int ranks = 1;
  MPI_Comm_size(machine, &ranks);
  return ranks > CPU_COUNT(&cores);
}

}  // namespace

MpiOperation::MpiOperation(Call call, std::string name, Group group, MPI_Comm comm)
    : call_(std::move(call)), name_(std::move(name)), group_(std::move(group)), comm_(comm) {
  timeline_.posted = timeline_.ready = timeline_.began = Clock::now();
}

void MpiOperation::send(const void* data, std::int64_t bytes, int to, int tag, bool even_empty) {
  const int world_rank = group_.members[static_cast<std::size_t>(to)].world_rank;
  if (bytes == 0 && !even_empty) return;
  do {
    const std::int64_t part = std::min(bytes, kMaxMessageBytes);
    requests_.push_back(MPI_REQUEST_NULL);
    messages_.push_back({.peer = to, .bytes = part, .receives = false});
    check(MPI_Isend(data, static_cast<int>(part), MPI_BYTE, world_rank, tag, comm_, &requests_.back()),
          name_);
    data = static_cast<const char*>(data) + part;
    bytes -= part;
  } while (bytes > 0);
}

void MpiOperation::recv(void* data, std::int64_t bytes, int from, int tag, bool even_empty) {
  const int world_rank = group_.members[static_cast<std::size_t>(from)].world_rank;
  if (bytes == 0 && !even_empty) return;
  do {
    const std::int64_t part = std::min(bytes, kMaxMessageBytes);
    requests_.push_back(MPI_REQUEST_NULL);
    messages_.push_back({.peer = from, .bytes = part, .receives = true});
    check(MPI_Irecv(data, static_cast<int>(part), MPI_BYTE, world_rank, tag, comm_, &requests_.back()),
          name_);
    data = static_cast<char*>(data) + part;
    bytes -= part;
  } while (bytes > 0);
}

namespace {

std::int64_t total_bytes(const std::vector<Piece>& pieces, std::int64_t row_bytes) {
  std::int64_t rows = 0;
  for (const Piece& piece : pieces) rows += piece.rows;
  return rows * row_bytes;
}

std::vector<Piece> join_neighbours(const std::vector<Piece>& pieces) {
  std::vector<Piece> joined;
  for (const Piece& piece : pieces) {
    if (!joined.empty() && joined.back().begin + joined.back().rows == piece.begin) {
      joined.back().rows += piece.rows;
    } else {
      joined.push_back(piece);
    }
  }
  return joined;
}

// Whether each piece is a message of its own. A sender and its receiver cut alike, so they agree.
bool travel_alone(const std::vector<Piece>& pieces, std::int64_t row_bytes) {
  const std::int64_t bytes = total_bytes(pieces, row_bytes);
  return bytes >= static_cast<std::int64_t>(pieces.size()) * kLongPieceBytes || bytes > kMaxMessageBytes;
}

MPI_Datatype scattered_type(const std::vector<Piece>& runs, std::int64_t row_bytes) {
  std::vector<int> lengths;
  std::vector<MPI_Aint> begins;
  for (const Piece& run : runs) {
    lengths.push_back(static_cast<int>(run.rows * row_bytes));
    begins.push_back(run.begin * row_bytes);
  }
  MPI_Datatype type = MPI_DATATYPE_NULL;
  check(
      MPI_Type_create_hindexed(static_cast<int>(runs.size()), lengths.data(), begins.data(), MPI_BYTE, &type),
      "MPI_Type_create_hindexed");
  check(MPI_Type_commit(&type), "MPI_Type_commit");
  return type;
}

}  // namespace

void MpiOperation::send_pieces(const char* base, const std::vector<Piece>& pieces, std::int64_t row_bytes,
                               int to, int tag) {
  if (total_bytes(pieces, row_bytes) == 0) return send(base, 0, to, tag, true);
  const bool alone = travel_alone(pieces, row_bytes);
  const std::vector<Piece> runs = alone ? pieces : join_neighbours(pieces);
  if (alone || runs.size() == 1) {
    for (const Piece& run : runs) send(base + run.begin * row_bytes, run.rows * row_bytes, to, tag);
    return;
  }
  MPI_Datatype type = scattered_type(runs, row_bytes);
  requests_.push_back(MPI_REQUEST_NULL);
  messages_.push_back({.peer = to, .bytes = total_bytes(runs, row_bytes), .receives = false});
  check(MPI_Isend(base, 1, type, group_.members[static_cast<std::size_t>(to)].world_rank, tag, comm_,
                  &requests_.back()),
        name_);
  MPI_Type_free(&type);  // The message keeps it as long as it needs it.
}

void MpiOperation::recv_pieces(char* base, const std::vector<Piece>& pieces, std::int64_t row_bytes, int from,
                               int tag) {
  if (total_bytes(pieces, row_bytes) == 0) return recv(base, 0, from, tag, true);
  const bool alone = travel_alone(pieces, row_bytes);
  const std::vector<Piece> runs = alone ? pieces : join_neighbours(pieces);
  if (alone || runs.size() == 1) {
    for (const Piece& run : runs) recv(base + run.begin * row_bytes, run.rows * row_bytes, from, tag);
    return;
  }
  MPI_Datatype type = scattered_type(runs, row_bytes);
  requests_.push_back(MPI_REQUEST_NULL);
  messages_.push_back({.peer = from, .bytes = total_bytes(runs, row_bytes), .receives = true});
  check(MPI_Irecv(base, 1, type, group_.members[static_cast<std::size_t>(from)].world_rank, tag, comm_,
                  &requests_.back()),
        name_);
  MPI_Type_free(&type);
}

void MpiOperation::complete(std::size_t index, const MPI_Status& status) {
  const Message& message = messages_[index];
  --num_open_;
  if (!message.receives || error_) return;
  int bytes = 0;
  MPI_Get_count(&status, MPI_BYTE, &bytes);
  if (bytes == message.bytes) return;
  const std::array<int, 1> peer = {message.peer};
  error_ = fmt::format("{}: {} sent {} bytes where {} were expected", name_, describe_ranks(group_, peer),
                       bytes, message.bytes);
}

bool MpiOperation::messages_done() {
  if (num_open_ == 0) return true;
  std::vector<int> indices(requests_.size());
  std::vector<MPI_Status> statuses(requests_.size());
  int count = 0;
  const int code = MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &count, indices.data(),
                                statuses.data());
  if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) {
    error_ = fmt::format("{}: {}", name_, mpi_text(code));
    return false;
  }
  for (int i = 0; i < count && count != MPI_UNDEFINED; ++i) {
    const auto index = static_cast<std::size_t>(indices[static_cast<std::size_t>(i)]);
    const MPI_Status& status = statuses[static_cast<std::size_t>(i)];
    if (code == MPI_ERR_IN_STATUS && status.MPI_ERROR != MPI_SUCCESS) {
      const std::array<int, 1> peer = {messages_[index].peer};
      error_ = fmt::format("{}: message of {} where {} bytes were expected: {}", name_,
                           describe_ranks(group_, peer), messages_[index].bytes, mpi_text(status.MPI_ERROR));
      return false;
    }
    complete(index, status);
  }
  return num_open_ == 0 && !error_;
}

// Whoever waits reports the error: another operation's wait may be what leads here.
void MpiOperation::begin_next_stage() {
  requests_.clear();
  messages_.clear();
  try {
    stages_[next_stage_++](*this);
  } catch (const std::exception& error) {
    error_ = error.what();
  }
  num_open_ = requests_.size();
}

void MpiOperation::advance(std::optional<Clock::time_point> last_look) {
  while (!done_ && !error_) {
    if (!messages_done()) return;
    if (next_stage_ == stages_.size()) {
      done_ = true;
      stages_.clear();
      timeline_.done = std::max(timeline_.posted, last_look.value_or(Clock::now()));
      return;
    }
    begin_next_stage();
    last_look.reset();  // it was before this stage
  }
}

std::vector<int> MpiOperation::missing_ranks() const {
  std::set<int> ranks;
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] != MPI_REQUEST_NULL) ranks.insert(messages_[i].peer);
  }
  return {ranks.begin(), ranks.end()};
}

void MpiOperation::release() {
  call_.input = at::Tensor();
  call_.output = at::Tensor();
}

MpiEngine::MpiEngine(const MpiOptions& options) : options_(options) {
  int provided = 0;
  check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
  constexpr int kNeeded = MPI_THREAD_SERIALIZED;
  require_config(provided >= kNeeded, "MPI gives thread level {}, MPI_THREAD_SERIALIZED = {} is needed",
                 provided, kNeeded);
  check(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup");
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  int* most_tag = nullptr;
  int found = 0;
  check(MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, static_cast<void*>(&most_tag), &found),
        "MPI_Comm_get_attr");
  most_tag_ = found != 0 ? *most_tag : 32767;  // what the standard promises
  MPI_Comm machine = MPI_COMM_NULL;
  check(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine), "MPI_Comm_split_type");
  more_ranks_than_cores_ = are_more_than_cores(machine, options.cores);
  MPI_Comm_free(&machine);
}

MpiEngine::~MpiEngine() {
  // Finalising waits for all ranks, which may never answer; after a failure the program aborts the world
  // instead.
  if (failed_ || !active_.empty()) return;
  MPI_Comm_free(&comm_);
  MPI_Finalize();
}

Group MpiEngine::world_group() const {
  int rank = 0;
  int size = 0;
  MPI_Comm_rank(comm_, &rank);
  MPI_Comm_size(comm_, &size);
  Group group{.name = "world", .rank = rank, .members = {}, .where = std::make_shared<Where>()};
  // A machine is known by its lowest rank.
  MPI_Comm machine = MPI_COMM_NULL;
  check(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine), "MPI_Comm_split_type");
  int leader = rank;
  MPI_Bcast(&leader, 1, MPI_INT, 0, machine);
  MPI_Comm_free(&machine);
  std::vector<int> leaders(static_cast<std::size_t>(size));
  check(MPI_Allgather(&leader, 1, MPI_INT, leaders.data(), 1, MPI_INT, comm_), "MPI_Allgather");
  const std::set<int> distinct(leaders.begin(), leaders.end());
  for (int r = 0; r < size; ++r) {
    const auto machine_number =
        std::distance(distinct.begin(), distinct.find(leaders[static_cast<std::size_t>(r)]));
    const int node =
        options_.ranks_per_node > 0 ? r / options_.ranks_per_node : static_cast<int>(machine_number);
    group.members.push_back({.world_rank = r, .node = node});
  }
  return group;
}

void MpiEngine::advance_all(std::optional<Clock::time_point> last_look) {
  for (auto it = active_.begin(); it != active_.end();) {
    (*it)->advance(last_look);
    // An operation with an error stays: its other messages may still write into its tensors.
    it = (*it)->done() ? active_.erase(it) : std::next(it);
  }
  last_look_ = Clock::now();
}

void MpiEngine::start(const std::shared_ptr<MpiOperation>& operation) {
  const std::lock_guard lock(mutex_);
  advance_all(last_look_);
  operation->advance(std::nullopt);
  if (!operation->done()) active_.push_back(operation);
}

bool MpiEngine::done(const std::shared_ptr<MpiOperation>& operation) {
  const std::lock_guard lock(mutex_);
  advance_all(last_look_);
  return operation->done() || operation->error();
}

void MpiEngine::wait(const std::shared_ptr<MpiOperation>& operation) {
  const Clock::time_point start = Clock::now();
  std::unique_lock lock(mutex_);
  std::optional<Clock::time_point> last_look = last_look_;
  while (!operation->done() && !operation->error()) {
    advance_all(last_look);
    last_look.reset();
    if (operation->done() || operation->error()) break;
    const auto waited = Clock::now() - start;
    if (waited > options_.timeout) {
      const std::vector<int> missing = operation->missing_ranks();
      throw NoAnswer(fmt::format("{}: no answer within {:g} s from {}", operation->name(),
                                 std::chrono::duration<double>(options_.timeout).count(),
                                 describe_ranks(operation->group(), missing)),
                     missing.size());
    }
    if (waited < kSpin && !more_ranks_than_cores_) continue;
    lock.unlock();
    if (waited < kYield) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
    lock.lock();
  }
  if (operation->error()) throw CommError(*operation->error());
  operation->release();
}

void MpiEngine::wait_for_all() {
  std::unique_lock lock(mutex_);
  const std::list<std::shared_ptr<MpiOperation>> open = active_;
  lock.unlock();
  for (const std::shared_ptr<MpiOperation>& operation : open) wait(operation);
}

}  // namespace collegium::comm
