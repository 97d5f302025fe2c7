// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/mpirun.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>

#include "collegium/base/error.h"
#include "collegium/cli/command_line.h"
#include "collegium/cli/mpirun_output.h"

namespace collegium::cli {

namespace {

// What a rank is told by the program that started it: that program's folder in /proc, whose command line is
// the rank's too, the file there for the report of a failure, and where a person is watching, how many
// columns the terminal has.
constexpr const char* kStarter = "COLLEGIUM_STARTER";
constexpr const char* kReport = "COLLEGIUM_REPORT";
constexpr const char* kTerminal = "COLLEGIUM_TERMINAL";

std::string find_program(const std::string& name) {
  const char* path = std::getenv("PATH");  // NOLINT(concurrency-mt-unsafe): nothing changes the environment
  std::string rest = path != nullptr ? path : "";
  while (!rest.empty()) {
    const std::size_t colon = rest.find(':');
    const std::filesystem::path candidate = std::filesystem::path(rest.substr(0, colon)) / name;
    if (::access(candidate.c_str(), X_OK) == 0) return candidate.string();
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
  }
  return "";
}

// The environment of mpirun: nothing of an outer launcher or batch system, which would choose hosts and
// sizes.
std::vector<std::string> ranks_environment(int report_file) {
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable = *entry;
    const bool settings = variable.find("_MCA_") != std::string_view::npos;
    bool outer = false;
    for (const char* prefix : {"OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "PBS_", "LSB_"})
      outer = outer || variable.starts_with(prefix);
    if (!outer || settings) environment.emplace_back(variable);
  }
  // Not a stack trace of numbers from every rank that a signal ends.
  if (std::getenv("OMPI_MCA_opal_signal") == nullptr)  // NOLINT(concurrency-mt-unsafe): nothing changes it
    environment.emplace_back("OMPI_MCA_opal_signal=");
  environment.push_back(fmt::format("{}=/proc/{}", kStarter, ::getpid()));
  environment.push_back(fmt::format("{}=/proc/{}/fd/{}", kReport, ::getpid(), report_file));
  if (const int columns = terminal_columns()) environment.push_back(fmt::format("{}={}", kTerminal, columns));
  return environment;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  result.reserve(strings.size() + 1);
  for (std::string& string : strings) result.push_back(string.data());
  result.push_back(nullptr);
  return result;
}

int checked(int result, const char* what) {
  if (result < 0)
    throw Error(fmt::format("{}: {}", what, std::strerror(errno)));  // NOLINT(concurrency-mt-unsafe)
  return result;
}

// The signals that the starting program waits for, blocked while this lives.
class StopSignals {
 public:
  StopSignals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&set, signal);
    sigprocmask(SIG_BLOCK, &set, &former_);
    file_ = checked(::signalfd(-1, &set, SFD_CLOEXEC), "signalfd");
  }
  ~StopSignals() {
    ::close(file_);
    sigprocmask(SIG_SETMASK, &former_, nullptr);
  }
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  int file() const { return file_; }
  const sigset_t& former() const { return former_; }
  int read() const {
    signalfd_siginfo info{};
    return ::read(file_, &info, sizeof(info)) == sizeof(info) ? static_cast<int>(info.ssi_signo) : 0;
  }

 private:
  int file_ = -1;
  sigset_t former_{};
};

struct Process {
  pid_t id = -1;
  int output = -1;  ///< reading end of its standard output
  int errors = -1;  ///< and error
};

Process start(std::vector<std::string> command, std::vector<std::string> environment,
              const sigset_t& signals) {
  const std::vector<char*> argv = pointers(command);
  const std::vector<char*> envp = pointers(environment);
  std::array<int, 2> output{};
  std::array<int, 2> errors{};
  checked(::pipe2(output.data(), O_CLOEXEC), "pipe");
  checked(::pipe2(errors.data(), O_CLOEXEC), "pipe");
  const int nothing = checked(::open("/dev/null", O_RDONLY | O_CLOEXEC), "/dev/null");
  const pid_t id = checked(::fork(), "fork");
  if (id == 0) {
    // A group of its own: a terminal's Ctrl-C reaches the starting program only, which decides what to do.
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    ::sigprocmask(SIG_SETMASK, &signals, nullptr);
    ::dup2(nothing, STDIN_FILENO);
    ::dup2(output[1], STDOUT_FILENO);
    ::dup2(errors[1], STDERR_FILENO);
    ::execve(argv[0], argv.data(), envp.data());
    ::_exit(127);
  }
  ::close(output[1]);
  ::close(errors[1]);
  ::close(nothing);
  return {.id = id, .output = output[0], .errors = errors[0]};
}

// Output on its way to this program's own. mpirun does not say when it cannot be written, so it goes through
// here; whoever reads it may be slow, which must not keep signals waiting.
class PassedOutput {
 public:
  bool waits() const { return !waiting_.empty(); }
  void add(std::string_view text) {
    if (failure_ == 0) waiting_ += text;
  }
  // As much as is taken at once.
  void write_some() {
    // A pipe that is ready takes as much without waiting.
    const ssize_t written =
        ::write(STDOUT_FILENO, waiting_.data(), std::min<std::size_t>(waiting_.size(), PIPE_BUF));
    if (written < 0 && errno != EINTR) {
      failure_ = errno;
      waiting_.clear();
    }
    if (written > 0) waiting_.erase(0, static_cast<std::size_t>(written));
  }
  void require_written() const {
    if (failure_ != 0) throw_not_written(failure_);
  }

 private:
  std::string waiting_;
  int failure_ = 0;
};

// Passes output and errors on until mpirun has ended. Returns the last signal that came, 0 if none.
int attend(const Process& process, const StopSignals& signals, PassedOutput& output, MpirunOutput& errors) {
  int last_signal = 0;
  enum : std::size_t { kSignals, kErrors, kOutput, kOwn };
  std::array<pollfd, 4> files = {pollfd{.fd = signals.file(), .events = POLLIN, .revents = 0},
                                 pollfd{.fd = process.errors, .events = POLLIN, .revents = 0},
                                 pollfd{.fd = process.output, .events = POLLIN, .revents = 0},
                                 pollfd{.fd = STDOUT_FILENO, .events = POLLOUT, .revents = 0}};
  std::array<char, 65536> buffer{};
  bool ended = false;
  while (!ended || output.waits() || files[kErrors].fd >= 0) {
    // One of the two: what there is is written before more is read. Negative ones are passed over.
    files[kOutput].fd = ended || output.waits() ? -1 : process.output;
    files[kOwn].fd = output.waits() ? STDOUT_FILENO : -1;
    if (::poll(files.data(), files.size(), -1) < 0) {
      if (errno == EINTR) continue;
      break;
    }
    if ((files[kSignals].revents & POLLIN) != 0) {
      const bool first = last_signal == 0;
      last_signal = signals.read();
      if (ended) break;  // nothing runs any more: who reads the output is what is waited for
      ::kill(process.id, first ? SIGUSR1 : SIGTERM);
    }
    if (files[kErrors].revents != 0) {
      const ssize_t count = ::read(process.errors, buffer.data(), buffer.size());
      if (count <= 0) files[kErrors].fd = -1;
      const std::string text =
          errors.pass({buffer.data(), static_cast<std::size_t>(std::max<ssize_t>(count, 0))});
      std::fwrite(text.data(), 1, text.size(), stderr);
      std::fflush(stderr);
    }
    if (files[kOutput].fd >= 0 && files[kOutput].revents != 0) {
      const ssize_t count = ::read(process.output, buffer.data(), buffer.size());
      ended = count <= 0;
      output.add({buffer.data(), static_cast<std::size_t>(std::max<ssize_t>(count, 0))});
    } else if (files[kOwn].fd >= 0 && files[kOwn].revents != 0) {
      output.write_some();
    }
  }
  const std::string rest = errors.finish();
  std::fwrite(rest.data(), 1, rest.size(), stderr);
  return last_signal;
}

struct Report {
  int exit_code = 1;
  std::string message;
};

// Reports are "exit code, message, \0", one after the other.
std::optional<Report> first_report(int file) {
  std::string text;
  std::array<char, 65536> buffer{};
  ::lseek(file, 0, SEEK_SET);
  for (ssize_t count = 0; (count = ::read(file, buffer.data(), buffer.size())) > 0;)
    text.append(buffer.data(), static_cast<std::size_t>(count));
  const std::size_t end = text.find('\0');
  if (end == std::string::npos || end == 0) return std::nullopt;
  return Report{.exit_code = text[0] - '0', .message = text.substr(1, end - 1)};
}

[[noreturn]] void end_by(int signal) {
  std::signal(signal, SIG_DFL);
  std::raise(signal);
  throw RanksFailed("stopped", 1);
}

}  // namespace

std::string find_mpirun() {
  std::string built_with = COLLEGIUM_MPIRUN;
  if (!built_with.empty() && ::access(built_with.c_str(), X_OK) == 0) return built_with;
  std::error_code error;
  std::filesystem::path folder = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  for (; !error && folder.has_relative_path(); folder = folder.parent_path()) {
    const std::filesystem::path candidate = folder / ".venv" / "bin" / "mpirun";
    if (::access(candidate.c_str(), X_OK) == 0) return candidate.string();
  }
  return find_program("mpirun");
}

void run_with_mpirun(const std::string& mpirun, int num_ranks) {
  const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
  std::vector<std::string> command = {mpirun};
  if (::geteuid() == 0) command.emplace_back("--allow-run-as-root");
  // Ranks bind their threads themselves.
  for (const char* option : {"--oversubscribe", "--bind-to", "none", "-n"}) command.emplace_back(option);
  command.push_back(std::to_string(num_ranks));
  command.push_back(program);

  const int report_file = checked(::memfd_create("report", MFD_CLOEXEC), "memfd_create");
  int status = 0;
  int signal = 0;
  PassedOutput output;
  MpirunOutput errors;
  {
    const StopSignals signals;
    const Process process = start(command, ranks_environment(report_file), signals.former());
    signal = attend(process, signals, output, errors);
    ::close(process.output);
    ::close(process.errors);
    while (::waitpid(process.id, &status, 0) < 0 && errno == EINTR) {
    }
  }
  const std::optional<Report> report = first_report(report_file);
  ::close(report_file);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return output.require_written();
  // Ranks that do not know how to stop were ended by the request.
  if (signal != 0 && !report) end_by(signal);
  if (const auto ended = errors.ended_by_signal()) {
    throw RanksFailed(
        fmt::format("rank {} of {} was ended by signal {} ({}){}", ended->rank, num_ranks, ended->signal,
                    ended->name,
                    ended->signal == SIGKILL ? ", which the kernel sends when memory runs out" : ""),
        1);
  }
  if (report) throw RanksFailed(report->message, report->exit_code);
  throw RanksFailed(
      fmt::format("{} failed{}{}", mpirun,
                  WIFEXITED(status) ? fmt::format(" with exit code {}", WEXITSTATUS(status)) : "",
                  errors.notices().empty() ? "" : ":\n" + errors.notices()),
      1);
}

std::vector<std::string> program_arguments(int argc, char** argv) {
  const char* starter = std::getenv(kStarter);  // NOLINT(concurrency-mt-unsafe): start-up, one thread
  if (starter == nullptr) return {argv, argv + argc};
  std::ifstream file(std::string(starter) + "/cmdline", std::ios::binary);
  std::vector<std::string> arguments;
  std::string argument;
  while (std::getline(file, argument, '\0')) arguments.push_back(argument);
  if (arguments.empty())
    throw Error(fmt::format("{}: the program that started this rank has ended", starter));
  return arguments;
}

bool report_to_starter(const std::string& message, int exit_code) {
  const char* path = std::getenv(kReport);  // NOLINT(concurrency-mt-unsafe): nothing changes the environment
  if (path == nullptr) return false;
  const int file = ::open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
  if (file < 0) return false;
  std::string record = std::to_string(exit_code) + message;
  record.push_back('\0');
  const bool written = ::write(file, record.data(), record.size()) == static_cast<ssize_t>(record.size());
  ::close(file);
  return written;
}

int terminal_columns() {
  constexpr int kUsual = 80;
  if (::isatty(STDERR_FILENO) == 1) {
    winsize size{};
    return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kUsual;
  }
  const char* text = std::getenv(kTerminal);  // NOLINT(concurrency-mt-unsafe): nothing changes it
  int columns = 0;
  if (text != nullptr) std::from_chars(text, text + std::strlen(text), columns);
  return columns;
}

}  // namespace collegium::cli
